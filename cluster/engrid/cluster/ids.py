"""`engrid ids`: what a text hashes to, for people who check another implementation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from engrid.model.canonical import CanonicalVocabulary, deepseek_tokenizer, read_tokenizer
from engrid.model.config import PRESETS
from engrid.model.hashing import NgramHasher


def print_ids(text: str, *, preset: str, layer: int, tokenizer: Path | None, as_json: bool, console: Console) -> None:
    """Raises ValueError for an unknown preset or layer, or a file that is no tokenizer."""
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r}: give one of {', '.join(PRESETS)}")
    spec = PRESETS[preset]
    if layer not in spec.layers:
        raise ValueError(f"layer {layer}: preset {preset} has Engram layers {', '.join(map(str, spec.layers))}")
    encoder = _tokenizer(tokenizer)
    tokens = encoder.encode(text, add_special_tokens=False)
    canonical = CanonicalVocabulary(encoder)
    hasher = NgramHasher.over(spec, canonical)
    canonical_ids = canonical.map(np.array([tokens.ids], np.int64).reshape(1, -1))
    row_ids = hasher.row_ids(canonical_ids, layer)[0]
    if as_json:
        found = {"token_ids": tokens.ids, "canonical_ids": canonical_ids[0].tolist(), "row_ids": row_ids.tolist()}
        print(json.dumps(found))
        return
    table = Table(title=f"{preset}, layer {layer}: {len(tokens.ids)} tokens, {spec.heads_per_token} rows each")
    for column in ("token", "id", "canonical", "row ids"):
        table.add_column(column)
    for token, raw, folded, rows in zip(tokens.tokens, tokens.ids, canonical_ids[0], row_ids, strict=True):
        table.add_row(token, str(raw), str(folded), " ".join(map(str, rows)))
    console.print(table)


def _tokenizer(path: Path | None) -> Tokenizer:
    if path is None:
        return deepseek_tokenizer()
    if not path.is_file():
        raise ValueError(f"tokenizer {path}: no such file; give a tokenizer.json")
    return read_tokenizer(path)
