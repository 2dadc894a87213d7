"""`engrid ids`: what a text hashes to, for people who check another implementation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from engrid.addressing.canonical import CanonicalVocabulary, deepseek_tokenizer, encode, read_tokenizer, tokenizer_of
from engrid.addressing.hashing import NgramHasher
from engrid.addressing.spec import PRESETS, EngramSpec
from engrid.worker.saved_model import TOKENIZER, open_checkpoint


@dataclass(frozen=True)
class Hashing:
    """What turns a text into row ids."""

    name: str
    spec: EngramSpec
    tokenizer: Tokenizer


def of_preset(name: str, tokenizer: Path | None) -> Hashing:
    """A published shape, over DeepSeek's tokenizer or the one in a file; raises ValueError for an unknown one."""
    if name not in PRESETS:
        raise ValueError(
            f"preset {name!r}: give one of {', '.join(PRESETS)}, or for a model that was trained here --checkpoint"
        )
    return Hashing(f"preset {name}", PRESETS[name], _tokenizer(tokenizer))


def of_checkpoint(path: Path) -> Hashing:
    """Of the model in a checkpoint; raises CheckpointError, or ValueError for a model without Engram."""
    saved = open_checkpoint(path)
    if saved.model.engram is None:
        raise ValueError(f"{path}: its model has no Engram, so its texts have no rows")
    tokenizer = tokenizer_of(saved.read_file(TOKENIZER).decode(), f"{saved.manifest.name}/{TOKENIZER}")
    return Hashing(f"checkpoint {saved.manifest.name}", saved.model.engram, tokenizer)


def print_ids(text: str, hashing: Hashing, *, layer: int, as_json: bool, console: Console) -> None:
    """Raises ValueError for a layer without Engram."""
    spec, encoder = hashing.spec, hashing.tokenizer
    if layer not in spec.layers:
        raise ValueError(f"layer {layer}: {hashing.name} has Engram layers {', '.join(map(str, spec.layers))}")
    tokens = encode(encoder, text)
    canonical = CanonicalVocabulary(encoder)
    hasher = NgramHasher.over(spec, canonical)
    canonical_ids = canonical.map(np.array([tokens.ids], np.int64).reshape(1, -1))
    row_ids = hasher.row_ids(canonical_ids, layer)[0]
    if as_json:
        found = {"token_ids": tokens.ids, "canonical_ids": canonical_ids[0].tolist(), "row_ids": row_ids.tolist()}
        print(json.dumps(found))
        return
    table = Table(title=f"{hashing.name}, layer {layer}: {len(tokens.ids)} tokens, {spec.heads_per_token} rows each")
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
