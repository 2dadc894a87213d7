"""One rank of a training run, from the text to the checkpoint: what ComputeService.Train does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from engrid.client import MemoryClient, create_tables
from engrid.client.checkpoints import check_folder, restore_tables
from engrid.model.canonical import CanonicalVocabulary
from engrid.model.generate import Memory
from engrid.model.hashing import NgramHasher
from engrid.model.rows import InProcessTables
from engrid.model.transformer import Transformer
from engrid.rpc.errors import EngridError
from engrid.tables import RowTable, TableSpec

from .collisions import count_collisions, windows
from .config import TrainConfig
from .corpus import Corpus, prepare
from .dense import load_dense
from .remote_rows import RemoteRows
from .resume import Start, about, resume, start_anew
from .saved_model import FOLDER
from .saving import Saver
from .tables import table_name, table_specs
from .trainer import Batches, Step, TrainableRows, Trainer, summary, validation_loss

CURVE_TOKENS = 8192
"""Validation tokens of a point on the curve."""
LAST_TOKENS = 98_304
"""Validation tokens of its last point, which is the loss reported; no more than were trained on."""
RENDEZVOUS_TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True)
class Progress:
    """Something to tell the user."""

    phase: str = ""
    step: Step | None = None
    result: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Place:
    """This rank among the workers of a run."""

    identity: str
    """Tells this run from all others, also from an earlier one of the same name; the same on every worker."""
    rank: int = 0
    workers: int = 1
    rendezvous: str = ""
    """host:port where rank 0 listens for the others."""

    def __post_init__(self) -> None:
        if not self.identity:
            raise ValueError("identity is empty; give one that no other run has")
        if not 0 <= self.rank < self.workers:
            raise ValueError(f"rank {self.rank} of {self.workers} workers: ranks are 0..{self.workers - 1}")


def train(config: TrainConfig, place: Place, connect: Callable[[], MemoryClient], device: str) -> Iterator[Progress]:
    """Trains, yielding what happens; closing the iterator stops it. The last Progress holds the result.

    A checkpoint that could not be saved is told in a Progress and training goes on, but for the last one, which raises.

    Rank 0 makes the tables, writes the checkpoint and measures; the others yield a result of their steps alone.
    """
    if config.memory == "off":
        config = replace(config, model=replace(config.model, engram=None))
    if config.memory == "in_process" and place.workers > 1:
        raise ValueError("tables in process serve one worker; use memory 'remote' for more")
    out = Path(config.out)
    yield Progress(phase="learning the tokenizer and encoding the text")
    text = Path(config.text) if config.text else None
    corpus = prepare(out, vocab_size=config.model.vocab_size, root=text)
    with ExitStack() as stack:
        stack.enter_context(process_group(place))
        check_same_text(corpus, place)
        yield Progress(phase="making the tables")
        client = stack.enter_context(connect()) if config.memory == "remote" else None
        if config.resume:
            start = resume(config, corpus.digest, place.rank, place.workers, client)
        else:
            start = start_anew(config, place.identity)
        setup = _Setup(config, place, corpus, client, device, start)
        if setup.saver is not None:
            stack.callback(setup.saver.close)
        yield from _steps(config, place, corpus, setup)


@contextmanager
def process_group(place: Place) -> Iterator[None]:
    """torch.distributed over gloo, where there are several workers."""
    if place.workers == 1:
        yield
        return
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{place.rendezvous}",
        rank=place.rank,
        world_size=place.workers,
        timeout=RENDEZVOUS_TIMEOUT,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def check_same_text(corpus: Corpus, place: Place) -> None:
    """Raises ValueError where the workers would train on different tokens."""
    if place.workers == 1:
        return
    digests: list[str] = [""] * place.workers
    dist.all_gather_object(digests, corpus.digest)
    if len(set(digests)) > 1:
        raise ValueError(
            "the workers read different texts or learned different tokenizers; give them one folder that all see as "
            "`out`, or the same files"
        )


class _Setup:
    """Model, memory and trainer of one rank."""

    def __init__(
        self,
        config: TrainConfig,
        place: Place,
        corpus: Corpus,
        client: MemoryClient | None,
        device: str,
        start: Start,
    ) -> None:
        self.client, self.start = client, start
        self.saver: Saver | None = None
        saves = place.rank == 0 and (config.save or config.checkpoint_every > 0)
        if saves and client is not None:
            check_folder(client, Path(config.out) / FOLDER)
        self.canonical = CanonicalVocabulary(corpus.tokenizer)
        self.specs: dict[int, TableSpec] = {}
        self.memory: Memory | None = None
        self.rows: RemoteRows | InProcessTables | None = None
        model = Transformer(config.model).to(device)
        spec = config.model.engram
        if spec is not None:
            hasher = NgramHasher.over(spec, self.canonical)
            self.specs = table_specs(config.run, hasher)
            self.rows = self._open_rows(config, place, device)
            self.memory = Memory(self.canonical, hasher, self.rows)
        batches = Batches(config, corpus, place.rank, place.workers)
        rows: TrainableRows | None = self.rows
        self.trainer = Trainer(config, model, batches, memory=self.memory, rows=rows, workers=place.workers)
        if start.saved is not None:
            load_dense(start.saved, model, self.trainer.optimizer)
            if place.rank == 0:
                with suppress(OSError):  # what an older attempt is still writing goes the next time
                    start.saved.checkpoints.clean()
        if saves:
            self.saver = self._open_saver(config, place, corpus)

    def _open_saver(self, config: TrainConfig, place: Place, corpus: Corpus) -> Saver:
        here = self.rows.tables if isinstance(self.rows, InProcessTables) else {}
        return Saver(
            Path(config.out) / FOLDER,
            run=self.start.identity,
            attempt=self.start.attempt.number,
            about=about(config, corpus.digest, place.workers),
            tokenizer=corpus.tokenizer.to_str(),
            client=self.client,
            tables={spec.name: here.get(layer) for layer, spec in self.specs.items()},
            full_every=config.full_every,
            keep=config.keep,
            base=self.start.saved.manifest.name if self.start.saved else "",
        )

    def traffic_per_token(self) -> dict[str, float]:
        """Rows and bytes of rows this rank fetched over the wire per token read, so far."""
        if not isinstance(self.rows, RemoteRows):
            return {}
        traffic, tokens = self.rows.traffic, self.rows.tokens
        return {"rows_per_token": traffic.rows / tokens, "bytes_per_token": traffic.bytes / tokens}

    def _open_rows(self, config: TrainConfig, place: Place, device: str) -> RemoteRows | InProcessTables:
        saved = self.start.saved
        if saved is not None and saved.tables != self.specs:
            raise ValueError(f"checkpoint {saved.manifest.name} holds tables of another shape than this model's")
        if self.client is None:
            tables = {layer: RowTable(spec, filled=saved is None) for layer, spec in self.specs.items()}
            if saved is not None:
                for table in tables.values():
                    saved.checkpoints.restore(list(saved.chain), table)
            return InProcessTables(tables)
        if place.rank == 0:
            if saved is not None:
                restore_tables(self.client, Path(config.out) / FOLDER, saved.manifest, attempt=self.start.attempt)
            else:
                create_tables(self.client, list(self.specs.values()), replace=True)
        if place.workers > 1:
            dist.barrier()
            self.client.connections.refresh()
        assert config.model.engram is not None
        names = {layer: table_name(config.run, layer) for layer in self.specs}
        rows = RemoteRows(self.client, config.model.engram, names, device=device)
        step = rows.begin(
            attempt=self.start.attempt,
            worker=place.rank,
            workers=place.workers,
            durable=config.durable,
            bounded=config.staleness >= 0,
        )
        assert step == self.start.step, f"the shards stand at step {step}, the weights at {self.start.step}"
        return rows


def _steps(config: TrainConfig, place: Place, corpus: Corpus, setup: _Setup) -> Iterator[Progress]:
    model, done = setup.trainer.model, []
    curve: list[tuple[int, float]] = []
    evaluate_at = {round(config.steps * (point + 1) / config.evaluations) for point in range(config.evaluations - 1)}
    for step in setup.trainer.steps(after=setup.start.step):
        done.append(step)
        if problem := _save_if_due(config, setup, step.step):
            yield Progress(phase=problem)
        yield Progress(step=step)
        if place.rank == 0 and step.step in evaluate_at and step.step < config.steps:
            loss = validation_loss(model, setup.memory, corpus, length=config.length, limit=CURVE_TOKENS)
            curve.append((step.step, loss))
    result = summary(config, done, place.workers)
    traffic = setup.traffic_per_token()
    if place.rank == 0 and config.evaluations:
        yield Progress(phase="reading the validation files")
        limit = min(LAST_TOKENS, config.steps * config.batch * config.length * place.workers)
        loss = validation_loss(model, setup.memory, corpus, length=config.length, limit=limit)
        result |= {"validation_loss": loss, "curve": [*curve, (config.steps, loss)]}
        result |= _facts(corpus, setup) | traffic
    if config.save and setup.saver is not None:
        yield Progress(phase="saving the checkpoint")
        _save_last(config, setup, setup.saver, result)
    yield Progress(result=result)


def _save_if_due(config: TrainConfig, setup: _Setup, step: int) -> str:
    """Begins a checkpoint where one is due; returns what went wrong with it, or with the one before."""
    every = config.checkpoint_every
    if setup.saver is None or not every or step % every or step == config.steps:
        return ""
    try:
        setup.saver.begin(step, setup.trainer.model, setup.trainer.optimizer)
    except (EngridError, OSError) as error:
        return f"a checkpoint was not saved: {error}"
    return ""


def _save_last(config: TrainConfig, setup: _Setup, saver: Saver, result: dict[str, Any]) -> None:
    """All rows in one: it is what the model is served from."""
    saver.close()
    saver.begin(config.steps, setup.trainer.model, setup.trainer.optimizer, full=True)
    result["checkpoint"] = str(Path(config.out) / FOLDER / saver.wait())
    (Path(config.out) / "result.json").write_text(json.dumps({**result, "config": config.to_json()}, indent=1))


def _facts(corpus: Corpus, setup: _Setup) -> dict[str, Any]:
    """What the run read and fetched, and how its n-grams collide."""
    facts: dict[str, Any] = {
        "train_tokens": len(corpus.train),
        "validation_tokens": len(corpus.validation),
        "files": list(corpus.files),
        "parameters": sum(parameter.numel() for parameter in setup.trainer.model.parameters()),
        "table_values": sum(spec.rows * spec.width for spec in setup.specs.values()),
    }
    if setup.memory is None:
        return facts
    hasher = setup.memory.hasher
    text = setup.canonical.map(corpus.train.astype(np.int64))
    layer = next(iter(hasher.layers))
    lookups, _ = hasher.lookups(text[None], hasher.start(1))
    facts["collisions"] = [
        vars(count_collisions(each.order, windows(text, each.order, hasher.pad), each.row_ids))
        for each in lookups
        if each.layer == layer
    ]
    return facts
