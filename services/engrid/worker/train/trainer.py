"""Training: dense weights here, rows wherever the row source keeps them.

One step, with the tables in the shards:

    rows of the batch arrive (asked for at the end of the step before)
    forward, backward                        row gradients collect in the leaves
    all-reduce dense gradients (gloo)        where there are several workers
    push row gradients, commit               applied once every worker has
    prefetch the next batch's rows           waits at the shards for the step just pushed (staleness 0)
    dense optimizer step                     while those rows travel

With staleness 0 steps are synchronous: the rows a step reads hold every worker's gradients of the step before. With s > 0 they
may lack those of s steps, and are asked for s steps before they are needed. Row gradients are
summed over workers, so each scales its own by 1 / workers, as the all-reduce does for the dense ones.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from engrid.addressing.lookup import Ids
from engrid.model.generate import Memory
from engrid.model.rows import Floats, PendingRows, RowSource
from engrid.model.transformer import Transformer
from engrid.worker.config import TrainConfig

from .corpus import Corpus
from .stopping import Stopping

Windows = npt.NDArray[np.int64]


class TrainableRows(RowSource, Protocol):
    """A row source that takes gradients."""

    def push(self, gradients: Mapping[int, tuple[Ids, Floats]], *, step: int, learning_rate: float) -> None:
        """Per layer, row ids int64 [n] and gradients float32 [n, width]; applied before the next prefetch answers."""


@runtime_checkable
class Stepped(Protocol):
    """A row source that knows how old its rows are."""

    @property
    def read_step(self) -> int:
        """The step whose rows were read last, or an older one."""


@dataclass(frozen=True)
class Step:
    """What one step did."""

    step: int
    loss: float
    """Nats per token, mean over the workers."""
    seconds: float
    exposed_wait: float
    """Seconds this thread spent in the row source: hash, dedup, send, wait, decode, place."""
    push: float
    """Seconds of pushing row gradients and committing."""
    staleness: int = 0
    """Steps by which the rows lagged behind those of step - 1, at most; negative never."""


@dataclass
class Clock:
    """Adds up the seconds spent in a part of the step."""

    seconds: float = 0.0
    _started: float = field(default=0.0, repr=False)

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started

    def take(self) -> float:
        """The seconds so far; begins anew."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class LeafRows:
    """PendingRows whose rows are leaves of the graph, so that backward leaves their gradients."""

    def __init__(self, pending: PendingRows, clock: Clock) -> None:
        self._pending = pending
        self._clock = clock
        self.leaves: dict[int, Tensor] = {}

    def rows(self, layer: int) -> Tensor:
        with self._clock:
            self.leaves[layer] = self._pending.rows(layer).requires_grad_()
        return self.leaves[layer]


@dataclass(frozen=True)
class Batch:
    """A step's windows and rows, asked for."""

    windows: Windows
    pending: LeafRows | None
    row_ids: Mapping[int, Ids]
    """Of each layer, int64 [T, heads]."""


class Batches:
    """Windows of the training text, the same for every run with the same seed."""

    def __init__(self, config: TrainConfig, corpus: Corpus, rank: int, workers: int) -> None:
        self._config, self._text = config, corpus.train
        self._rank, self._workers = rank, workers
        if len(self._text) <= config.length:
            raise ValueError(
                f"the training text has {len(self._text)} tokens, fewer than one window of {config.length}"
            )

    def at(self, step: int) -> Windows:
        """This worker's windows of a step: int64 [batch, length + 1], the last token being the last target."""
        count = self._config.batch * self._workers
        starts = np.random.default_rng((self._config.seed, step)).integers(
            0, len(self._text) - self._config.length, count
        )
        mine = starts[self._rank :: self._workers]
        windows: Windows = self._text[mine[:, None] + np.arange(self._config.length + 1)].astype(np.int64)
        return windows


class Trainer:
    """One rank's loop. The model, the memory and the process group are the caller's."""

    def __init__(
        self,
        config: TrainConfig,
        model: Transformer,
        batches: Batches,
        *,
        memory: Memory | None,
        rows: TrainableRows | None,
        workers: int,
        stopping: Stopping | None = None,
    ) -> None:
        """memory reads through `rows`, which also takes the gradients; both None without an Engram."""
        self._stopping = stopping or Stopping()
        self._finishing = False
        """Whether any worker was asked to stop: the same on all, as the all-reduce says so."""
        self._config, self.model, self._batches = config, model, batches
        self._memory, self._rows, self._workers = memory, rows, workers
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        self._waits = Clock()
        self._pushes = Clock()

    def steps(self, after: int = 0) -> Iterator[Step]:
        """Trains, yielding after each step: weights, their optimizer and the rows are then those after it.

        after: the step that they are those of now. Ends early, after the same step on all workers, once one is told to
        finish; raises CancelledError once told to end at once.
        """
        ahead = abs(self._config.staleness)
        asked = collections.deque([self._fetch(after + 1)])
        last = self._config.steps
        for step in range(after + 1, last + 1):
            self._stopping.check()
            started = time.perf_counter()
            self.model.train()
            asked.extend(self._fetch(other) for other in range(step + len(asked), min(step + ahead, last) + 1))
            batch = asked.popleft()
            loss = self._forward_backward(batch.windows, batch.pending)
            lag = step - 1 - self._rows.read_step if isinstance(self._rows, Stepped) else 0
            rate = self.learning_rate(step)
            self._push(step, batch, rate * self._config.table_learning_rate_ratio)
            if not asked and step < last and not self._finishing:
                asked.append(self._fetch(step + 1))
            self._dense_step(rate)
            yield Step(step, loss, time.perf_counter() - started, self._waits.take(), self._pushes.take(), lag)
            if self._finishing:
                return

    def learning_rate(self, step: int) -> float:
        """Linear to the peak over the warmup, then a cosine to a tenth of it."""
        config = self._config
        if step <= config.warmup:
            return config.learning_rate * step / config.warmup
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))

    def _fetch(self, step: int) -> Batch:
        windows = self._batches.at(step)
        if self._memory is None:
            return Batch(windows, None, {})
        with self._waits:
            hasher = self._memory.hasher
            lookups, _ = hasher.lookups(self._memory.canonical.map(windows[:, :-1]), hasher.start(len(windows)))
            pending = self._memory.source.prefetch(lookups)
        row_ids = {
            layer: np.concatenate([each.row_ids for each in lookups if each.layer == layer], axis=1)
            for layer in hasher.layers
        }
        return Batch(windows, LeafRows(pending, self._waits), row_ids)

    def _forward_backward(self, windows: Windows, pending: LeafRows | None) -> float:
        tokens = torch.from_numpy(windows).to(self.model.embedding.weight.device)
        logits = self.model(tokens[:, :-1], pending)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        return self._reduce(float(loss.detach()))

    def _reduce(self, loss: float) -> float:
        """Averages dense gradients, loss and expert loads over the workers, and asks who is to stop, in one message."""
        loads = self.model.expert_loads()
        asked = self._stopping.finishing
        self._finishing = asked
        if self._workers > 1:
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            flat = torch.cat(
                [*(gradient.flatten() for gradient in gradients), loads.flatten(), loads.new_tensor([loss, asked])]
            )
            dist.all_reduce(flat)
            flat /= self._workers
            pieces = torch.split(flat, [*(gradient.numel() for gradient in gradients), loads.numel(), 2])
            for gradient, piece in zip(gradients, pieces, strict=False):
                gradient.copy_(piece.view_as(gradient))
            loads, loss = pieces[-2].view_as(loads), float(pieces[-1][0])
            self._finishing = bool(pieces[-1][1] > 0)
        self.model.balance(loads)
        return loss

    def _push(self, step: int, batch: Batch, learning_rate: float) -> None:
        if batch.pending is None or self._rows is None:
            return
        with self._pushes:
            gradients = {}
            for layer, leaf in batch.pending.leaves.items():
                assert leaf.grad is not None
                values = (leaf.grad / self._workers).cpu().numpy()
                gradients[layer] = (batch.row_ids[layer].reshape(-1), values.reshape(-1, values.shape[-1]))
            self._rows.push(gradients, step=step, learning_rate=learning_rate)

    def _dense_step(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


@torch.inference_mode()
def validation_loss(
    model: Transformer,
    memory: Memory | None,
    corpus: Corpus,
    *,
    length: int,
    limit: int,
    stopping: Stopping | None = None,
) -> float:
    """Nats per token over at most `limit` tokens, in windows of `length` spread evenly over the validation text.

    Raises CancelledError once `stopping` says so.
    """
    model.eval()
    text = corpus.validation
    length = min(length, len(text) - 1)
    all_starts = np.arange(0, len(text) - length, length)
    chosen = all_starts[np.linspace(0, len(all_starts) - 1, max(1, min(len(all_starts), limit // length))).astype(int)]
    total = 0.0
    for first in range(0, len(chosen), 8):
        if stopping is not None:
            stopping.check()
        starts = chosen[first : first + 8]
        windows = text[starts[:, None] + np.arange(length + 1)].astype(np.int64)
        pending = memory.prefetch(windows[:, :-1])[0] if memory else None
        tokens = torch.from_numpy(windows).to(model.embedding.weight.device)
        logits = model(tokens[:, :-1], pending)
        total += float(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())) * len(starts)
    return total / len(chosen)


def summary(config: TrainConfig, done: list[Step], workers: int) -> dict[str, Any]:
    """Medians over the steps; the first, which warms everything up, is left out where there are others."""
    measured = done[1:] or done
    seconds = float(np.median([step.seconds for step in measured]))
    waits = float(np.median([step.exposed_wait for step in measured]))
    return {
        "steps": done[-1].step,
        "tokens_per_second": config.batch * config.length * workers / seconds,
        "step_seconds": seconds,
        "exposed_wait": waits,
        "exposed_wait_share": waits / seconds,
        "staleness": max(step.staleness for step in measured),
        "push_seconds": float(np.median([step.push for step in measured])),
        "losses": [step.loss for step in done],
    }
