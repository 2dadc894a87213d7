"""What would leave NaN or infinity in rows or state is refused before anything is written, and nothing else is."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engrid.model.rows import InProcessTables
from engrid.tables import NonFiniteGradientError, OptimizerSpec, RowTable, TableSpec, check_learning_rate, magnitude
from engrid.tables.finite import SAFE

KINDS, FORMATS = ["sgd", "adagrad", "adam"], ["float32", "bfloat16"]


def table(kind="adam", row_format="float32", init_std=0.02, **optimizer):
    return RowTable(
        TableSpec(
            name="t",
            rows=6,
            row_format=row_format,
            width=4,
            seed=1,
            layer=0,
            init_std=init_std,
            optimizer=OptimizerSpec(kind=kind, **optimizer),
        )
    )


def held(rows):
    return {name: array.tobytes() for name, array in rows.arrays().items()}


def push(rows, value, *, step=1, rate=1.0, ids=(1, 4)):
    rows.apply(np.array(ids, np.int64), np.full((len(ids), 4), value, np.float32), step, rate)


def refuses(rows, value, row=1, **options):
    before = held(rows)
    with pytest.raises(NonFiniteGradientError, match=f"row {row} .*nothing was applied"):
        push(rows, value, **options)
    assert held(rows) == before


@pytest.mark.parametrize(
    "rate", [math.nan, math.inf, -math.inf, -1e-9, 1e39, 1e300, True, "0.1", None, np.float16(np.inf), np.bool_(1)]
)
def test_learning_rate_is_a_number_that_float32_holds(rate):
    with pytest.raises(ValueError, match="learning rate is"):
        check_learning_rate(rate)
    rows = table()
    before = held(rows)
    with pytest.raises(ValueError, match="learning rate is"):
        push(rows, 1.0, rate=rate)
    assert held(rows) == before


@pytest.mark.parametrize("rate", [0, 0.0, 1e-50, np.float16(0.1), np.float32(0.1), float(np.finfo(np.float32).max)])
def test_learning_rate_may_be_zero_and_large(rate):
    check_learning_rate(rate)


def test_adam_refuses_a_gradient_whose_square_overflows():
    rows = table("adam")
    push(rows, 1e18)
    refuses(rows, 1e20, step=2)
    push(rows, 1.0, step=2)


@pytest.mark.parametrize("row_format", FORMATS)
def test_sgd_refuses_the_step_in_which_the_sum_overflows(row_format):
    rows = table("sgd", row_format)
    push(rows, -1e38)
    push(rows, -1e38, step=2)
    push(rows, -1e38, step=3)
    refuses(rows, -1e38, step=4)
    push(rows, 1e38, step=4)


def test_a_bfloat16_row_that_rounds_to_infinity_is_refused():
    """float32 holds 3.4e38, the largest bfloat16 is 3.39e38."""
    push(table("sgd", init_std=0.0), -3.4e38)
    refuses(table("sgd", "bfloat16", init_std=0.0), -3.4e38)


def test_adagrad_refuses_squares_that_overflow():
    rows = table("adagrad")
    push(rows, 5e18)
    refuses(rows, 3e19, step=2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_not_finite_is_refused(kind):
    for value in (math.nan, math.inf):
        refuses(table(kind), value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row_format", FORMATS)
def test_rows_that_came_as_nan_are_named_when_they_are_pushed_to_and_others_go_on(kind, row_format):
    """What is loaded is taken as it is, bit for bit."""
    rows = table(kind, row_format)
    raw = np.ascontiguousarray(rows.raw(0, 6)).copy()
    raw[3] = 0xFF
    rows.load(0, raw)
    refuses(rows, 1.0, row=3, ids=(2, 3))
    push(rows, 1.0, ids=(2, 4))


@pytest.mark.parametrize("name", ["rows", "exp_avg", "exp_avg_sq"])
def test_state_written_from_outside_is_measured(name):
    rows = table("adam")
    rows.arrays()[name].view(np.float32)[2, 1] = -1e19 if name == "exp_avg_sq" else 3e38
    rows.measure()
    push(rows, 1.0, ids=(1, 4))
    refuses(rows, -1.0, row=2, ids=(2,), rate=1e38)


def test_table_left_unfilled_is_never_taken_for_small():
    rows = RowTable(replace(table("sgd").spec), filled=False)
    rows.arrays()["rows"].view(np.float32)[:] = -3e38
    refuses(rows, 1e38)


def test_tables_of_a_step_are_all_asked_before_one_is_changed():
    fine, bad = table("adam"), table("adam")
    before = held(fine)
    ids, small, large = np.array([1]), np.ones((1, 4), np.float32), np.full((1, 4), 1e20, np.float32)
    source = InProcessTables({1: fine, 2: bad})
    with pytest.raises(NonFiniteGradientError):
        source.push({1: (ids, small), 2: (ids, large)}, step=1, learning_rate=0.1)
    with pytest.raises(ValueError, match="no table for layers"):
        source.push({1: (ids, small), 3: (ids, small)}, step=1, learning_rate=0.1)
    assert held(fine) == before


@pytest.mark.parametrize("values", [[1.0, -7.5], [0.0], [1e-40], [-3e38, 1.0], [2e19] * 100, []])
def test_magnitude_is_a_bound(values):
    array = np.array(values, np.float32)
    assert np.abs(array).max(initial=0.0) <= magnitude(array) < math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("other", [0.0, 1e38])
def test_magnitude_shows_what_is_not_finite(bad, other):
    assert not math.isfinite(magnitude(np.array([other, bad, -other], np.float32)))


def test_ordinary_steps_are_decided_by_scalars(monkeypatch):
    """A look at every result would cost as much as the update itself."""
    monkeypatch.setattr(RowTable, "try_update", None)
    rng = np.random.default_rng(0)
    for kind in KINDS:
        rows = table(kind, eps=1e-10)
        for step in range(1, 400):
            ids = np.flatnonzero(rng.random(6) < 0.5)
            rows.apply(ids, (1000 * rng.standard_normal((len(ids), 4))).astype(np.float32), step, 0.1)


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    row_format=st.sampled_from(FORMATS),
    eps=st.sampled_from([1e-30, 1e-8, 1.0]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.0), (0.5, 0.999999)]),
    pushes=st.lists(
        st.tuples(
            st.lists(numbers, min_size=8, max_size=8),
            st.sampled_from([0.0, 1e-3, 1.0, 1e20, 3e38]),
            st.integers(1, 1 << 48),
        ),
        max_size=6,
    ),
)
def test_an_update_is_refused_exactly_when_it_would_leave_nan_or_infinity(kind, row_format, eps, betas, pushes):
    rows = table(kind, row_format, eps=eps, beta1=betas[0], beta2=betas[1])
    free = table(kind, row_format, eps=eps, beta1=betas[0], beta2=betas[1])
    for values, rate, step in pushes:
        grads, ids = np.array(values, np.float32).reshape(2, 4), np.array([0, 5])
        before = held(rows)
        for name, array in free.arrays().items():
            array[...] = np.frombuffer(before[name], array.dtype).reshape(array.shape)
        with np.errstate(all="ignore"):
            free.apply(ids, grads, step, rate, SAFE)
        floats = [array.view(np.float32) for name, array in free.arrays().items() if name != "rows"]
        served = free.raw(0, 6).view(np.float32 if row_format == "float32" else np.uint16)
        fine = all(np.isfinite(array).all() for array in floats) and (
            np.isfinite(served).all() if row_format == "float32" else ((served & 0x7F80) != 0x7F80).all()
        )
        if fine:
            rows.apply(ids, grads, step, rate)
            assert held(rows) == held(free)
        else:
            with pytest.raises(NonFiniteGradientError):
                rows.apply(ids, grads, step, rate)
            assert held(rows) == before
