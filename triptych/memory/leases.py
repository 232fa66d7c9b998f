"""What this instance has promised to keep in place until a reader is done with it."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from triptych.core import InstanceId, LeaseId


@dataclass(frozen=True, slots=True)
class Lease:
    """`content` is what the ticket speaks of; `give_back` frees it in the pool that it came from, `take_back` makes it
    the holder's again."""

    reader: InstanceId
    content: object
    give_back: Callable[[], None]
    take_back: Callable[[], None]


class Leases:
    """One per instance, shared by its stages. A lease ends by `release` (content freed), by `claim` (new owner) or by
    `decline` (the old owner has it again)."""

    def __init__(self, first_id: int = 1) -> None:
        """`first_id` differs between incarnations of an instance, so that a late release never meets a lease of the
        next one."""
        self._ids = itertools.count(first_id)
        self._leases: dict[LeaseId, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def grant(
        self,
        reader: InstanceId,
        content: object,
        give_back: Callable[[], None],
        take_back: Callable[[], None] | None = None,
    ) -> LeaseId:
        """Without `take_back`, content that the reader declines is given back: nobody here has a use for it."""
        lease = LeaseId(next(self._ids))
        self._leases[lease] = Lease(reader, content, give_back, take_back or give_back)
        return lease

    def release(self, lease: LeaseId) -> None:
        """Idempotent: a lease that is not there was released before."""
        found = self._leases.pop(lease, None)
        if found is not None:
            found.give_back()

    def claim(self, lease: LeaseId) -> object | None:
        """A hand-over inside the instance: the content leaves the lease without being freed. None if it is gone."""
        found = self._leases.pop(lease, None)
        return None if found is None else found.content

    def decline(self, lease: LeaseId) -> None:
        """The reader did not pull the content and will not. Idempotent."""
        found = self._leases.pop(lease, None)
        if found is not None:
            found.take_back()

    def release_reader(self, reader: InstanceId) -> list[object]:
        """The reader is confirmed dead: nothing will be pulled any more. Returns what it was promised."""
        lost = {lease: held.content for lease, held in self._leases.items() if held.reader == reader}
        for lease in lost:
            self.release(lease)
        return list(lost.values())
