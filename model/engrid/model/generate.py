"""Generation: a prompt read in chunks, then tokens one after another.

Rows depend on token ids alone, so they are asked for as soon as the ids are known, before the first layer runs:

    prompt   ask 1, ask 2 | compute 1 | ask 3 | compute 2 | ask 4 | compute 3 ...     one chunk ahead
    token    ask token + draft | compute | choose, forget what was drafted wrongly | ask ...
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engrid.addressing.canonical import CanonicalVocabulary
from engrid.addressing.hashing import NgramHasher
from engrid.addressing.lookup import Ids

from .rows import PendingRows, RowSource
from .speculative import Drafts, PromptLookup, agreed
from .transformer import DecodeState, Transformer

PREFILL_CHUNK = 4096
"""Tokens of a prompt read at once. Fewer hide more of the wait for the first rows, and cost attention its causal form."""
AHEAD = 1
"""Chunks whose rows are under way while one is computed."""


@dataclass(frozen=True)
class Memory:
    """What turns token ids into rows: the canonical vocabulary, the hasher, and a source of rows."""

    canonical: CanonicalVocabulary
    hasher: NgramHasher
    source: RowSource

    def prefetch(self, token_ids: Ids, before: Ids | None = None) -> tuple[PendingRows, Ids]:
        """Sends for the rows of a chunk [B, T].

        before: canonical ids in front of it, the last N-1 of which count; None: its sequences start here. Returns with
        the rows what stands before the next chunk, [B, N-1 + T]; cut off earlier, it is what stood before it there.
        """
        state = self.hasher.start(len(token_ids)) if before is None else before[:, -(self.hasher.spec.max_ngram - 1) :]
        canonical = self.canonical.map(token_ids)
        lookups, _ = self.hasher.lookups(canonical, state)
        return self.source.prefetch(lookups), np.concatenate([state, canonical], axis=1)


@dataclass(frozen=True)
class Chunk:
    """Tokens [B, T] to be read, their rows under way."""

    ids: Ids
    pending: PendingRows | None


class Decoder:
    """One batch of sequences being read and continued."""

    def __init__(self, model: Transformer, memory: Memory | None, batch: int = 1) -> None:
        """memory: None for a model without an Engram."""
        self._model = model
        self._memory = memory
        self._state = DecodeState(model, batch)
        self._before: Ids | None = None
        """Canonical ids of the last chunk asked for and the N-1 in front of it."""

    def step(self, token_ids: Ids, gates: dict[int, Tensor] | None = None) -> Tensor:
        """Reads a chunk [B, T] and returns its logits [B, T, V]. Any way of cutting a text gives the same logits.

        Negative ids are dead tokens: they have no rows, and stand as id 0 in the embedding. gates: filled with
        [B, T, M] per Engram layer.
        """
        return self._compute(self._ask(token_ids), gates)

    def read(self, token_ids: Ids, size: int) -> Iterator[tuple[Tensor, dict[int, Tensor]]]:
        """Reads [B, T] in chunks of `size`: logits and gates of each, the next one's rows on their way meanwhile."""
        asked: deque[Chunk] = deque()
        for first in range(0, token_ids.shape[1], size):
            asked.append(self._ask(token_ids[:, first : first + size]))
            if len(asked) > AHEAD:
                yield self._read(asked.popleft())
        while asked:
            yield self._read(asked.popleft())

    def rewind(self, tokens: int) -> None:
        """Forgets the last tokens, at most those of the last chunk: n-grams, conv state, keys and values."""
        self._state.rewind(tokens)
        if self._before is not None:
            self._before = self._before[:, : self._before.shape[1] - tokens]

    def _ask(self, token_ids: Ids) -> Chunk:
        if self._memory is None:
            return Chunk(token_ids, None)
        pending, self._before = self._memory.prefetch(token_ids, self._before)
        return Chunk(token_ids, pending)

    def _read(self, chunk: Chunk) -> tuple[Tensor, dict[int, Tensor]]:
        gates: dict[int, Tensor] = {}
        return self._compute(chunk, gates), gates

    @torch.inference_mode()
    def _compute(self, chunk: Chunk, gates: dict[int, Tensor] | None) -> Tensor:
        device = self._model.embedding.weight.device
        dead = torch.from_numpy(chunk.ids < 0).to(device)
        ids = torch.from_numpy(np.maximum(chunk.ids, 0)).to(device)
        return self._model(ids, chunk.pending, self._state, dead_BT=dead if dead.any() else None, gates=gates)  # type: ignore[no-any-return]


def generate(
    model: Transformer,
    memory: Memory | None,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    prefill_chunk: int = PREFILL_CHUNK,
    draft_tokens: int = 0,
    drafts: Drafts | None = None,
    gates: dict[int, Tensor] | None = None,
) -> Iterator[int]:
    """Token ids that continue the prompt, until max_new_tokens or the context is full.

    temperature: 0 is greedy. prefill_chunk: tokens of the prompt read at once. draft_tokens: guess up to so many tokens
    ahead (see speculative); the tokens are the same. 0, or a temperature above 0: none. drafts: counts them. gates:
    filled with the prompt's, [1, T, M] per Engram layer. Raises ValueError for a prompt that is empty or longer than the
    context, and for a parameter out of its range.
    """
    _check(model, prompt, temperature, prefill_chunk, draft_tokens)
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(model, memory)
    logits = _prefill(decoder, prompt, prefill_chunk, gates)
    text = PromptLookup(prompt) if draft_tokens and temperature <= 0 else None
    counts = drafts or Drafts()
    draft: list[int] = []
    left = min(max_new_tokens, model.config.context - len(prompt))
    while left > 0:
        new = agreed(draft, logits[0]) if draft else [choose(logits[0, -1], temperature, generator)]
        counts.drafted += len(draft)
        counts.accepted += len(new) - 1
        yield from new
        left -= len(new)
        if left:
            decoder.rewind(len(draft) + 1 - len(new))
            draft = text.draft(new, min(draft_tokens, left - 1)) if text else []
            logits = decoder.step(np.array([[new[-1], *draft]], np.int64))


def _check(
    model: Transformer, prompt: Sequence[int], temperature: float, prefill_chunk: int, draft_tokens: int
) -> None:
    context = model.config.context
    if not len(prompt):
        raise ValueError("the prompt is empty; give at least one token")
    if len(prompt) > context:
        raise ValueError(f"the prompt has {len(prompt)} tokens, the model's context is {context}; shorten it")
    if not math.isfinite(temperature):
        raise ValueError(f"temperature {temperature}: give 0 (greedy) or a positive number")
    if prefill_chunk < 1 or draft_tokens < 0:
        raise ValueError(f"prefill_chunk {prefill_chunk}, draft_tokens {draft_tokens}: at least 1, and at least 0")


def _prefill(decoder: Decoder, prompt: Sequence[int], size: int, gates: dict[int, Tensor] | None) -> Tensor:
    """Logits [1, 1, V] after the prompt; fills the gates."""
    of_chunks = []
    for logits, of_chunk in decoder.read(np.asarray(prompt, np.int64)[None], size):
        last = logits[:, -1:]
        of_chunks.append(of_chunk)
    if gates is not None:
        gates |= {layer: torch.cat([each[layer] for each in of_chunks], dim=1) for layer in of_chunks[0]}
    return last


def choose(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    """The likeliest token, or one drawn at the temperature."""
    if temperature <= 0:
        return int(logits_V.argmax())
    scaled = (logits_V - logits_V.max()).cpu() / temperature  # at most 0, so the smallest temperature overflows nothing
    return int(torch.multinomial(torch.softmax(scaled, -1), 1, generator=generator))
