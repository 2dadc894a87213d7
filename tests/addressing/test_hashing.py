"""Row ids are the released implementation's, in one piece, in chunks, and one token at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engrid.addressing.hashing import NgramHasher, bucket_primes, multipliers, primes_above
from engrid.addressing.spec import PRESETS, EngramSpec
from engrid.model.kernels import reference
from tests.model.conftest import small_spec


def spec_of(case):
    return EngramSpec(
        layers=tuple(case["layer_ids"]),
        max_ngram=case["max_ngram"],
        heads=case["heads"],
        vocab_size=tuple(case["vocab_size"]),
        row_width=4,
        pad_token_id=case["pad_token_id"],
        seed=case["seed"],
    )


def test_golden_row_ids(vectors, deepseek):
    tokenizer, canonical = deepseek
    assert {case["max_ngram"] for case in vectors["cases"]} == {3, 4}
    for case in vectors["cases"]:
        spec = spec_of(case)
        hasher = NgramHasher(spec, canonical.size, int(canonical.of[spec.pad_token_id]))
        token_ids = np.array([tokenizer.encode(case["text"], add_special_tokens=False).ids])
        assert token_ids[0].tolist() == case["token_ids"]
        ids = canonical.map(token_ids)
        assert ids[0].tolist() == case["canonical_ids"]
        offsets = hasher.layers[case["layer"]].offsets.reshape(-1)
        rows = hasher.row_ids(ids, case["layer"])[0] - offsets
        assert rows.tolist() == case["rows_without_bucket_offset"], case["config"]


def test_golden_primes_and_multipliers(vectors):
    cases = {case["config"]: spec_of(case) for case in vectors["cases"]}
    for name, spec in cases.items():
        primes = bucket_primes(spec)
        for layer in spec.layers:
            assert primes[layer].tolist() == vectors["primes"][name][str(layer)]
            assert (
                multipliers(spec, layer, vectors["canonical_vocab_size"]).tolist()
                == vectors["multipliers"][name][str(layer)]
            )


def test_seed_example_is_1024_values_per_token():
    spec = PRESETS["paper"]
    assert spec.row_width * spec.heads * (spec.max_ngram - 1) == 1024
    assert spec.embed_width == 1024


def test_v41_tables_have_the_published_rows():
    primes = bucket_primes(PRESETS["v41"])
    assert [int(primes[layer].sum()) for layer in (1, 14)] == [384_006_168, 384_016_682]


@pytest.mark.parametrize("start", [0, 1, 2, 97, 16_383, 1_000_000])
def test_primes_are_all_the_primes(start):
    found = [prime for _, prime in zip(range(50), primes_above(start), strict=False)]
    expected, number = [], start + 1
    while len(expected) < 50:
        if number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1)):
            expected.append(number)
        number += 1
    assert found == expected


def naive_row(hasher, layer, history, order, head):
    """Straight from the text: history is newest first, already blocked and padded."""
    of = hasher.layers[layer]
    mix = 0
    for back in range(order):
        mix ^= int(history[back]) * int(of.multipliers[back])
    return int(of.offsets[order - 2, head]) + mix % int(of.primes[order - 2, head])


ids_with_dead = st.lists(st.integers(-1, 29), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(ids=ids_with_dead, max_ngram=st.integers(2, 5))
def test_rows_equal_the_definition_with_dead_tokens_anywhere(ids, max_ngram):
    spec = small_spec(max_ngram=max_ngram, vocab_size=tuple([50] * (max_ngram - 1)))
    hasher = NgramHasher(spec, 30, 3)
    for layer in spec.layers:
        rows = hasher.row_ids(np.array([ids]), layer)[0]
        for t, token in enumerate(ids):
            if token < 0:
                assert (rows[t] == -1).all()
                continue
            history, blocked = [], False
            for back in range(max_ngram):
                blocked = blocked or t - back < 0 or ids[t - back] < 0
                history.append(hasher.pad if blocked else ids[t - back])
            expected = [naive_row(hasher, layer, history, n, k) for n in spec.orders for k in range(spec.heads)]
            assert rows[t].tolist() == expected


@settings(max_examples=100, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), length=st.integers(1, 20))
def test_any_cutting_gives_the_same_rows(data, batch, length):
    hasher = NgramHasher(small_spec(), 30, 3)
    ids = np.array(data.draw(st.lists(st.integers(-1, 29), min_size=batch * length, max_size=batch * length)))
    ids = ids.reshape(batch, length)
    state, pieces, at = hasher.start(batch), {1: [], 2: []}, 0
    while at < length:
        step = data.draw(st.integers(1, length - at))
        lookups, state = hasher.lookups(ids[:, at : at + step], state)
        for layer, kept in pieces.items():
            rows = np.concatenate([lookup.row_ids for lookup in lookups if lookup.layer == layer], axis=1)
            kept.append(rows.reshape(batch, step, -1))
        at += step
    for layer, kept in pieces.items():
        assert np.array_equal(np.concatenate(kept, axis=1), hasher.row_ids(ids, layer))


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(0, 29), min_size=2, max_size=60))
def test_equal_keys_have_equal_rows_and_rows_stay_in_their_bucket(ids):
    hasher = NgramHasher(small_spec(), 30, 3)
    lookups, _ = hasher.lookups(np.array([ids]), hasher.start(1))
    for lookup in lookups:
        of = hasher.layers[lookup.layer]
        low = of.offsets[lookup.order - 2]
        assert ((lookup.row_ids >= low) & (lookup.row_ids < low + of.primes[lookup.order - 2])).all()
        for key in set(lookup.keys.tolist()):
            assert len(np.unique(lookup.row_ids[lookup.keys == key], axis=0)) == 1


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.integers(0, 99_091), min_size=1, max_size=40))
def test_torch_gives_the_same_integers(ids):
    hasher = NgramHasher(PRESETS["v41"], 99_092, 2)
    grams, _ = hasher._grams(np.array([ids]), hasher.start(1))
    for layer, of in hasher.layers.items():
        tensors = [torch.from_numpy(each) for each in (grams, of.multipliers, of.primes, of.offsets)]
        rows = reference.row_ids(*tensors)
        assert np.array_equal(rows.numpy(), hasher.row_ids(np.array([ids]), layer))


@pytest.mark.parametrize(
    ("ids", "state", "match"),
    [
        (np.zeros((1, 3), np.int32), None, "int64"),
        (np.zeros(3, np.int64), None, r"\[batch, tokens\]"),
        (np.full((1, 3), 30), None, "canonical id 30"),
        (np.zeros((1, 3), np.int64), np.zeros((1, 3), np.int64), "state"),
        (np.zeros((2, 3), np.int64), np.zeros((1, 2), np.int64), "state"),
    ],
)
def test_bad_input_is_named(ids, state, match):
    hasher = NgramHasher(small_spec(), 30, 3)
    with pytest.raises(ValueError, match=match):
        hasher.lookups(ids, hasher.start(len(ids)) if state is None else state)


def test_empty_batch_has_empty_lookups():
    hasher = NgramHasher(small_spec(), 30, 3)
    lookups, state = hasher.lookups(np.zeros((1, 0), np.int64), hasher.start(1))
    assert [lookup.row_ids.shape for lookup in lookups] == [(0, 2)] * 4
    assert np.array_equal(state, hasher.start(1))
