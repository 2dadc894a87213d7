from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engrid.tables import (
    OptimizerSpec,
    ReadOnlyTableError,
    RowFormat,
    RowOutOfRangeError,
    RowTable,
    TableSpec,
    encode_rows,
    initial_rows,
)

ADAM = OptimizerSpec(kind="adam")
FORMATS: list[tuple[RowFormat, int]] = [("float32", 64), ("bfloat16", 20), ("bfloat16", 3), ("fp8_e4m3_ue8m0", 256)]


def table_spec(row_format: RowFormat = "float32", width: int = 64, **changes: Any) -> TableSpec:
    optimizer = None if row_format == "fp8_e4m3_ue8m0" else ADAM
    fields = {"rows": 4000, "seed": 3, "layer": 1, "init_std": 0.02, "optimizer": optimizer} | changes
    return TableSpec(name="engram.1", row_format=row_format, width=width, **fields)


@pytest.mark.parametrize(("row_format", "width"), FORMATS)
def test_gather_copies_the_encoded_initial_rows(row_format: RowFormat, width: int) -> None:
    spec = table_spec(row_format, width)
    table = RowTable(spec, 1000, 3500)
    ids = np.random.default_rng(0).integers(0, 2500, 7000)
    out = np.zeros((7000, spec.row_bytes), np.uint8)
    table.gather(ids, out)
    np.testing.assert_array_equal(out, encode_rows(initial_rows(spec, 1000, 3500), row_format)[ids])
    table.gather(ids[:0], out[:0])


@pytest.mark.parametrize("bad", [-1, 2500, -(2**63), 2**63 - 1])
def test_a_row_outside_the_range_is_an_error_and_nothing_is_written(bad: int) -> None:
    table = RowTable(table_spec(), 1000, 3500)
    out = np.zeros((3, 256), np.uint8)
    before = table.raw(0, 2500).copy()
    with pytest.raises(RowOutOfRangeError, match=rf"row {1000 + bad} of table engram.1 is outside rows 1000\.\.3499"):
        table.gather(np.array([4, bad, 5]), out)
    assert not out.any()
    with pytest.raises(RowOutOfRangeError, match=rf"row {1000 + bad} of table"):
        table.apply(np.sort(np.array([4, bad])), np.ones((2, 64), np.float32), step=1, learning_rate=1.0)
    np.testing.assert_array_equal(table.raw(0, 2500), before)
    assert issubclass(RowOutOfRangeError, IndexError)


@pytest.mark.parametrize(
    ("ids", "out", "message"),
    [
        (np.zeros(2, np.int32), np.zeros((2, 256), np.uint8), "local_ids is int32"),
        (np.zeros((2, 1), np.int64), np.zeros((2, 256), np.uint8), "local_ids is int64 .2, 1."),
        (np.zeros(2, np.int64), np.zeros((2, 255), np.uint8), r"give C-contiguous uint8 \[2, 256\]"),
        (np.zeros(2, np.int64), np.zeros((2, 64), np.float32), "out is float32"),
        (np.zeros(2, np.int64), np.zeros((2, 512), np.uint8)[:, ::2], "C-contiguous"),
    ],
)
def test_gather_refuses_arrays_of_another_kind(ids: Any, out: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowTable(table_spec()).gather(ids, out)


@pytest.mark.parametrize(
    ("ids", "grads", "step", "message"),
    [
        ([3, 3], np.zeros((2, 64), np.float32), 1, "not rising and distinct"),
        ([4, 3], np.zeros((2, 64), np.float32), 1, "not rising and distinct"),
        ([3, 4], np.zeros((2, 63), np.float32), 1, r"give float32 \[2, 64\]"),
        ([3, 4], np.zeros((2, 64)), 1, "grads is float64"),
        ([3, 4], np.zeros((2, 64), np.float32), 0, "step is 0"),
    ],
)
def test_apply_refuses_what_it_cannot_apply_whole(ids: list[int], grads: Any, step: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowTable(table_spec()).apply(np.array(ids), grads, step=step, learning_rate=0.1)


@pytest.mark.parametrize(("row_format", "width"), FORMATS)
def test_a_table_without_optimizer_refuses_gradients(row_format: RowFormat, width: int) -> None:
    table = RowTable(table_spec(row_format, width, optimizer=None))
    with pytest.raises(ReadOnlyTableError, match=r"table engram\.1 has no optimizer"):
        table.apply(np.array([1]), np.ones((1, width), np.float32), step=1, learning_rate=0.1)


@pytest.mark.parametrize(("row_format", "width"), FORMATS)
def test_exported_rows_load_into_another_range(row_format: RowFormat, width: int) -> None:
    spec = table_spec(row_format, width)
    source, target = RowTable(spec, 0, 2000), RowTable(spec, 1000, 4000)
    raw = source.raw(500, 1500)
    assert not raw.flags.writeable
    target.load(250, raw)
    np.testing.assert_array_equal(target.raw(250, 1250), raw)
    np.testing.assert_array_equal(target.raw(1250, 3000), encode_rows(initial_rows(spec, 2250, 4000), row_format))
    for start, stop in ((-1, 5), (0, 2001), (5, 4)):
        with pytest.raises(RowOutOfRangeError, match=r"are not all in rows 0\.\.1999"):
            source.raw(start, stop)
    with pytest.raises(RowOutOfRangeError, match=r"rows 1000\.\.2999 of table engram\.1"):
        source.load(1000, np.zeros((2000, spec.row_bytes), np.uint8))
    with pytest.raises(ValueError, match="give uint8"):
        source.load(0, np.zeros((2, spec.row_bytes - 1), np.uint8))


@pytest.mark.parametrize("row_format", ["float32", "bfloat16"])
def test_rows_and_state_restored_elsewhere_go_on_with_the_same_bits(row_format: RowFormat) -> None:
    rng = np.random.default_rng(1)
    spec = table_spec(row_format)
    ids, grads = np.arange(0, 4000, 3), rng.standard_normal((1334, 64)).astype(np.float32)
    first, second = RowTable(spec), RowTable(spec)
    first.apply(ids, grads, step=1, learning_rate=0.01)
    second.load(0, first.raw(0, 4000))
    for name, array in first.state_arrays().items():
        second.state_arrays()[name][...] = array
    for table in (first, second):
        table.apply(ids, grads, step=2, learning_rate=0.01)
    np.testing.assert_array_equal(second.raw(0, 4000), first.raw(0, 4000))


@pytest.mark.parametrize("row_format", ["float32", "bfloat16"])
def test_loaded_rows_begin_with_fresh_state(row_format: RowFormat) -> None:
    spec = table_spec(row_format)
    trained, fresh = RowTable(spec), RowTable(spec)
    ids, grads = np.arange(4000), np.ones((4000, 64), np.float32)
    trained.apply(ids, grads, step=1, learning_rate=0.01)
    raw = encode_rows(np.full((4000, 64), 0.5, np.float32), row_format)
    for table in (trained, fresh):
        table.load(0, raw)
        table.apply(ids, grads, step=1, learning_rate=0.01)
    np.testing.assert_array_equal(trained.raw(0, 4000), fresh.raw(0, 4000))


@pytest.mark.parametrize(("row_format", "width"), FORMATS)
def test_nbytes_is_what_the_spec_promises(row_format: RowFormat, width: int) -> None:
    spec = table_spec(row_format, width)
    table = RowTable(spec, 10, 110)
    assert len(table) == 100
    assert table.nbytes == 100 * (spec.row_bytes + spec.state_bytes_per_row)


@pytest.mark.parametrize(("start", "stop"), [(5, 5), (-1, 5), (0, 4001)])
def test_a_range_outside_the_table_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=r"give one within 0\.\.4000"):
        RowTable(table_spec(), start, stop)


def test_raw_is_a_live_view() -> None:
    table = RowTable(table_spec())
    view: npt.NDArray[np.uint8] = table.raw(7, 9)
    table.apply(np.array([7]), np.ones((1, 64), np.float32), step=1, learning_rate=0.5)
    out = np.empty((1, 256), np.uint8)
    table.gather(np.array([7]), out)
    np.testing.assert_array_equal(view[:1], out)
