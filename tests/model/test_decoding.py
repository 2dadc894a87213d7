"""Reading ahead and forgetting: the rows of the next chunk are under way, and what is taken back leaves no trace."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engrid.model.generate import Decoder, generate
from tests.model.conftest import small_config, small_spec
from tests.model.decoding import exact, watched
from tests.model.test_transformer import make


def test_next_chunks_rows_are_asked_for_before_a_chunk_is_computed_and_no_more():
    model, memory, events = watched()
    ids = np.random.default_rng(0).integers(0, 40, (1, 22))
    chunks = [logits for logits, _ in Decoder(model, memory).read(ids, 6)]
    asks = [("ask", 6), ("ask", 6), ("ask", 6), ("ask", 4)]
    computes = [("compute", 6), ("compute", 6), ("compute", 6), ("compute", 4)]
    assert events == [asks[0], asks[1], computes[0], asks[2], computes[1], asks[3], *computes[2:]]
    plain = Decoder(*make())
    assert all(torch.equal(chunk, plain.step(ids[:, 6 * at : 6 * at + 6])) for at, chunk in enumerate(chunks)), (
        "bit for bit what it is without reading ahead"
    )


def test_generation_reads_its_prompt_ahead_in_the_chunks_asked_for():
    model, memory, events = watched()
    list(generate(model, memory, [1, 2, 3, 4, 5], max_new_tokens=1, prefill_chunk=2))
    assert events == [("ask", 2), ("ask", 2), ("compute", 2), ("ask", 1), ("compute", 2), ("compute", 1)]


def test_gates_of_a_prompt_read_in_chunks_are_those_of_one_piece():
    whole, chunked = {}, {}
    list(generate(*make(), range(23), max_new_tokens=1, gates=whole))
    list(generate(*make(), range(23), max_new_tokens=1, gates=chunked, prefill_chunk=5))
    assert list(whole) == list(chunked) == [1, 2]
    assert all(torch.allclose(whole[layer], chunked[layer], atol=1e-5) for layer in whole)


@pytest.mark.parametrize("parameter", [{"prefill_chunk": 0}, {"draft_tokens": -1}])
def test_parameters_out_of_range_are_named(parameter):
    with pytest.raises(ValueError, match=next(iter(parameter))):
        list(generate(*make(), [1], max_new_tokens=1, **parameter))


def test_a_chunk_forgotten_whole_leaves_no_bit_behind():
    ids = np.random.default_rng(0).integers(0, 40, (2, 30))
    ids[0, 11], ids[1, 13] = -1, -1
    ours, never = Decoder(*make(), 2), Decoder(*make(), 2)
    for decoder in (ours, never):
        decoder.step(ids[:, :12])
    ours.step(ids[:, 20:29])
    ours.rewind(9)
    for first, stop in ((12, 13), (13, 20)):
        assert torch.equal(ours.step(ids[:, first:stop]), never.step(ids[:, first:stop]))


def test_more_than_the_last_chunk_cannot_be_forgotten():
    decoder = Decoder(*make())
    decoder.step(np.array([[1, 2, 3]]))
    decoder.step(np.array([[4, 5]]))
    decoder.rewind(1)
    with pytest.raises(AssertionError, match="2 tokens to forget, the last chunk had 1"):
        decoder.rewind(2)


TOKENS = st.integers(-1, 39)
PIECES = st.lists(
    st.tuples(st.lists(TOKENS, min_size=1, max_size=8), st.lists(TOKENS, max_size=6)), min_size=1, max_size=6
)
"""(tokens that stay, tokens read with them and forgotten)."""


def read_in_pieces(decoder, pieces):
    """Logits of the tokens that stay."""
    logits = []
    for kept, forgotten in pieces:
        logits.append(decoder.step(np.array([kept + forgotten]))[:, : len(kept)])
        decoder.rewind(len(forgotten))
    return torch.cat(logits, dim=1)


@settings(max_examples=60, deadline=None)
@given(pieces=PIECES, max_ngram=st.sampled_from([2, 4]))
def test_dead_tokens_chunks_and_forgotten_drafts_give_the_logits_of_one_piece(pieces, max_ngram):
    spec = small_spec(max_ngram=max_ngram, vocab_size=(50,) * (max_ngram - 1))
    model, memory = exact(small_config(engram=spec, context=128))
    whole = Decoder(model, memory).step(np.array([[token for kept, _ in pieces for token in kept]]))
    assert torch.allclose(read_in_pieces(Decoder(model, memory), pieces), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_same_in_float32_to_a_hundred_thousandth(seed):
    rng = np.random.default_rng(seed)
    cuts = rng.integers(1, 7, 8)
    pieces = [(rng.integers(-1, 40, cut).tolist(), rng.integers(-1, 40, rng.integers(0, 6)).tolist()) for cut in cuts]
    model, memory = make()
    whole = Decoder(model, memory).step(np.array([[token for kept, _ in pieces for token in kept]]))
    assert torch.allclose(read_in_pieces(Decoder(model, memory), pieces), whole, rtol=0, atol=1e-5)
