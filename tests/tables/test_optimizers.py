"""The optimizers through RowTable, against torch.optim.SparseAdam and against formulas in float64."""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from engrid.tables import OptimizerSpec, RowFormat, RowTable, TableSpec, initial_rows, sum_duplicates

ROWS, WIDTH = 5000, 48


def table_spec(row_format: RowFormat = "float32", **optimizer: Any) -> TableSpec:
    return TableSpec(
        name="t",
        rows=ROWS,
        row_format=row_format,
        width=WIDTH,
        seed=1,
        layer=0,
        init_std=0.02,
        optimizer=OptimizerSpec(**optimizer),
    )


def batch(rng: np.random.Generator, count: int = 4000) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Ids with duplicates, and gradients whose sizes differ by rows."""
    ids = (rng.zipf(1.3, count) % ROWS).astype(np.int64)
    grads = rng.standard_normal((count, WIDTH)) * 10.0 ** rng.uniform(-4, 1, (count, 1))
    return ids, grads.astype(np.float32)


def values(table: RowTable) -> npt.NDArray[np.float32]:
    return table.raw(0, ROWS).view(np.float32)


@pytest.mark.parametrize("options", [{}, {"beta1": 0.5, "beta2": 0.9, "eps": 1e-3}])
def test_adam_is_torch_sparse_adam(options: dict[str, Any]) -> None:
    """50 steps, some without gradients: the bias correction follows the step given, not a count of pushes."""
    rng = np.random.default_rng(0)
    spec = table_spec(kind="adam", **options)
    table = RowTable(spec)
    weights = torch.nn.Parameter(torch.from_numpy(initial_rows(spec, 0, ROWS)))
    assert spec.optimizer is not None
    betas = (spec.optimizer.beta1, spec.optimizer.beta2)
    theirs = torch.optim.SparseAdam([weights], lr=1.0, betas=betas, eps=spec.optimizer.eps)
    for step in range(1, 51):
        ids, grads = batch(rng, 0 if step % 7 == 3 else 4000)
        learning_rate = 0.02 / step**0.5
        theirs.param_groups[0]["lr"] = learning_rate
        weights.grad = torch.sparse_coo_tensor(
            torch.from_numpy(ids)[None], torch.from_numpy(grads), (ROWS, WIDTH), check_invariants=False
        )
        theirs.step()  # type: ignore[no-untyped-call]
        if len(ids):
            table.apply(*sum_duplicates(ids, grads), step=step, learning_rate=learning_rate)
    expected = weights.detach().numpy()
    assert abs(expected - initial_rows(spec, 0, ROWS)).max() > 0.1
    assert abs(values(table) - expected).max() < 1e-5
    for name in ("exp_avg", "exp_avg_sq"):
        np.testing.assert_allclose(
            table.state_arrays()[name], theirs.state[weights][name].numpy(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["sgd", "adagrad"])
def test_sgd_and_row_wise_adagrad_follow_their_formulas(kind: Any) -> None:
    rng = np.random.default_rng(1)
    spec = table_spec(kind=kind)
    table = RowTable(spec)
    expected = initial_rows(spec, 0, ROWS).astype(np.float64)
    sums = np.zeros(ROWS)
    for step in range(1, 21):
        ids, grads = sum_duplicates(*batch(rng))
        table.apply(ids, grads, step=step, learning_rate=0.01)
        wide = grads.astype(np.float64)
        if kind == "adagrad":
            sums[ids] += (wide**2).mean(axis=1)
            wide /= np.sqrt(sums[ids])[:, None] + 1e-8
        expected[ids] -= 0.01 * wide
    np.testing.assert_allclose(values(table), expected, rtol=1e-5, atol=1e-5)
    if kind == "adagrad":
        np.testing.assert_allclose(table.state_arrays()["sum"], sums, rtol=1e-5)


def test_a_row_whose_gradient_is_zero_stays_where_it_is() -> None:
    for kind in ("sgd", "adagrad", "adam"):
        table = RowTable(table_spec(kind=kind))
        before = table.raw(0, ROWS).copy()
        table.apply(np.arange(9), np.zeros((9, WIDTH), np.float32), step=1, learning_rate=0.1)
        np.testing.assert_array_equal(table.raw(0, ROWS), before)


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("row_format", ["float32", "bfloat16"])
def test_partitions_compute_the_bits_of_the_whole_table(kind: Any, row_format: RowFormat) -> None:
    rng = np.random.default_rng(2)
    spec = table_spec(row_format, kind=kind)
    whole = RowTable(spec)
    edges = [0, 1, 1700, 1703, ROWS]
    parts = [RowTable(spec, start, stop) for start, stop in itertools.pairwise(edges)]
    for step in range(1, 6):
        ids, grads = sum_duplicates(*batch(rng))
        whole.apply(ids, grads, step=step, learning_rate=0.05)
        for part in parts:
            here = slice(*np.searchsorted(ids, [part.start, part.stop]))
            part.apply(ids[here] - part.start, grads[here], step=step, learning_rate=0.05)
    np.testing.assert_array_equal(np.concatenate([part.raw(0, len(part)) for part in parts]), whole.raw(0, ROWS))
    for name, state in whole.state_arrays().items():
        np.testing.assert_array_equal(np.concatenate([part.state_arrays()[name] for part in parts]), state)


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "adam"])
def test_bfloat16_rows_are_rounded_float32_master_rows(kind: Any) -> None:
    """Updates too small for bfloat16 add up in the master rows."""
    rng = np.random.default_rng(3)
    rounded, exact = RowTable(table_spec("bfloat16", kind=kind)), RowTable(table_spec("float32", kind=kind))
    before = rounded.raw(0, ROWS).copy()
    for step in range(1, 31):
        ids, grads = sum_duplicates(*batch(rng))
        for table in (rounded, exact):
            table.apply(ids, grads, step=step, learning_rate=1e-5)
    assert (rounded.raw(0, ROWS) != before).any()
    np.testing.assert_array_equal(rounded.state_arrays()["master"], values(exact))
    theirs = torch.from_numpy(values(exact).copy()).bfloat16().view(torch.uint8).numpy()
    np.testing.assert_array_equal(rounded.raw(0, ROWS), theirs)
