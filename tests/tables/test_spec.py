import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest

from engrid.tables import OptimizerSpec, RowFormat, TableSpec

ADAM = OptimizerSpec(kind="adam")
GOOD: dict[str, Any] = {
    "name": "engram.2",
    "rows": 30,
    "row_format": "float32",
    "width": 64,
    "seed": 0,
    "layer": 2,
    "init_std": 0.02,
    "optimizer": ADAM,
    "buckets": (13, 17),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "name is ''"),
        ({"name": "../x"}, "name is '../x'"),
        ({"rows": 0}, "rows is 0"),
        ({"rows": 3.0}, "rows is 3.0; give an integer"),
        ({"rows": True}, "rows is True; give an integer"),
        ({"row_format": "int8"}, "row_format is 'int8'; give one of float32, bfloat16, fp8_e4m3_ue8m0"),
        ({"width": 0}, "width is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"layer": 2**64}, "layer is"),
        ({"init_std": float("nan")}, "init_std is nan"),
        ({"init_std": float("inf")}, "init_std is inf"),
        ({"init_std": "0.02"}, "init_std is '0.02'; give a number"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; give an OptimizerSpec"),
        ({"buckets": (13, 16)}, "buckets add up to 29, but rows is 30"),
        ({"buckets": (30, 0)}, r"buckets\[1\] is 0"),
        ({"buckets": [13, 17]}, "give a tuple"),
        ({"row_format": "fp8_e4m3_ue8m0", "width": 64, "optimizer": None}, "width is 64; .* have 256 values"),
        ({"row_format": "fp8_e4m3_ue8m0", "width": 256}, "optimizer is given, .* give None"),
    ],
)
def test_a_bad_field_is_named_with_its_remedy(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableSpec(**GOOD | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "lion"}, "kind is 'lion'; give one of sgd, adagrad, adam"),
        ({"beta1": 1.0}, "beta1 is 1.0; give a number from 0.0 to below 1.0"),
        ({"beta2": -0.1}, "beta2 is -0.1"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"eps": 1e39}, r"eps is 1e\+39"),
    ],
)
def test_a_bad_optimizer_field_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerSpec(**{"kind": "adam"} | change)


@pytest.mark.parametrize(
    ("row_format", "width", "kind", "row_bytes", "state_bytes"),
    [
        ("float32", 64, None, 256, 0),
        ("float32", 64, "sgd", 256, 0),
        ("float32", 64, "adagrad", 256, 4),
        ("float32", 64, "adam", 256, 512),
        ("bfloat16", 64, None, 128, 0),
        ("bfloat16", 64, "sgd", 128, 256),
        ("bfloat16", 64, "adagrad", 128, 260),
        ("bfloat16", 64, "adam", 128, 768),
        ("fp8_e4m3_ue8m0", 256, None, 264, 0),
    ],
)
def test_bytes_of_a_row_and_its_state(
    row_format: RowFormat, width: int, kind: Any, row_bytes: int, state_bytes: int
) -> None:
    optimizer = None if kind is None else OptimizerSpec(kind=kind)
    spec = TableSpec(**GOOD | {"row_format": row_format, "width": width, "optimizer": optimizer})
    assert (spec.row_bytes, spec.state_bytes_per_row) == (row_bytes, state_bytes)


@pytest.mark.parametrize("change", [{}, {"optimizer": None, "buckets": ()}, {"seed": 2**64 - 1}])
def test_json_carries_every_field(change: dict[str, Any]) -> None:
    spec = TableSpec(**GOOD | change)
    text = json.dumps(spec.to_json())
    assert TableSpec.from_json(json.loads(text)) == spec
    assert json.loads(text).keys() == {field.name for field in dataclasses.fields(TableSpec)}


def test_json_with_unknown_or_missing_keys_is_refused() -> None:
    plain = TableSpec(**GOOD).to_json()
    with pytest.raises(ValueError, match=r"table has unknown keys \['heads'\]"):
        TableSpec.from_json(plain | {"heads": 8})
    with pytest.raises(ValueError, match=r"optimizer has unknown keys \['lr'\]"):
        TableSpec.from_json(plain | {"optimizer": ADAM.to_json() | {"lr": 1.0}})
    del plain["seed"]
    with pytest.raises(ValueError, match=r"table has missing keys \['seed'\]"):
        TableSpec.from_json(plain)
    with pytest.raises(ValueError, match="give a JSON object"):
        TableSpec.from_json([])  # type: ignore[arg-type]


def test_the_package_needs_numpy_alone() -> None:
    script = (
        "import sys, numpy; before = set(sys.modules); import engrid.tables;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names)),"
        " sorted(name for name in sys.modules if name.startswith('engrid.') and name.count('.') == 1))"
    )
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {script}"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['engrid', 'numpy'] ['engrid.tables']"
