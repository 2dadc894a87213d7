"""Real text as steps: Python's standard library through DeepSeek's tokenizer, hashed by a preset scaled to fit."""

from __future__ import annotations

import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.common import FP8_ROW_BYTES, ROW_BYTES, bench_table
from benchmarks.measure import Step
from engrid.addressing.canonical import CanonicalVocabulary, deepseek_tokenizer
from engrid.addressing.hashing import NgramHasher
from engrid.addressing.spec import PRESETS
from engrid.tables import TableSpec

WINDOW = 4096
ROW_BYTES_OF = {"paper": ROW_BYTES, "v41": FP8_ROW_BYTES}
STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])


class Text:
    """Token ids of a folder's Python files end to end, canonical: read once, hashed by whoever asks."""

    def __init__(self, tokens: int, folder: Path = STANDARD_LIBRARY) -> None:
        """At least so many tokens, where the folder has them."""
        tokenizer = deepseek_tokenizer()
        self.vocabulary = CanonicalVocabulary(tokenizer)
        files, pieces, count = sorted(folder.rglob("*.py")), [], 0
        # In no order of theirs: encodings, one table after another, would be an easy stretch of its own.
        for path in (files[place] for place in np.random.default_rng(0).permutation(len(files))):
            if "site-packages" in path.relative_to(folder).parts or count >= tokens:
                continue
            ids = tokenizer.encode(path.read_text("utf-8", errors="ignore"), add_special_tokens=False).ids
            pieces.append(np.array(ids, np.int64))
            count += len(ids)
        self.canonical = self.vocabulary.map(np.concatenate(pieces))

    def hasher(self, preset: str, head_rows: int) -> NgramHasher:
        """Of one layer of the preset. head_rows: rows per head, rounded up to primes."""
        spec = PRESETS[preset]
        scaled = replace(spec, layers=(1,), vocab_size=(head_rows,) * len(spec.vocab_size))
        return NgramHasher.over(scaled, self.vocabulary)

    def steps(self, hasher: NgramHasher, tokens: int = WINDOW) -> list[Step]:
        """All of the text in steps of so many tokens that follow one another."""
        found, state = [], hasher.start(1)
        for start in range(0, len(self.canonical) - tokens + 1, tokens):
            lookups, state = hasher.lookups(self.canonical[None, start : start + tokens], state)
            orders = tuple((lookup.row_ids, lookup.keys) for lookup in lookups)
            found.append(Step(np.concatenate([ids for ids, _ in orders], axis=1), orders))
        return found


def text_table(hasher: NgramHasher, preset: str, *, name: str = "bench") -> TableSpec:
    """The table that the hasher's ids are rows of."""
    (of,) = hasher.layers.values()
    buckets = tuple(int(prime) for prime in of.primes.reshape(-1))
    return bench_table(0, name=name, row_bytes=ROW_BYTES_OF[preset], buckets=buckets)


def head_rows(preset: str, mib: int) -> int:
    """Rows per head so that a table of the preset has about so many MiB."""
    spec = PRESETS[preset]
    return (mib << 20) // ROW_BYTES_OF[preset] // (len(spec.vocab_size) * spec.heads)
