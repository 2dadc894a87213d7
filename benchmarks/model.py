"""The demo model over remote rows and over in-process tables: tokens/s of prefill and decoding, and what it waits.

The model has random weights and a context of 4,096 (speed does not depend on what it learned); its tables lie sealed in two
shard processes on the same cores. The text is Python's standard library, new text in each repeat; decoding reads the text
itself on, token by token, for all sequences at once, and picks the likeliest token without using it. All ways take turns
within a repeat, read the same tokens, and must give the same logits bit by bit.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import about, load_sealed, start_shards
from benchmarks.measure import Scale, ratios
from benchmarks.report import Line, check_output, finish
from engrid.addressing.canonical import CanonicalVocabulary
from engrid.addressing.hashing import NgramHasher
from engrid.addressing.lookup import Ids
from engrid.client import ClientConfig, MemoryClient
from engrid.host.allocator import keep_buffers
from engrid.model.generate import PREFILL_CHUNK, Decoder, Memory
from engrid.model.rows import InProcessTables, RowSource
from engrid.model.transformer import Transformer
from engrid.tables import RowTable
from engrid.worker.config import demo_model
from engrid.worker.rows.remote import RemoteRows
from engrid.worker.rows.tables import sealed_spec, table_specs
from engrid.worker.serve.engine import TimedRows
from engrid.worker.train.corpus import prepare
from engrid.worker.train.text import standard_library

LOCAL = "in process"
GRPC, UNCACHED, SHARED = "gRPC, cache", "gRPC, no cache", "shared memory"
WAYS = {
    GRPC: ClientConfig(shared_memory=False),
    UNCACHED: ClientConfig(shared_memory=False, cache_bytes=0),
    SHARED: ClientConfig(),
}
PROMPT = 32
"""Tokens that each sequence has before it is decoded."""


@dataclass(frozen=True)
class Job:
    """What the model is asked to do."""

    name: str
    batch: int
    read: int
    """Tokens of each sequence read at once before or, where nothing is decoded, while the clock runs."""
    decoded: int = 0
    """Tokens of each sequence read one by one while the clock runs."""

    @property
    def tokens(self) -> int:
        """Counted, of all sequences."""
        return self.batch * (self.decoded or self.read)


PREFILL = "prefill, 4,096 tokens"
DECODE, SINGLE = "decoding, batch 32", "decoding, batch 1"
JOBS = (Job(PREFILL, 1, 4096), Job(DECODE, 32, PROMPT, 48), Job(SINGLE, 1, PROMPT, 200))
QUICK_JOBS = (Job(PREFILL, 1, 64), Job(DECODE, 32, 4, 2), Job(SINGLE, 1, 4, 2))


@dataclass
class Run:
    """One job done once."""

    tokens_per_second: float
    waited: float
    """Share of the time that the model's thread spent in the row source."""
    logits: torch.Tensor


class Bench:
    """A model and its row sources."""

    def __init__(self, stack: ExitStack, scale: Scale) -> None:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        roots = [standard_library() / "email"] if scale.quick else []
        corpus = prepare(Path(folder), vocab_size=600 if scale.quick else 4096, roots=roots)
        self.text = corpus.train.astype(np.int64)
        self._canonical = CanonicalVocabulary(corpus.tokenizer)
        config = replace(demo_model(), context=4096)
        assert config.engram is not None
        self._hasher = NgramHasher.over(config.engram, self._canonical)
        self._model = Transformer(config).eval()
        specs = {
            layer: sealed_spec(spec, "1") for layer, spec in table_specs("model", self._hasher, trained=False).items()
        }
        tables = {layer: RowTable(spec) for layer, spec in specs.items()}
        start_shards(stack, folder, 2)
        with MemoryClient(f"file:{folder}") as client:
            for layer, spec in specs.items():
                load_sealed(client, spec, tables[layer])
        self.sources: dict[str, RowSource] = {LOCAL: InProcessTables(tables)}
        for name, how in WAYS.items():
            client = stack.enter_context(MemoryClient(f"file:{folder}", how))
            names = {layer: spec.name for layer, spec in specs.items()}
            self.sources[name] = RemoteRows(client, config.engram, names)

    def run(self, job: Job, source: RowSource, ids: Ids) -> Run:
        """ids: [batch, read + decoded]."""
        timed = TimedRows(source)
        decoder = Decoder(self._model, Memory(self._canonical, self._hasher, timed), job.batch)
        if job.decoded:
            decoder.step(ids[:, : job.read])
        before, started = timed.seconds, time.perf_counter()
        if not job.decoded:
            for logits, _ in decoder.read(ids, PREFILL_CHUNK):
                last = logits[:, -1]
        for at in range(job.read, job.read + job.decoded):
            last = decoder.step(ids[:, at : at + 1])[:, -1]
            last.argmax(-1)
        spent = time.perf_counter() - started
        return Run(job.tokens / spent, (timed.seconds - before) / spent, last)

    def part(self, job: Job, repeat: int) -> Ids:
        """Text that no other repeat reads, as long as there is enough of it."""
        length = job.read + job.decoded
        size = job.batch * length
        start = (size * repeat) % (len(self.text) - size)
        return self.text[start : start + size].reshape(job.batch, length)


@dataclass
class Found:
    """Of one job and way, one value per repeat."""

    rates: list[float]
    waited: list[float]


def measure(stack: ExitStack, scale: Scale, *, threads: int) -> dict[str, dict[str, Found]]:
    """By job and way. threads: of torch."""
    torch.set_num_threads(threads)
    bench = Bench(stack, scale)
    found = {}
    for job in QUICK_JOBS if scale.quick else JOBS:
        found[job.name] = {name: Found([], []) for name in bench.sources}
        for repeat in range(-1, scale.repeats):  # the first is not counted
            names = list(bench.sources)
            turn = repeat % len(names)
            ids = bench.part(job, repeat + 1)
            runs = {name: bench.run(job, bench.sources[name], ids) for name in (*names[turn:], *names[:turn])}
            for name, run in runs.items():
                if not torch.equal(run.logits, runs[LOCAL].logits):
                    raise SystemExit(f"{job.name}: the logits over {name} are not those over in-process tables")
                if repeat >= 0:
                    found[job.name][name].rates.append(run.tokens_per_second)
                    found[job.name][name].waited.append(run.waited)
    return found


def lines_of(found: dict[str, dict[str, Found]]) -> list[Line]:
    lines = []
    for job, ways in found.items():
        for name, each in ways.items():
            over = ratios(each.rates, ways[LOCAL].rates)
            lines.append(Line(what=job, path=name, unit="tokens/s", values=each.rates, over=over))
    for job, ways in found.items():
        for name, each in ways.items():
            lines.append(Line(what=f"exposed wait, {job}", path=name, unit="share of the time", values=each.waited))
    return lines


def run(path: Path, *, repeats: int, quick: bool, threads: int) -> None:
    """Measures, writes and shows."""
    check_output(path)
    keep_buffers()
    machine = about()
    with ExitStack() as stack:
        found = measure(stack, Scale.of(repeats, quick=quick), threads=threads)
    title = f"The demo model, {threads} torch thread{'s' * (threads > 1)}, 2 shards on the same cores{' (smoke run)' * quick}"
    finish(path, title, "over in process", lines_of(found), machine)
