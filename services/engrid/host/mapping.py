"""Memory files mapped where the kernel can back them with huge pages, for whoever holds the rows and whoever reads them.

A gather of random rows costs a page walk for each: over 4 KiB pages 0.7 of the rate over 2 MiB pages (1 GiB of rows,
docs/benchmarks.md). Arrays have huge pages by themselves, as numpy asks for them; of a memory file Linux makes none where
shmem_enabled is `never`, its default, unless told to (madvise MADV_COLLAPSE, Linux 6.1). Then every process whose mapping
is aligned as the file is gets them.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref

import numpy as np

from engrid.rpc.frames import Bytes

HUGE_PAGE = 2 << 20
"""Of x86-64 and of arm64 with pages of 4 KiB; elsewhere an alignment that does no harm."""
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MADV_COLLAPSE = 25
_COLLAPSE_BYTES = 32 << 20
"""In one call: 60 ms here."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value


def reserve(size: int) -> int:
    """Address of `size` bytes that read as zeros and take no memory, aligned to HUGE_PAGE; for `map_file` and `unmap`.

    Raises OSError.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    found = _mmap(None, size + HUGE_PAGE, flags, -1)
    address = -(-found // HUGE_PAGE) * HUGE_PAGE
    end = address + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    for first, last in ((found, address), (end, found + size + HUGE_PAGE)):
        if first < last:
            _libc.munmap(first, last - first)
    return address


def map_file(address: int, size: int, descriptor: int) -> None:
    """Maps a file for reading over what is at `address`, which was reserved. Raises OSError."""
    _mmap(address, size, mmap.MAP_SHARED | _MAP_FIXED, descriptor)


def unmap(address: int, size: int) -> None:
    """Gives addresses back; what is mapped there must not be read any more."""
    _libc.munmap(address, size)


def mapped(descriptor: int, size: int) -> Bytes:
    """A file's bytes, uint8 [size], read only; unmapped when no view of it is left. Raises OSError."""
    if not size:
        return np.empty(0, np.uint8)
    address = reserve(size)
    map_file(address, size, descriptor)
    memory = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(memory, unmap, address, size).atexit = False
    view: Bytes = np.ctypeslib.as_array(memory)
    view.flags.writeable = False
    return view


def collapse(view: Bytes, begin: int) -> int:
    """Makes huge pages of the next bytes of a `mapped` file from `begin` on; returns where to go on, its size at the end.

    The bytes stay the same and readable all the while. Where the kernel does not do it, nothing changes.
    """
    end = min(begin + _COLLAPSE_BYTES, view.nbytes // HUGE_PAGE * HUGE_PAGE)
    if begin >= end:
        return view.nbytes
    failed = _libc.madvise(view.ctypes.data + begin, end - begin, _MADV_COLLAPSE)
    if failed and ctypes.get_errno() not in (errno.EAGAIN, errno.EBUSY):
        return view.nbytes
    return end


def _mmap(address: int | None, size: int, flags: int, descriptor: int) -> int:
    found = _libc.mmap(address, size, mmap.PROT_READ, flags, descriptor, 0)
    if found is None or found == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"mapping {size} bytes failed: {os.strerror(code)}")
    return int(found)
