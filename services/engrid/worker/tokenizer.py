"""Tokenizers for training and serving."""

from __future__ import annotations

from tokenizers import Tokenizer

from engrid.addressing import canonical


def tokenizer_of(text: str, name: str) -> Tokenizer:
    """As canonical.tokenizer_of, for text in which "<end>" is five characters and not the end."""
    tokenizer = canonical.tokenizer_of(text, name)
    tokenizer.encode_special_tokens = True
    return tokenizer
