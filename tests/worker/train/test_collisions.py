"""Collisions counted one n-gram against all others, by the definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engrid.addressing.hashing import NgramHasher
from engrid.worker.train.collisions import count_collisions, windows
from tests.model.conftest import small_spec


def by_definition(ngrams, row_ids):
    """(distinct n-grams, one_head, all_heads, same_in_all) as plain loops over pairs."""
    rows = {tuple(ngram): tuple(ids) for ngram, ids in zip(ngrams.tolist(), row_ids.tolist(), strict=True)}
    if not rows:
        return 0, 0.0, 0.0, 0.0
    heads = range(row_ids.shape[1])
    one, every, same = [], [], []
    for ngram, mine in rows.items():
        others = [theirs for other, theirs in rows.items() if other != ngram]
        shared = [any(theirs[head] == mine[head] for theirs in others) for head in heads]
        one.append(sum(shared) / len(heads))
        every.append(all(shared))
        same.append(mine in others)
    return len(rows), sum(one) / len(rows), sum(every) / len(rows), sum(same) / len(rows)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), order=st.integers(2, 4), heads=st.integers(1, 4), buckets=st.integers(1, 12))
def test_counts_are_those_of_the_definition(data, order, heads, buckets):
    tokens = data.draw(st.lists(st.integers(-1, 4) | st.just(2**62), min_size=1, max_size=40))
    ngrams = windows(np.array(tokens, np.int64), order, pad=0)
    assert ngrams.shape == (len(tokens), order)
    rows = {}
    for ngram in map(tuple, ngrams.tolist()):
        if ngram not in rows:
            rows[ngram] = [buckets * head + data.draw(st.integers(0, buckets - 1)) for head in range(heads)]
    row_ids = np.array([rows[tuple(ngram)] for ngram in ngrams.tolist()], np.int64).reshape(len(tokens), heads)
    found = count_collisions(order, ngrams, row_ids)
    distinct, one, every, same = by_definition(ngrams, row_ids)
    assert (found.order, found.ngrams) == (order, distinct)
    assert (found.one_head, found.all_heads, found.same_in_all) == pytest.approx((one, every, same))
    assert found.same_in_all <= found.all_heads <= found.one_head <= 1


def test_no_text_has_no_collisions():
    found = count_collisions(2, np.empty((0, 2), np.int64), np.empty((0, 3), np.int64))
    assert (found.ngrams, found.one_head, found.all_heads, found.same_in_all) == (0, 0, 0, 0)


def test_all_heads_taken_is_not_the_same_as_one_other_ngram():
    ngrams = np.array([[1, 1], [2, 2], [3, 3]])
    row_ids = np.array([[0, 10], [0, 11], [1, 10]])
    found = count_collisions(2, ngrams, row_ids)
    assert found.one_head == pytest.approx(4 / 6)
    assert found.all_heads == pytest.approx(1 / 3)
    assert found.same_in_all == 0


@pytest.mark.parametrize("order", [2, 3])
def test_of_a_hashed_text_they_are_those_of_the_definition(order):
    hasher = NgramHasher(small_spec(), 40, 7)
    text = np.random.default_rng(0).integers(0, 40, 120)
    lookups, _ = hasher.lookups(text[None], hasher.start(1))
    lookup = next(each for each in lookups if each.order == order)
    ngrams = windows(text, order, hasher.pad)
    assert ngrams[0].tolist() == [7] * (order - 1) + [text[0]]
    assert ngrams[-1].tolist() == text[-order:].tolist()
    found = count_collisions(order, ngrams, lookup.row_ids)
    assert (found.ngrams, found.one_head, found.all_heads, found.same_in_all) == pytest.approx(
        by_definition(ngrams, lookup.row_ids)
    )
    assert 0 < found.all_heads < found.one_head
