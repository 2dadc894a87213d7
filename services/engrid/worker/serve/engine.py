"""A loaded model that generates: text in, text out, with rows from the shards."""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from engrid.addressing.canonical import CanonicalVocabulary, encode
from engrid.addressing.hashing import NgramHasher
from engrid.addressing.lookup import Lookup
from engrid.addressing.spec import EngramSpec
from engrid.client import MemoryClient
from engrid.model.generate import PREFILL_CHUNK, Memory, generate
from engrid.model.rows import PendingRows, RowSource
from engrid.model.speculative import Drafts
from engrid.storage.errors import CheckpointError
from engrid.worker.dense import load_model
from engrid.worker.rows.remote import RemoteRows
from engrid.worker.saved_model import SavedModel

from .sealed_tables import serve_tables


@dataclass
class Totals:
    """Of one generation."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_time: float = 0.0
    """Seconds until the first token."""
    decode_time: float = 0.0
    """Seconds for the tokens after the first."""
    exposed_wait: float = 0.0
    """Seconds the model's thread spent in the row source."""
    rows: int = 0
    bytes: int = 0
    """Of the rows fetched over the wire."""
    rows_here: int = 0
    """Rows that were on this host already."""
    drafts: Drafts = field(default_factory=Drafts)


@dataclass(frozen=True)
class Ngram:
    """One order at one token."""

    order: int
    text: str
    row_ids: list[int]


@dataclass(frozen=True)
class Trace:
    """What one Engram layer looked up for one token of the prompt, and how far it let it in."""

    token: str
    layer: int
    ngrams: list[Ngram]
    gates: list[float]


@dataclass
class Generation:
    """One run of the model over a prompt: iterate `text`, then read the rest."""

    text: Iterator[str]
    totals: Totals = field(default_factory=Totals)
    token_ids: list[int] = field(default_factory=list)
    trace: list[Trace] = field(default_factory=list)


class TimedRows:
    """A RowSource that adds up the time its callers spend in it."""

    def __init__(self, source: RowSource) -> None:
        self._source = source
        self.seconds = 0.0

    def prefetch(self, lookups: Sequence[Lookup]) -> _TimedPending:
        started = time.perf_counter()
        pending = self._source.prefetch(lookups)
        self.seconds += time.perf_counter() - started
        return _TimedPending(pending, self)


@dataclass(frozen=True)
class _TimedPending:
    pending: PendingRows
    timed: TimedRows

    def rows(self, layer: int) -> torch.Tensor:
        started = time.perf_counter()
        rows = self.pending.rows(layer)
        self.timed.seconds += time.perf_counter() - started
        return rows


class Engine:
    """A checkpoint's model. Generations share it, one at a time per thread."""

    def __init__(self, saved: SavedModel, client: MemoryClient | None, device: str) -> None:
        """Loads the dense weights, and the rows into sealed tables of the shards unless they hold them already.

        client: None for a model without an Engram. Raises CheckpointError where a file is missing or damaged.
        """
        self.saved = saved
        self.model, self.tokenizer = load_model(self.saved, device)
        self._client, self._device = client, device
        self._canonical = CanonicalVocabulary(self.tokenizer)
        self._hasher: NgramHasher | None = None
        self._tables: dict[int, str] = {}
        spec = self.saved.model.engram
        if spec is not None:
            assert client is not None
            self._hasher = NgramHasher.over(spec, self._canonical)
            check_tables(self.saved, self._hasher)
            pin = serve_tables(self.saved, client)
            weakref.finalize(self, pin.release).atexit = False
            self._tables = dict(zip(self.saved.tables, pin.tables, strict=True))
            self._warm_up(self._hasher)

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        explain: bool,
        draft_tokens: int = 0,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> Generation:
        """Text that continues the prompt, in pieces of whole characters.

        max_new_tokens: 0 fills the context. explain: fill `trace` with the prompt's n-grams before the first piece
        comes. The rest is as for engrid.model.generate, whose ValueErrors are raised on the first piece.
        """
        generation = Generation(iter(()))
        ids = encode(self.tokenizer, prompt).ids
        tokens_of = partial(
            generate,
            self.model,
            max_new_tokens=max_new_tokens or self.model.config.context,
            temperature=temperature,
            seed=seed,
            draft_tokens=draft_tokens,
            prefill_chunk=prefill_chunk,
            drafts=generation.totals.drafts,
        )
        generation.text = self._run(generation, ids, tokens_of, explain=explain)
        return generation

    def _run(
        self, generation: Generation, ids: list[int], tokens_of: Callable[..., Iterator[int]], *, explain: bool
    ) -> Iterator[str]:
        totals, timed, memory = generation.totals, None, None
        if self._hasher is not None:
            rows = self._open_rows(self._hasher.spec)
            timed = TimedRows(rows)
            memory = Memory(self._canonical, self._hasher, timed)
        gates: dict[int, torch.Tensor] = {}
        totals.prompt_tokens = len(ids)
        started = first = time.perf_counter()
        shown = ""
        tokens = tokens_of(memory, ids, gates=gates)
        for token in itertools.chain(tokens, [None]):  # the prompt is read though it may leave no room for a token
            now = time.perf_counter()
            if not totals.prefill_time:
                totals.prefill_time = now - started
                if explain:
                    generation.trace.extend(self._explain(ids, gates))
                first = time.perf_counter()
            if timed is not None:
                totals.exposed_wait = timed.seconds
                totals.rows, totals.bytes = rows.traffic.rows, rows.traffic.bytes
                totals.rows_here = rows.traffic.here
            if token is None:
                return
            generation.token_ids.append(token)
            totals.new_tokens += 1
            totals.decode_time = time.perf_counter() - first
            # The last character may lack bytes that the next tokens bring.
            whole = self.tokenizer.decode(generation.token_ids, skip_special_tokens=False).rstrip("\ufffd")
            if len(whole) > len(shown):
                yield whole[len(shown) :]
                shown = whole

    def _warm_up(self, hasher: NgramHasher) -> None:
        """One token's rows: opens streams or maps tables, and compiles what is compiled on first use."""
        memory = Memory(self._canonical, hasher, self._open_rows(hasher.spec))
        pending, _ = memory.prefetch(np.zeros((1, 1), np.int64))
        for layer in hasher.layers:
            pending.rows(layer)

    def _open_rows(self, spec: EngramSpec) -> RemoteRows:
        assert self._client is not None
        return RemoteRows(self._client, spec, self._tables, device=self._device)

    def _explain(self, ids: list[int], gates: dict[int, torch.Tensor]) -> Iterator[Trace]:
        if self._hasher is None:
            return
        lookups, _ = self._hasher.lookups(self._canonical.map(np.array([ids])), self._hasher.start(1))
        for at, token in enumerate(ids):
            for layer, gate in gates.items():
                ngrams = [
                    Ngram(
                        each.order,
                        self.tokenizer.decode(ids[max(0, at - each.order + 1) : at + 1], skip_special_tokens=False),
                        each.row_ids[at].tolist(),
                    )
                    for each in lookups
                    if each.layer == layer
                ]
                yield Trace(
                    self.tokenizer.decode([token], skip_special_tokens=False), layer, ngrams, gate[0, at].tolist()
                )


def check_tables(saved: SavedModel, hasher: NgramHasher) -> None:
    """Raises CheckpointError unless the checkpoint's tables are those that its model's Engram addresses."""
    spec = hasher.spec
    theirs = {layer: (of.rows, of.width, of.row_format) for layer, of in saved.tables.items()}
    ours = {layer: (of.rows, spec.row_width, spec.row_format) for layer, of in hasher.layers.items()}
    if theirs != ours or len(saved.specs) != len(theirs):
        raise CheckpointError(
            f"checkpoint {saved.manifest.name} holds tables {theirs} (rows, width and format by layer), its model reads {ours}"
        )
