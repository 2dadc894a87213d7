import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from engrid.tables import sum_duplicates


def reference(row_ids: npt.NDArray[np.int64], grads: npt.NDArray[np.float32]) -> tuple[object, npt.NDArray[np.float64]]:
    alive = row_ids >= 0
    unique, place = np.unique(row_ids[alive], return_inverse=True)
    sums = np.zeros((len(unique), grads.shape[1]))
    np.add.at(sums, place, grads[alive].astype(np.float64))
    return unique, sums


@st.composite
def batches(draw: st.DrawFn) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    count, width = draw(st.integers(0, 300)), draw(st.integers(1, 5))
    largest = draw(st.sampled_from([0, 3, 50, 10**6, 2**40, 2**55, 2**62]))
    ids = draw(arrays(np.int64, count, elements=st.integers(-1, largest)))
    grads = draw(arrays(np.float32, (count, width), elements=st.integers(-1000, 1000)))
    return ids, grads


@settings(max_examples=150, deadline=None)
@given(batches())
def test_integer_sums_are_exact(batch: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]) -> None:
    row_ids, grads = batch
    unique, sums = sum_duplicates(row_ids, grads)
    expected_ids, expected = reference(row_ids, grads)
    np.testing.assert_array_equal(unique, expected_ids)
    np.testing.assert_array_equal(sums, expected)
    assert unique.dtype == np.int64
    assert sums.dtype == np.float32


@pytest.mark.parametrize("kind", ["zipf", "few", "unique", "one", "dead", "huge"])
def test_large_batches_of_every_shape(kind: str) -> None:
    rng = np.random.default_rng(5)
    row_ids = {
        "zipf": rng.zipf(1.2, 9000) % 100_000 - 1,
        "few": rng.integers(-1, 700, 9000),
        "unique": rng.permutation(9000),
        "one": np.zeros(9000, np.int64),
        "dead": np.full(9000, -1),
        "huge": rng.integers(0, 300, 9000) + 2**62,
    }[kind].astype(np.int64)
    grads = rng.integers(-50, 51, (9000, 8)).astype(np.float32)
    unique, sums = sum_duplicates(row_ids, grads)
    expected_ids, expected = reference(row_ids, grads)
    np.testing.assert_array_equal(unique, expected_ids)
    np.testing.assert_array_equal(sums, expected)


def test_real_gradients_are_summed_to_float32_precision_and_the_same_every_time() -> None:
    rng = np.random.default_rng(6)
    row_ids, grads = rng.integers(-1, 1500, 20_000), rng.standard_normal((20_000, 32)).astype(np.float32)
    unique, sums = sum_duplicates(row_ids, grads)
    np.testing.assert_allclose(sums, reference(row_ids, grads)[1], rtol=1e-5, atol=2e-5)
    again = sum_duplicates(row_ids.copy(), np.asfortranarray(grads))
    np.testing.assert_array_equal(again[0], unique)
    np.testing.assert_array_equal(again[1].view(np.uint32), sums.view(np.uint32))


def test_inputs_are_left_as_they_were() -> None:
    row_ids, grads = np.array([5, 5, -1]), np.ones((3, 2), np.float32)
    sum_duplicates(row_ids, grads)
    np.testing.assert_array_equal(row_ids, [5, 5, -1])
    assert (grads == 1).all()


@pytest.mark.parametrize(
    ("row_ids", "grads", "message"),
    [
        (np.array([1, -2]), np.zeros((2, 4), np.float32), "row_ids holds -2"),
        (np.array([1, -(2**62)]), np.zeros((2, 4), np.float32), "row_ids holds -4611686018427387904"),
        (np.array([1, 2], np.int32), np.zeros((2, 4), np.float32), "row_ids is int32"),
        (np.array([[1, 2]]), np.zeros((2, 4), np.float32), "row_ids is int64 .1, 2."),
        (np.array([1, 2]), np.zeros((3, 4), np.float32), r"give float32 \[2, width\]"),
        (np.array([1, 2]), np.zeros((2, 4)), "grads is float64"),
        (np.array([1, 2]), np.zeros((2, 0), np.float32), "grads is float32"),
    ],
)
def test_bad_arrays_are_refused(row_ids: npt.NDArray[np.int64], grads: npt.NDArray[np.float32], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sum_duplicates(row_ids, grads)
