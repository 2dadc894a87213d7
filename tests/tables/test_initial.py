import hashlib
import itertools
import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engrid.tables import TableSpec, initial_rows


def spec(*, width: int = 64, seed: int = 7, layer: int = 2, init_std: float = 0.02) -> TableSpec:
    return TableSpec(
        name="t",
        rows=10_000_000,
        row_format="float32",
        width=width,
        seed=seed,
        layer=layer,
        init_std=init_std,
        optimizer=None,
    )


@settings(max_examples=60, deadline=None)
@given(
    width=st.sampled_from([1, 7, 8, 9, 64, 80, 256]),
    first=st.integers(0, 9_000_000),
    cuts=st.lists(st.integers(0, 3000), max_size=6),
)
def test_any_partitioning_gives_the_same_rows(width: int, first: int, cuts: list[int]) -> None:
    whole = initial_rows(spec(width=width), first, first + 3000)
    edges = [0, *sorted(cuts), 3000]
    parts = [initial_rows(spec(width=width), first + start, first + stop) for start, stop in itertools.pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_values_come_from_the_philox_stream_at_the_counter_of_their_row() -> None:
    width, row, a = 20, 12_345, np.float32(0.02 * math.sqrt(3))
    words = np.random.Philox(key=np.array([7, 2], np.uint64), counter=row * 3).random_raw(12)
    halves = [half for word in words.tolist() for half in (word & 0xFFFFFFFF, word >> 32)]
    signed = [(half if half < 2**31 else half - 2**32) >> 8 for half in halves]
    expected = [np.float32(float(Fraction(float(a)) * value / 2**23)) for value in signed[:width]]
    np.testing.assert_array_equal(initial_rows(spec(width=width), row, row + 1)[0], expected)


def test_the_bits_never_change() -> None:
    digest = hashlib.sha256(initial_rows(spec(), 1_000_000, 1_000_100).astype("<f4").tobytes()).hexdigest()
    assert digest[:16] == "72c3d7720631c058"


def test_values_are_uniform_with_the_standard_deviation_asked_for() -> None:
    rows = initial_rows(spec(init_std=0.5), 0, 20_000)
    bound = 0.5 * math.sqrt(3)
    assert -bound <= rows.min() < -0.9999 * bound
    assert 0.9999 * bound < rows.max() < bound
    assert abs(rows.mean()) < 5 * 0.5 / math.sqrt(rows.size)
    assert rows.std() == pytest.approx(0.5, rel=2e-3)
    counts, _ = np.histogram(rows, bins=64, range=(-bound, bound))
    assert abs(counts / rows.size * 64 - 1).max() < 0.05


def test_seeds_layers_and_rows_are_uncorrelated() -> None:
    base = initial_rows(spec(), 0, 2000)
    for other in (
        initial_rows(spec(seed=8), 0, 2000),
        initial_rows(spec(layer=3), 0, 2000),
        initial_rows(spec(seed=2, layer=7), 0, 2000),
        initial_rows(spec(), 1, 2001),
    ):
        assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 0.015


def test_memory_beside_the_result_is_bounded() -> None:
    table = spec()
    initial_rows(table, 0, 10)
    tracemalloc.start()
    rows = initial_rows(table, 0, 200_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - rows.nbytes < 4 << 20


def test_no_rows_and_zero_deviation() -> None:
    assert initial_rows(spec(), 5, 5).shape == (0, 64)
    assert not initial_rows(spec(init_std=0.0), 0, 9).any()
