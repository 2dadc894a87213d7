"""glibc's allocator told to keep what it has: for processes of our own, which pass megabyte buffers all day.

By default a freed megabyte goes back to the kernel and the next one is faulted in again, page by page: 1.3 times the
time of a lookup of 8,192 rows on both ends together. A process that only borrows our client is left as it is.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_KEEP = 256 << 20
_PAD = 64 << 20
_MMAP_FROM = 32 << 20
"""The most glibc takes; larger arrays, which tables are, are mapped on their own and returned when freed."""


def keep_buffers() -> bool:
    """Call once when a process starts; False where the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    wanted = ((_MMAP_THRESHOLD, _MMAP_FROM), (_TRIM_THRESHOLD, _KEEP), (_TOP_PAD, _PAD))
    return all(mallopt(option, value) for option, value in wanted)
