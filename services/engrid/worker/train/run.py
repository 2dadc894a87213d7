"""One rank of a training run, from the text to the checkpoint: what ComputeService.Train does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from engrid.addressing.canonical import CanonicalVocabulary
from engrid.addressing.hashing import NgramHasher
from engrid.client import MemoryClient
from engrid.control.checkpoints import check_folder, check_replaces, restore_tables
from engrid.control.tables import create_tables
from engrid.model.generate import Memory
from engrid.model.rows import InProcessTables
from engrid.model.transformer import Transformer
from engrid.rpc.errors import DeadlineExceededError, EngridError, RunMismatchError
from engrid.tables import RowTable, TableSpec
from engrid.worker.config import TrainConfig
from engrid.worker.dense import load_dense
from engrid.worker.rows.remote import RemoteRows
from engrid.worker.rows.tables import table_name, table_specs
from engrid.worker.saved_model import FOLDER

from .collisions import count_collisions, windows
from .corpus import Corpus, prepare
from .resume import Start, about, resume, start_anew
from .saving import Saver
from .stopping import Stopping
from .trainer import Batches, Step, TrainableRows, Trainer, summary, validation_loss

CURVE_TOKENS = 8192
"""Validation tokens of a point on the curve."""
LAST_TOKENS = 98_304
"""Validation tokens of its last point, which is the loss reported; no more than were trained on."""
RENDEZVOUS_TIMEOUT = timedelta(seconds=120)
MEET_TIMEOUT = timedelta(seconds=2)
"""Of one try to reach worker 0."""
MEET_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Progress:
    """Something to tell the user."""

    phase: str = ""
    notice: str = ""
    """Something to keep: a line of its own."""
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


def train(
    config: TrainConfig,
    place: Place,
    connect: Callable[[], MemoryClient],
    device: str,
    stopping: Stopping | None = None,
) -> Iterator[Progress]:
    """Trains, yielding what happens; closing the iterator stops it. The last Progress holds the result.

    A checkpoint that could not be saved is told in a Progress and training goes on, but for the last one, which raises.
    stopping: ends the run from another thread: after the step under way, which is saved then, or at once, which raises
    CancelledError.

    Rank 0 makes the tables, writes the checkpoint and measures; the others yield a result of their steps alone.
    """
    stopping = stopping or Stopping()
    if config.memory == "off":
        config = replace(config, model=replace(config.model, engram=None))
    if config.memory == "in_process" and place.workers > 1:
        raise ValueError("tables in process serve one worker; use memory 'remote' for more")
    out = Path(config.out)
    yield Progress(phase="learning the tokenizer and encoding the text")
    roots = [Path(each) for each in config.text]
    corpus = prepare(out, vocab_size=config.model.vocab_size, roots=roots, stopping=stopping)
    if place.rank == 0:
        yield Progress(
            notice=f"{corpus.text.describe()}; {corpus.files[0]} documents to train on, {corpus.files[1]} to validate"
        )
    with ExitStack() as stack:
        stack.enter_context(process_group(place, stopping))
        check_same_text(corpus, place)
        yield Progress(phase="making the tables")
        client = None
        if config.memory == "remote":
            client = stack.enter_context(connect())
            stack.enter_context(stopping.cutting(client.close))
        if config.resume:
            start = resume(config, corpus, place.rank, place.workers, client)
        else:
            start = start_anew(config, place.identity)
        setup = _Setup(config, place, corpus, client, device, start, stopping)
        if setup.saver is not None:
            stack.callback(setup.saver.close)
        yield from _steps(config, place, corpus, setup)


@contextmanager
def process_group(place: Place, stopping: Stopping) -> Iterator[None]:
    """torch.distributed over gloo, where there are several workers. Raises CancelledError while it waits for them."""
    if place.workers == 1:
        yield
        return
    store = _meet(place, stopping)
    dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.workers, timeout=RENDEZVOUS_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _meet(place: Place, stopping: Stopping) -> Any:
    """The store that all workers of a run share, once all have come. Raises DeadlineExceededError where one does not."""
    host, _, port = place.rendezvous.rpartition(":")
    until = time.monotonic() + RENDEZVOUS_TIMEOUT.total_seconds()
    store: Any = None
    while store is None:
        stopping.check()
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                host, int(port), place.workers, place.rank == 0, timeout=MEET_TIMEOUT, wait_for_workers=False
            )
        except dist.DistNetworkError:
            if place.rank == 0:
                raise  # the port is taken
        except dist.DistStoreError:
            if time.monotonic() > until:
                raise
        if store is None and time.monotonic() > until:
            raise DeadlineExceededError(f"worker 0 does not answer at {place.rendezvous}; is its machine reachable?")
    store.set_timeout(RENDEZVOUS_TIMEOUT)
    here = [f"here-{rank}" for rank in range(place.workers)]
    store.set(here[place.rank], "")
    while missing := [name for name in here if not store.check([name])]:
        if time.monotonic() > until:
            raise DeadlineExceededError(
                f"workers {', '.join(name.removeprefix('here-') for name in missing)} did not come within "
                f"{RENDEZVOUS_TIMEOUT.total_seconds():g} s"
            )
        stopping.wait(MEET_POLL_SECONDS)
    return store


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
        stopping: Stopping,
    ) -> None:
        self.client, self.start, self.stopping = client, start, stopping
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
        self.trainer = Trainer(
            config, model, batches, memory=self.memory, rows=rows, workers=place.workers, stopping=stopping
        )
        if start.saved is not None:
            load_dense(start.saved, model, self.trainer.optimizer)
            if place.rank == 0:
                start.saved.checkpoints.clean()  # what an older attempt is still writing goes the next time
        if saves:
            self.saver = self._open_saver(config, place, corpus)

    def _open_saver(self, config: TrainConfig, place: Place, corpus: Corpus) -> Saver:
        here = self.rows.tables if isinstance(self.rows, InProcessTables) else {}
        return Saver(
            Path(config.out) / FOLDER,
            run=self.start.identity,
            attempt=self.start.attempt.number,
            about=about(config, corpus, place.workers),
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
            if not config.replace:
                check_replaces(self.client, [spec.name for spec in self.specs.values()], self.start.identity)
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
        if step != self.start.step:
            raise RunMismatchError(
                f"the shards stand at step {step} of run {config.run}, the weights at {self.start.step}: another process changed "
                "the tables meanwhile. Resume from a checkpoint"
            )
        return rows


def _steps(config: TrainConfig, place: Place, corpus: Corpus, setup: _Setup) -> Iterator[Progress]:
    model, done = setup.trainer.model, []
    curve: list[tuple[int, float]] = []
    evaluate_at = {round(config.steps * (point + 1) / config.evaluations) for point in range(config.evaluations - 1)}
    for step in setup.trainer.steps(after=setup.start.step):
        done.append(step)
        if problem := _save_if_due(config, setup, step.step):
            yield Progress(notice=problem)
        yield Progress(step=step)
        if place.rank == 0 and step.step in evaluate_at and step.step < config.steps:
            loss = validation_loss(
                model, setup.memory, corpus, length=config.length, limit=CURVE_TOKENS, stopping=setup.stopping
            )
            curve.append((step.step, loss))
    result = summary(config, done, place.workers)
    stopped = done[-1].step < config.steps
    if stopped:
        result["stopped"] = True
    elif place.rank == 0 and config.evaluations:
        yield Progress(phase="reading the validation files")
        result |= _measure(config, place, corpus, setup, curve)
    if setup.saver is not None and (config.save or stopped):
        yield Progress(phase="saving the checkpoint")
        result["checkpoint"] = str(
            Path(config.out) / FOLDER / _save_last(setup, setup.saver, done[-1].step, stopped=stopped)
        )
        if not stopped:
            content = json.dumps({**result, "config": config.to_json()}, indent=1)
            (Path(config.out) / "result.json").write_text(content, encoding="utf-8")
        if problem := setup.saver.take_notice():
            yield Progress(notice=problem)
    yield Progress(result=result)


def _measure(
    config: TrainConfig, place: Place, corpus: Corpus, setup: _Setup, curve: list[tuple[int, float]]
) -> dict[str, Any]:
    """Validation loss after the last step, and what the run read and fetched."""
    traffic = setup.traffic_per_token()
    limit = min(LAST_TOKENS, config.steps * config.batch * config.length * place.workers)
    loss = validation_loss(
        setup.trainer.model, setup.memory, corpus, length=config.length, limit=limit, stopping=setup.stopping
    )
    return {"validation_loss": loss, "curve": [*curve, (config.steps, loss)], **_facts(corpus, setup), **traffic}


def _save_if_due(config: TrainConfig, setup: _Setup, step: int) -> str:
    """Begins a checkpoint where one is due; returns what went wrong with it, or with the one before."""
    every = config.checkpoint_every
    if setup.saver is None or not every or step % every or step == config.steps:
        return ""
    try:
        setup.saver.begin(step, setup.trainer.model, setup.trainer.optimizer)
    except (EngridError, OSError) as error:
        return f"a checkpoint was not saved: {error}"
    return setup.saver.take_notice()


def _save_last(setup: _Setup, saver: Saver, step: int, *, stopped: bool) -> str:
    """The name of the checkpoint of the last step. At the end of a run it holds all rows: it is what the model is served
    from; of a run that was stopped it may hold what changed, which is quick."""
    saver.close()
    if saver.step != step:
        saver.begin(step, setup.trainer.model, setup.trainer.optimizer, full=not stopped)
    return saver.wait()


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
