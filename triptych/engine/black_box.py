"""Which requests an instance was working on when it died: written before every step, read by whoever finds it dead."""

import mmap
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from triptych.core import RequestId

NBYTES = 1 << 16
_LENGTH = struct.Struct("<I")


class BlackBox:
    """A file of fixed size in memory that outlives the process which writes it. Writing costs microseconds.

    bytes 0..3   length of the text, little endian
    bytes 4..    request ids of the running step, one per line; cut off at the end of the file
    """

    def __init__(self, path: str | Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(fd, NBYTES)
            self._memory = mmap.mmap(fd, NBYTES)
        finally:
            os.close(fd)
        self.record(())

    def record(self, requests: Iterable[RequestId]) -> None:
        """A step with these requests begins; none: it ended."""
        text = "\n".join(requests).encode()[: NBYTES - _LENGTH.size]
        self._memory[_LENGTH.size : _LENGTH.size + len(text)] = text
        self._memory[: _LENGTH.size] = _LENGTH.pack(len(text))


def read(path: str | Path) -> list[RequestId]:
    """The requests of the step that never ended. Empty if there was none, or no such file."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    if len(content) < _LENGTH.size:
        return []
    (length,) = _LENGTH.unpack_from(content)
    text = content[_LENGTH.size : _LENGTH.size + length].decode(errors="replace")
    return [RequestId(line) for line in text.split("\n") if line]
