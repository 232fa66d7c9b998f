"""What every way of moving blocks has in common: a private thread that does the work, and a mailbox for the outcomes.

A transport only moves bytes: tickets, epochs and regions are checked before, in `Transfers`.
"""

import logging
import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import ClassVar

from triptych.errors import InstanceError
from triptych.messages import Peer, RegionDescription
from triptych.transfer.slab import Slab

logger = logging.getLogger(__name__)


class StaleTicketError(InstanceError):
    """The ticket is of an incarnation that is not the connected one. Nothing was read."""


@dataclass(frozen=True, slots=True)
class PullResult:
    """A pull is settled: no byte lands in its blocks any more. With an error their content is undefined."""

    key: Hashable
    error: InstanceError | None = None


@dataclass(frozen=True, slots=True)
class Read:
    """Block `source_blocks[i]` of a region of `peer` goes to `target_blocks[i]` of the same region here."""

    key: Hashable
    peer: Peer
    source: RegionDescription
    target: RegionDescription
    source_blocks: list[int]
    target_blocks: list[int]

    @property
    def nbytes(self) -> int:
        return len(self.target_blocks) * self.target.block_bytes


class Mailbox:
    """Carries results from the private threads to the owner. `fd` is readable whenever `take` has something."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._results: deque[PullResult] = deque()

    def put(self, result: PullResult) -> None:
        self._results.append(result)
        os.eventfd_write(self.fd, 1)

    def take(self) -> list[PullResult]:
        # Clear first: a result that arrives between the two lines makes `fd` readable again.
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        return [self._results.popleft() for _ in range(len(self._results))]

    def close(self) -> None:
        os.close(self.fd)


class Transport(ABC):
    """Reads blocks of peers into the own slab. All methods but `close` return at once; the thread does the rest.

    Every read ends in the mailbox exactly once, and only when it is settled. A read that never ends is never
    reported, not even on `close`: its blocks must not be reused. Reads that are under way when their peer is
    detached go on to their end.
    """

    name: ClassVar[str]  # key of `describe()` in SlabDescription.transports

    def __init__(self, slab: Slab, mailbox: Mailbox) -> None:
        self._slab = slab
        self._mailbox = mailbox
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"transfer-{self.name}", daemon=True)

    @abstractmethod
    def describe(self) -> bytes:
        """What `attach` of a peer needs to know about this slab."""

    def attach(self, peer: Peer) -> None:
        """Make the first read from this incarnation fast. A failure shows in the reads, which try again."""
        self._jobs.put(partial(self._try_link, peer))

    def detach(self, peer: Peer) -> None:
        """Forget this incarnation."""
        self._jobs.put(partial(self._unlink, peer))

    def read(self, read: Read) -> None:
        self._jobs.put(partial(self._try_start, read))

    def close(self) -> None:
        """Waits for the thread, which gives unfinished reads a moment."""
        self._jobs.put(None)
        self._thread.join()

    # ---- on the private thread

    @abstractmethod
    def _link(self, peer: Peer) -> None:
        """Idempotent per incarnation. Raises if the peer cannot be reached."""

    @abstractmethod
    def _unlink(self, peer: Peer) -> None:
        """Idempotent; never raises."""

    @abstractmethod
    def _start(self, read: Read) -> None:
        """Do the read, or post it for `_poll` to find its end. Raises if nothing was posted."""

    def _poll(self) -> float | None:
        """Look after posted reads. Returns how many seconds may pass until the next look; None: nothing is posted."""
        return None

    def _shut(self) -> None:
        """The last thing that the thread does."""
        return

    def _finish(self, read: Read, error: InstanceError | None = None) -> None:
        self._mailbox.put(PullResult(read.key, error))

    def _run(self) -> None:
        pause: float | None = None
        while True:
            try:
                job = self._jobs.get(timeout=pause)
            except Empty:
                pass
            else:
                if job is None:
                    break
                job()
            pause = self._poll()
        self._shut()

    def _try_link(self, peer: Peer) -> None:
        try:
            self._link(peer)
        except Exception as error:  # of the system or of a library, whatever it raises: a peer out of reach
            logger.warning("%s: cannot reach %s: %s", self.name, peer.id, _describe_error(error))

    def _try_start(self, read: Read) -> None:
        try:
            self._link(read.peer)
            self._start(read)
        except Exception as error:  # as above: it ends this read, never the thread
            self._finish(read, InstanceError(f"{self.name}: reading from {read.peer.id}: {_describe_error(error)}"))


def _describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
