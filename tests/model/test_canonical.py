import numpy as np
import pytest
from tokenizers import Tokenizer, models

from engrid.model.canonical import CanonicalVocabulary


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
