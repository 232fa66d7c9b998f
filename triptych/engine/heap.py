"""How the C library treats the memory of a process that runs an engine."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's parameters in glibc
LARGE_BYTES, MOST_OF_OLD_BYTES = 1 << 30, 32 << 20  # older ones refuse a threshold beyond that


def keep_large_blocks() -> None:
    """glibc would give the memory of every picture and long prompt back to the kernel and fault it in again for the
    next one: 3,000 page faults, 5 ms. From now on it stays on the heap. Other C libraries have no such setting."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, LARGE_BYTES)
        if not mallopt(_MMAP_THRESHOLD, LARGE_BYTES):
            mallopt(_MMAP_THRESHOLD, MOST_OF_OLD_BYTES)
