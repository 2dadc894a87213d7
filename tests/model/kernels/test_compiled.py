"""The kernels compile for sm_80 and sm_90 where there is no GPU, and spill nothing; docs/kernels.md says what the script says."""

import json
from pathlib import Path

import pytest

from tests.model.kernels.processes import python

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    report, cache = folder / "kernels.json", str(folder / "cache")
    printed = python(ROOT / "benchmarks" / "kernels.py", "--json", report, TRITON_CACHE_DIR=cache)
    return printed, json.loads(report.read_text())["kernels"]


def test_all_compile_for_both_targets_and_nothing_spills(script):
    _, kernels = script
    assert {(each["kernel"].split(",")[0], each["target"]) for each in kernels} == {
        (kernel, target) for kernel in ("hash", "dequant", "gate") for target in ("sm_80", "sm_90")
    }
    assert [each for each in kernels if each["spills"] or each["stack"]] == []
    assert all(each["cubin"] > 1000 for each in kernels)


def test_no_arithmetic_flushes_subnormals(script):
    """Scale byte 0 is one, and so are the products it makes."""
    _, kernels = script
    assert [each for each in kernels if each["flushes"]] == []


def test_the_documented_table_is_the_script_s(script):
    printed, _ = script
    assert printed.strip() in (ROOT / "docs" / "kernels.md").read_text()
