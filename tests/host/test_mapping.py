"""Memory files mapped for reading: the bytes, when they go, and the huge pages under them."""

import ctypes
import os

import numpy as np
import pytest

from engrid.host.mapping import HUGE_PAGE, collapse, map_file, mapped, reserve, unmap
from tests.memory_maps import huge_bytes, mappings, needs_collapse

NAME = "engrid tested"
SIZE = 3 * HUGE_PAGE + 12_345
CONTENT = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)


@pytest.fixture
def descriptor():
    made = os.memfd_create(NAME)
    os.write(made, CONTENT.tobytes())
    yield made
    os.close(made)


def test_bytes_are_the_files_and_cannot_be_written(descriptor):
    view = mapped(descriptor, SIZE)
    assert np.array_equal(view, CONTENT)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    assert mapped(descriptor, 0).size == 0


def test_it_is_unmapped_with_its_last_view(descriptor):
    view = mapped(descriptor, SIZE)[HUGE_PAGE:]
    assert mappings(NAME) == 1
    assert np.array_equal(view, CONTENT[HUGE_PAGE:])
    del view
    assert mappings(NAME) == 0


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


@needs_collapse
def test_huge_pages_come_under_every_aligned_mapping_and_bytes_stay(descriptor):
    view = mapped(descriptor, SIZE)
    other = reserve(SIZE + HUGE_PAGE)
    try:
        map_file(other + HUGE_PAGE, SIZE, descriptor)
        done = 0
        while done < SIZE:
            done = collapse(view, done)
        assert huge_bytes(NAME) == 3 * HUGE_PAGE
        assert np.array_equal(view, CONTENT)
        again = np.ctypeslib.as_array((ctypes.c_uint8 * SIZE).from_address(other + HUGE_PAGE))
        assert np.array_equal(again, CONTENT)
        assert huge_bytes(NAME) == 6 * HUGE_PAGE
    finally:
        unmap(other, SIZE + HUGE_PAGE)


def test_where_there_are_no_huge_pages_it_stops_at_once(descriptor):
    view = np.empty(SIZE, np.uint8)  # of no file, and not aligned
    assert collapse(view[1:], 0) == SIZE - 1
    small = mapped(descriptor, 4096)
    assert collapse(small, 0) == 4096
