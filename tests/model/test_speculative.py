"""Drafts change how many passes a text costs, never the text."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engrid.model.generate import generate
from engrid.model.speculative import ORDERS, Drafts, PromptLookup, agreed
from tests.model.conftest import small_config, small_spec
from tests.model.decoding import exact, watched
from tests.model.test_transformer import make


def followed(text, count):
    """The definition, read backwards through the text."""
    for order in ORDERS:
        for start in range(len(text) - order - 1, -1, -1):
            if text[start : start + order] == text[-order:]:
                out = list(text)
                for at in range(count):
                    out.append(out[start + order + at])
                return out[len(text) :]
    return []


@settings(max_examples=300, deadline=None)
@given(
    first=st.lists(st.integers(0, 3), max_size=30),
    new=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=6),
    count=st.integers(0, 9),
)
def test_draft_is_what_followed_the_last_time(first, new, count):
    lookup, text = PromptLookup(first), list(first)
    for tokens in new:
        text += tokens
        assert lookup.draft(tokens, count) == followed(text, count)


def test_draft_goes_on_with_a_repetition_and_prefers_the_longer_ngram():
    assert PromptLookup([7, 1, 2]).draft([1, 2], 5) == [1, 2, 1, 2, 1]
    assert PromptLookup([1, 2, 3, 9, 5, 2, 3, 8, 1, 2]).draft([3], 1) == [9], "though 2, 3 alone stood later before 8"
    assert PromptLookup([1, 2, 3, 4]).draft([5], 3) == []


@pytest.mark.parametrize(
    ("draft", "expected"), [([], [3]), ([3, 1, 4], [3, 1, 4, 1]), ([3, 1, 5], [3, 1, 4]), ([0, 1, 4], [3])]
)
def test_agreed_ends_with_the_models_own_token(draft, expected):
    logits = torch.nn.functional.one_hot(torch.tensor([3, 1, 4, 1])[: len(draft) + 1], 9).float()
    assert agreed(draft, logits) == expected


PROMPTS = st.one_of(
    st.lists(st.integers(-1, 11), min_size=1, max_size=30),
    st.lists(st.integers(0, 11), min_size=1, max_size=5).map(lambda part: (part * 30)[:29]),
)


@pytest.fixture(scope="module")
def model():
    """Of twelve tokens, so that its n-grams come back."""
    torch.set_num_threads(1)
    return exact(small_config(vocab_size=12, engram=small_spec(vocab_size=(50, 70))))


@settings(max_examples=30, deadline=None)
@given(prompt=PROMPTS, draft=st.integers(1, 9), tokens=st.integers(0, 70), chunk=st.sampled_from([1, 3, 1024]))
def test_tokens_are_those_of_greedy_decoding(model, prompt, draft, tokens, chunk):
    plain = list(generate(*model, prompt, max_new_tokens=tokens))
    drafts = Drafts()
    ours = list(generate(*model, prompt, max_new_tokens=tokens, draft_tokens=draft, drafts=drafts, prefill_chunk=chunk))
    assert ours == plain
    assert len(ours) == min(tokens, 64 - len(prompt))
    assert 0 <= drafts.accepted <= drafts.drafted


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4, 1]


def varied():
    """A model whose greedy text repeats itself for a while and then does not."""
    return small_config(vocab_size=12, engram=small_spec(vocab_size=(50, 70)))


def test_drafts_right_and_wrong_both_occur_and_the_right_ones_save_their_passes():
    model, memory, events = watched(varied(), exact)
    drafts = Drafts()
    out = list(generate(model, memory, PROMPT, max_new_tokens=40, draft_tokens=4, drafts=drafts))
    passes = [tokens for kind, tokens in events if kind == "compute"][1:]
    assert len(out) == 40
    assert 0 < drafts.accepted < drafts.drafted
    assert len(passes) == 39 - drafts.accepted
    assert sum(passes) == len(passes) + drafts.drafted


def test_token_and_draft_are_asked_for_at_once():
    model, memory, events = watched(varied(), exact)
    list(generate(model, memory, PROMPT, max_new_tokens=40, draft_tokens=4))
    assert max(tokens for _, tokens in events[2:]) == 5
    pairs = list(zip(events[::2], events[1::2], strict=True))
    assert all(asked == ("ask", computed[1]) for asked, computed in pairs)


def test_sampling_drafts_nothing_and_draws_the_same():
    model, memory = exact(varied())
    drafts = Drafts()
    sampled = {"max_new_tokens": 50, "temperature": 1.0, "seed": 3}
    ours = list(generate(model, memory, PROMPT, **sampled, draft_tokens=5, drafts=drafts))
    assert any(PromptLookup(PROMPT).draft(ours[:at], 1) for at in range(1, 50)), "there is what to guess from"
    assert ours == list(generate(model, memory, PROMPT, **sampled))
    assert drafts == Drafts()


def test_model_without_memory_drafts_too():
    model, _ = make()
    plain = dataclasses.replace(model.config, engram=None)
    backbone = type(model)(plain).eval().double()
    drafts = Drafts()
    ours = list(generate(backbone, None, PROMPT, max_new_tokens=40, draft_tokens=5, drafts=drafts))
    assert ours == list(generate(backbone, None, PROMPT, max_new_tokens=40))
    assert drafts.accepted > 0
