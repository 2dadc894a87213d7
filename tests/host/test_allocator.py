"""The allocator keeps freed megabytes, so that the next are not faulted in anew."""

import subprocess
import sys

FAULTS = """
import resource, sys
import numpy as np
from engrid.host.allocator import keep_buffers
if sys.argv[1] == "keep":
    assert keep_buffers()
def pass_buffers(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        two = [np.ones(1 << 20, np.uint8) for _ in range(2)]
        del two
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
pass_buffers(10)
print(pass_buffers(100))
"""


def faults(mode):
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, timeout=60, check=True)
    return int(done.stdout)


def test_megabyte_buffers_are_not_faulted_in_again():
    kept, returned = faults("keep"), faults("leave")
    assert kept < 100
    assert returned > 10 * max(1, kept)
