import json
from pathlib import Path

import pytest

from engrid.addressing.canonical import CanonicalVocabulary, deepseek_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def vectors():
    return json.loads((GOLDEN / "engram_vectors.json").read_text())


@pytest.fixture(scope="session")
def deepseek():
    tokenizer = deepseek_tokenizer()
    return tokenizer, CanonicalVocabulary(tokenizer)
