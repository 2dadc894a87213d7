"""The kernels in Triton's interpreter equal the reference: interpreted/check_*.py, in a process of their own.

`@triton.jit` settles on interpreter or compiler when it decorates, by TRITON_INTERPRET; set here, it would change the
other tests of this process.
"""

from pathlib import Path

from tests.model.kernels.processes import python

CHECKS = sorted((Path(__file__).parent / "interpreted").glob("check_*.py"))


def test_interpreted():
    assert [check.name for check in CHECKS] == ["check_dequant.py", "check_gate.py", "check_hash.py"]
    printed = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *CHECKS, TRITON_INTERPRET="1")
    assert " passed" in printed
    assert "skipped" not in printed
