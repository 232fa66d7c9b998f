"""Media that clients gave a name to, so that a later request can mean them without sending them again.

A name stands for bytes and never takes their place: what is hashed, cached and encoded are always the bytes.
"""

import hashlib
import itertools
from collections import OrderedDict
from dataclasses import dataclass
from typing import Self

from triptych.core import HASH_BYTES

_ENTRY_BYTES = 1024  # about what an entry costs beside its bytes, and its name with it

MediaName = tuple[str, str]  # modality, and the uuid that the client chose


@dataclass(frozen=True, slots=True)
class Content:
    """The bytes of a file and 128 bits of hash over them."""

    data: bytes
    hash: bytes

    @classmethod
    def of(cls, data: bytes) -> Self:
        return cls(data, hashlib.blake2b(data, digest_size=HASH_BYTES).digest())


class MediaStore:
    """Contents by name. Bounded in bytes: what was used longest ago goes first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[MediaName, tuple[int, Content]] = OrderedDict()
        self._num_bytes = 0
        self._arrivals = itertools.count()

    def arrival(self) -> int:
        """Requests are numbered as they come: the bytes of a later one win, however long those of either take."""
        return next(self._arrivals)

    def get(self, name: MediaName) -> Content | None:
        entry = self._entries.get(name)
        if entry is None:
            return None
        self._entries.move_to_end(name)
        return entry[1]

    def put(self, name: MediaName, content: Content, arrival: int) -> None:
        """From now on the name means this content, unless a request that came later has said otherwise. Of content
        that is larger than the whole store nothing is kept, and the name means nothing."""
        known = self._entries.get(name)
        if known is not None:
            if known[0] > arrival:
                return
            self._remove(name)
        if _cost(content) > self._max_bytes:
            return
        self._entries[name] = (arrival, content)
        self._num_bytes += _cost(content)
        while self._num_bytes > self._max_bytes:
            self._remove(next(iter(self._entries)))

    def check_integrity(self) -> None:
        total = sum(_cost(content) for _, content in self._entries.values())
        assert total == self._num_bytes <= self._max_bytes, f"{total} bytes held, {self._num_bytes} counted"

    def _remove(self, name: MediaName) -> None:
        self._num_bytes -= _cost(self._entries.pop(name)[1])


def _cost(content: Content) -> int:
    return len(content.data) + _ENTRY_BYTES
