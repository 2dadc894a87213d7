import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from engrid.addressing.canonical import CanonicalVocabulary, encode, read_tokenizer, tokenizer_of


def test_deepseek_vocabulary_shrinks_as_published(deepseek, vectors):
    _, canonical = deepseek
    assert len(canonical.of) == 129_280
    assert canonical.size == vectors["canonical_vocab_size"] == 99_092


def test_case_accents_and_spacing_fold_and_spaces_stay_one_space():
    words = ["a", "A", "á", " a", " ", "  ", "\n", "b", "ﬁ", "fi", "\ufffd", "!"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="!"))
    of = CanonicalVocabulary(tokenizer).of
    by = dict(zip(words, of.tolist(), strict=True))
    assert by["a"] == by["A"] == by["á"] == by[" a"] == 0
    assert by["ﬁ"] == by["fi"]
    assert by[" "] == by["  "] == by["\n"] != by["a"]
    assert sorted(set(of.tolist())) == list(range(len(set(of.tolist()))))


def test_negative_ids_are_dead_and_others_checked(deepseek):
    _, canonical = deepseek
    assert canonical.map(np.array([-5, 0]))[0] == -1
    with pytest.raises(ValueError, match="beyond the vocabulary"):
        canonical.map(np.array([129_280]))
    with pytest.raises(ValueError, match="integers"):
        canonical.map(np.array([1.0]))


def bpe(**of_model):
    """A tokenizer.json as a dict: nine letters, and "ab" as one token."""
    letters = {letter: index for index, letter in enumerate("abcdefgh ")}
    tokenizer = Tokenizer(models.BPE(vocab={**letters, "ab": 9}, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    values = json.loads(tokenizer.to_str())
    values["model"].update(of_model)
    return values


TEXT = "ab cd " * 5 + "ab"
IDS = [9, 8, 2, 3, 8] * 5 + [9]
PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 3, "pad_type_id": 0, "pad_token": "d"}
FOREIGN = {
    "truncation": {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
    "padding to a length": {"padding": {**PADDING, "strategy": {"Fixed": 128}}},
    "padding of a batch": {"padding": {**PADDING, "strategy": "BatchLongest"}},
    "dropout": {"model": bpe(dropout=1.0)["model"]},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_text_has_all_its_tokens_and_no_others_whatever_its_tokenizer_says(what):
    tokenizer = tokenizer_of(json.dumps({**bpe(), **FOREIGN[what]}), "theirs.json")
    assert tokenizer.encode(TEXT, add_special_tokens=False).ids == IDS
    batch = tokenizer.encode_batch([TEXT, "ab"], add_special_tokens=False)
    assert [each.ids for each in batch] == [IDS, [9]]
    assert CanonicalVocabulary(tokenizer).size == 10


def added(content, number):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **flags}


VOCABULARY = bpe()["model"]["vocab"]
WRONG = {
    "a hole": ({"model": bpe(vocab={**VOCABULARY, "h": 20})["model"]}, "has 10 tokens, but no id 7 and ids up to 20"),
    "two of one id": ({"model": bpe(vocab={**VOCABULARY, "h": 6})["model"]}, "gives id 6 to two tokens"),
    "an id beyond its size": ({"added_tokens": [added("<x>", 50)]}, "gives added token '<x>' the id 50"),
    "a hole before an added token": (
        {"added_tokens": [added("<x>", 10), added("<y>", 12)]},
        "gives added token '<y>' the id 12",
    ),
    "an added token in another's place": ({"added_tokens": [added("<x>", 3)]}, "gives added token '<x>' the id 3"),
    "no tokens": ({"model": bpe(vocab={}, merges=[])["model"]}, "has no tokens"),
    "no model": ({"model": {"type": "Nonsense"}}, "is not a tokenizer.json"),
}


@pytest.mark.parametrize("what", WRONG)
def test_ids_that_cannot_be_hashed_are_refused_by_name(what, tmp_path):
    change, words = WRONG[what]
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps({**bpe(), **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"tokenizer .*theirs.json {words}"):
        read_tokenizer(path)


@pytest.mark.parametrize("head", ["", "\ufeff"])
def test_a_file_without_added_tokens_or_with_a_byte_order_mark_is_read(head, tmp_path):
    values = bpe()
    del values["added_tokens"]
    path = tmp_path / "theirs.json"
    path.write_text(head + json.dumps(values), encoding="utf-8")
    assert encode(read_tokenizer(path), TEXT).ids == IDS


@pytest.mark.parametrize("text", ["b", "\udcff"])
def test_a_text_that_the_tokenizer_has_no_tokens_for_is_an_error(text):
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="?"))
    with pytest.raises(ValueError, match="cannot encode this text"):
        encode(tokenizer, text)


def test_what_a_template_adds_to_a_text_is_none_of_its_tokens():
    tokenizer = tokenizer_of(json.dumps(bpe()), "theirs")
    tokenizer.post_processor = processors.TemplateProcessing(single="h $A h", special_tokens=[("h", 7)])
    assert tokenizer.encode("ab").ids == [7, 9, 7]
    assert encode(tokenizer, "ab").ids == [9]


def test_a_vocabulary_with_a_hole_is_refused_though_nobody_read_it_from_a_file():
    with pytest.raises(ValueError, match="no id 1 and ids up to 7"):
        CanonicalVocabulary(Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a")))


def test_added_tokens_count_as_ids():
    values = {**bpe(), "added_tokens": [added("<x>", 10), added("<y>", 11)]}
    assert len(CanonicalVocabulary(tokenizer_of(json.dumps(values), "theirs")).of) == 12
