"""Reads from slabs in the memory of the same host: maps the peer's slab and copies. Needs nothing of the peer's CPU.

A mapping outlives its holder, so a read from a killed peer still delivers the right bytes; that it is dead is for the
control plane to find out.
"""

import ctypes
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np

from triptych.errors import InstanceError
from triptych.messages import Peer
from triptych.transfer.base import Mailbox, Read, Transport
from triptych.transfer.slab import Segment, Slab


@dataclass(frozen=True, slots=True)
class _Mapping:
    epoch: str
    address: int
    view: np.ndarray[tuple[int], np.dtype[np.uint8]]  # keeps the mapping alive


class ShmTransport(Transport):
    name = "shm"

    def __init__(self, slab: Slab, mailbox: Mailbox) -> None:
        super().__init__(slab, mailbox)
        self._mappings: dict[str, _Mapping] = {}
        self._thread.start()

    def describe(self) -> bytes:
        assert self._slab.segment is not None, f"slab {self._slab.name} is on {self._slab.device}"
        return msgspec.msgpack.encode(self._slab.segment)

    def _link(self, peer: Peer) -> None:
        mapping = self._mappings.get(peer.id)
        if mapping is None or mapping.epoch != peer.epoch:
            view = map_segment(msgspec.msgpack.decode(peer.slab.transports[self.name], type=Segment))
            self._mappings[peer.id] = _Mapping(peer.epoch, view.ctypes.data, view)

    def _unlink(self, peer: Peer) -> None:
        mapping = self._mappings.get(peer.id)
        if mapping is not None and mapping.epoch == peer.epoch:
            del self._mappings[peer.id]

    def _start(self, read: Read) -> None:
        block_bytes = read.target.block_bytes
        source = self._mappings[read.peer.id].address + read.source.offset
        target = self._slab.address + read.target.offset
        for first, into, count in runs(read.source_blocks, read.target_blocks):
            # Other threads run during the call: ctypes releases the interpreter.
            ctypes.memmove(target + into * block_bytes, source + first * block_bytes, count * block_bytes)
        self._finish(read)


def map_segment(segment: Segment) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The slab of another process, read-only. Raises OSError or InstanceError if it is gone."""
    fd = os.open(f"/proc/{segment.pid}/fd/{segment.fd}", os.O_RDONLY)
    try:
        # Another process may have got the number of a dead one: the name tells.
        found = os.readlink(f"/proc/self/fd/{fd}")
        if not found.startswith(f"/memfd:{segment.name} "):
            raise InstanceError(f"process {segment.pid} has {found} in place of slab {segment.name}")
        return np.frombuffer(mmap.mmap(fd, segment.nbytes, prot=mmap.PROT_READ), dtype=np.uint8)
    finally:
        os.close(fd)


def runs(source: list[int], target: list[int]) -> Iterator[tuple[int, int, int]]:
    """Cut two block lists of one length into (first source, first target, count) that are contiguous in both."""
    start = 0
    for i in range(1, len(source) + 1):
        if i == len(source) or source[i] != source[i - 1] + 1 or target[i] != target[i - 1] + 1:
            yield source[start], target[start], i - start
            start = i
