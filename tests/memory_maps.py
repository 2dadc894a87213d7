"""What this process has mapped, as the kernel tells."""

import platform
import re

import pytest

KERNEL = tuple(map(int, re.match(r"(\d+)\.(\d+)", platform.release()).groups()))
needs_collapse = pytest.mark.skipif(KERNEL < (6, 1), reason="Linux before 6.1 makes no huge pages of a memory file")


def mappings(name):
    """How many mappings there are of the memory file of that name."""
    with open("/proc/self/maps", encoding="utf-8") as maps:  # noqa: PTH123 - no file
        return sum(f"memfd:{name} " in line for line in maps)


def huge_bytes(name):
    """Bytes of them that are backed by huge pages."""
    found, ours = 0, False
    with open("/proc/self/smaps", encoding="utf-8") as maps:  # noqa: PTH123 - no file
        for line in maps:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                ours = f"memfd:{name} " in line
            elif ours and line.startswith("ShmemPmdMapped:"):
                found += int(line.split()[1]) << 10
    return found
