"""Memory files mapped for reading: the bytes, when they go, and the huge pages under them."""

import ctypes
import os
import platform
import re
import time

import numpy as np
import pytest

from engrid.rpc.mapping import HUGE_PAGE, collapse, map_file, mapped, reserve, unmap
from engrid.shard.sealed import SealedRows
from tests.shards import table

SIZE = 3 * HUGE_PAGE + 12_345
CONTENT = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)
KERNEL = tuple(map(int, re.match(r"(\d+)\.(\d+)", platform.release()).groups()))
collapses = pytest.mark.skipif(KERNEL < (6, 1), reason="Linux before 6.1 makes no huge pages of a memory file")


@pytest.fixture
def descriptor():
    made = os.memfd_create("engrid tested")
    os.write(made, CONTENT.tobytes())
    yield made
    os.close(made)


def in_maps():
    with open("/proc/self/maps") as maps:  # noqa: PTH123 - no file
        return sum("engrid tested" in line for line in maps)


def huge_bytes(address):
    """Of the mapping that begins there, backed by huge pages."""
    with open("/proc/self/smaps") as maps:  # noqa: PTH123 - no file
        _, _, found = maps.read().partition(f"{address:x}-")
    return int(re.search(r"ShmemPmdMapped: +(\d+) kB", found).group(1)) << 10


def test_bytes_are_the_files_and_cannot_be_written(descriptor):
    view = mapped(descriptor, SIZE)
    assert np.array_equal(view, CONTENT)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    assert mapped(descriptor, 0).size == 0


def test_it_is_unmapped_with_its_last_view(descriptor):
    view = mapped(descriptor, SIZE)[HUGE_PAGE:]
    assert in_maps() == 1
    assert np.array_equal(view, CONTENT[HUGE_PAGE:])
    del view
    assert in_maps() == 0


def test_what_cannot_be_mapped_is_an_error():
    read, write = os.pipe()
    try:
        with pytest.raises(OSError, match="mapping 4096 bytes failed: No such device"):
            mapped(read, 4096)
    finally:
        os.close(read)
        os.close(write)
    with pytest.raises(OSError, match="failed: Cannot allocate memory"):
        reserve(1 << 60)


@collapses
def test_huge_pages_come_under_every_aligned_mapping_and_bytes_stay(descriptor):
    view = mapped(descriptor, SIZE)
    other = reserve(SIZE + HUGE_PAGE)
    try:
        map_file(other + HUGE_PAGE, SIZE, descriptor)
        done = 0
        while done < SIZE:
            done = collapse(view, done)
        assert huge_bytes(view.ctypes.data) == 3 * HUGE_PAGE
        assert np.array_equal(view, CONTENT)
        again = np.ctypeslib.as_array((ctypes.c_uint8 * SIZE).from_address(other + HUGE_PAGE))
        assert np.array_equal(again, CONTENT)
        assert huge_bytes(other + HUGE_PAGE) == 3 * HUGE_PAGE
    finally:
        unmap(other, SIZE + HUGE_PAGE)


def test_where_there_are_no_huge_pages_it_stops_at_once(descriptor):
    view = np.empty(SIZE, np.uint8)  # of no file, and not aligned
    assert collapse(view[1:], 0) == SIZE - 1
    small = mapped(descriptor, 4096)
    assert collapse(small, 0) == 4096


def test_sealed_rows_get_theirs_while_they_are_served():
    spec = table("t@1", rows=2 * HUGE_PAGE // 32, optimizer=None)
    rows = SealedRows(spec, 0, spec.rows)
    content = CONTENT[: rows.nbytes]
    rows.write(0, content.tobytes())
    rows.seal()
    raw = rows.raw(0, spec.rows)
    deadline = time.monotonic() + 20
    while True:
        assert np.array_equal(raw.reshape(-1), content)
        if KERNEL < (6, 1) or huge_bytes(raw.ctypes.data) == rows.nbytes:
            break
        assert time.monotonic() < deadline
