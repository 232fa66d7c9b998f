"""The bytes of one instance: a flat allocation, cut into regions of equal blocks. Knows no model and no block owner."""

import fcntl
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import msgspec
import torch

from triptych.errors import ConfigError
from triptych.messages import RegionDescription

ALIGNMENT = 4096  # of every region: a page, so that regions never share one

RegionSize: TypeAlias = tuple[int, int, str]  # block_bytes, num_blocks, layout


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """Where a process of the same user on the same host finds a slab in CPU memory: /proc/<pid>/fd/<fd>."""

    pid: int
    fd: int
    name: str
    nbytes: int


class Slab:
    """One allocation per instance, made once at start. Registered with the transports as a whole, so `carve` is free.

        byte 0                                                        nbytes
        | kv block 0 | kv block 1 | ... |pad| embedding block 0 | ... |

    On CPU it is an anonymous memory file: peers map it through /proc, its pages are taken when they are first
    written, /dev/shm with its 64 MB in a container does not bound it, and the kernel frees it with its last user,
    so that a killed instance leaves nothing behind. On CUDA it is one tensor, zeroed.
    """

    def __init__(self, name: str, nbytes: int, device: str = "cpu") -> None:
        """Raises ConfigError where the memory is not there."""
        self.name = name
        self.nbytes = _aligned(nbytes)
        self.regions: dict[str, RegionDescription] = {}
        self.segment: Segment | None = None  # None on CUDA
        if device == "cpu":
            require_memory(self.nbytes)
            self.segment = _create_segment(name, self.nbytes)
            self._memory = mmap.mmap(self.segment.fd, self.nbytes)
            self.tensor = torch.frombuffer(self._memory, dtype=torch.uint8)
        else:
            self.tensor = _cuda_bytes(self.nbytes, device)
        self.device = str(self.tensor.device)  # "cpu" or "cuda:N"

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()

    def carve(self, sizes: Mapping[str, RegionSize]) -> dict[str, RegionDescription]:
        """Cut the slab anew. Whoever used the old regions must be done with them; the bytes stay as they are."""
        needed = slab_bytes(sizes)
        assert needed <= self.nbytes, f"regions of {needed} bytes in a slab of {self.nbytes}"
        offset = 0
        regions = {}
        for name, (block_bytes, num_blocks, layout) in sizes.items():
            regions[name] = RegionDescription(offset, block_bytes, num_blocks, layout)
            offset += _aligned(block_bytes * num_blocks)
        self.regions = regions
        return regions

    def region_tensor(self, name: str) -> torch.Tensor:
        """The bytes of a region, flat: uint8 [num_blocks * block_bytes], a view."""
        region = self.regions[name]
        return self.tensor.narrow(0, region.offset, region.block_bytes * region.num_blocks)

    def discard(self) -> None:
        """Forget the bytes, so that their pages cost nothing until they are written again. Nobody may be reading."""
        if self.segment is not None:
            self._memory.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        """Give the memory back once no tensor views it. Transports that use the slab must be closed before."""
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self.regions = {}
        if self.segment is not None:
            del self._memory
            os.close(self.segment.fd)
            self.segment = None


def slab_bytes(sizes: Mapping[str, RegionSize]) -> int:
    """How large a slab must be to be carved into these regions."""
    return sum(_aligned(block_bytes * num_blocks) for block_bytes, num_blocks, _ in sizes.values())


def require_memory(nbytes: int) -> None:
    """Raises ConfigError if this host or container could never hold that many bytes more."""
    available = available_bytes()
    if nbytes > available:
        raise ConfigError(
            f"the pools of one instance need {nbytes} bytes and {available} are available: "
            "lower kv_cache_bytes or embedding_cache_bytes"
        )


def available_bytes() -> int:
    """What the kernel can still give without swapping, capped by the container's limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return free if text == "max" else min(free, int(text))


def _create_segment(name: str, nbytes: int) -> Segment:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    # A reader of a shrunk file would die of SIGBUS: rule it out.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return Segment(os.getpid(), fd, name, nbytes)


def _cuda_bytes(nbytes: int, device: str) -> torch.Tensor:
    try:
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise ConfigError(f"{device}: the pools need {nbytes} bytes and {free} of {total} are free") from error


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
