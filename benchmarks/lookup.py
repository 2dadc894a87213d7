"""Lookups along each axis from one base point: kind of ids, width of rows, tokens a step, shards, clients.

The base is uniform ids, rows of 128 bytes, 4,096 tokens of 16 rows a step, 2 shards, one client, a live table of 1 GiB,
four steps in flight, and alone one (the p50 and p99 in the notes). From there one thing is varied at a time. Real text is Python's standard library through DeepSeek's
tokenizer, hashed by the paper preset (rows of 128 bytes) and by v41 (24 rows of 264 bytes a token), scaled to the same
size; its keys are known, so rows are deduplicated before they are asked for. Rows are counted as delivered, at every
position. The raw socket and the naive path hold tables of as many rows.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.baselines.naive import NaiveClient
from benchmarks.baselines.naive import content as naive_content
from benchmarks.baselines.raw_socket import RawSocketClient
from benchmarks.common import FP8_ROW_BYTES, HEADS, ROW_BYTES, about, bench_table, start_baseline, start_shards
from benchmarks.load import Clients
from benchmarks.measure import Path as Way
from benchmarks.measure import Sample, Scale, Step, gathered, latencies, rate, ratios, uniform_steps
from benchmarks.paths import Engrid, Flat, Local, Naive
from benchmarks.peers import UNCACHED
from benchmarks.report import Line, check_output, finish
from benchmarks.text import Text, head_rows, text_table
from engrid.client import MemoryClient
from engrid.control.tables import create_tables
from engrid.host.allocator import keep_buffers
from engrid.tables import RowTable, TableSpec

LOCAL, PRODUCT = "in process", "Engrid"
WINDOWS = 16
"""Of 4,096 tokens, from which the steps of text are taken."""
STEP_BYTES = 128 << 20
"""Of rows that one pass over the steps delivers: enough to leave the processor's caches, at any step size."""


@dataclass(frozen=True)
class Point:
    """One place along one axis; the defaults are the base."""

    ids: str = "uniform"
    """uniform, or a preset whose text is looked up."""
    row_bytes: int = ROW_BYTES
    tokens: int = 4096
    shards: int = 2

    @property
    def store(self) -> tuple[str, int, int]:
        """What has to be started anew where it differs."""
        return self.ids, self.row_bytes, self.shards

    def __str__(self) -> str:
        what = "uniform ids" if self.ids == "uniform" else f"text, {self.ids}"
        tokens = f"{self.tokens:,} token{'s' * (self.tokens > 1)}"
        return f"{what}, {self.row_bytes} bytes, {tokens}, {self.shards} shard{'s' * (self.shards > 1)}"


BASE = Point()
POINTS = (
    BASE,
    replace(BASE, tokens=256),
    replace(BASE, tokens=1),
    replace(BASE, shards=1),
    replace(BASE, shards=4),
    replace(BASE, row_bytes=FP8_ROW_BYTES),
    replace(BASE, ids="paper"),
    replace(BASE, ids="v41", row_bytes=FP8_ROW_BYTES),
)
CLIENTS = (1, 2, 4, 8)
QUICK_POINTS = (BASE, replace(BASE, ids="v41", row_bytes=FP8_ROW_BYTES))
QUICK_CLIENTS = (1, 2)


class Store:
    """A table in shards, in the baselines' servers and in this process, and the ways to all of them."""

    def __init__(self, stack: ExitStack, point: Point, scale: Scale, text: Text) -> None:
        if point.ids == "uniform":
            self.spec = bench_table(scale.mib, row_bytes=point.row_bytes)
        else:
            self._hasher = text.hasher(point.ids, head_rows(point.ids, scale.mib))
            self.spec = text_table(self._hasher, point.ids)
        self._text = text
        self.folder = stack.enter_context(tempfile.TemporaryDirectory())
        self.shards = start_shards(stack, self.folder, point.shards)
        client = stack.enter_context(MemoryClient(f"file:{self.folder}", UNCACHED))
        create_tables(client, [self.spec])
        table = RowTable(self.spec)
        sample = Sample(gathered(table))
        self.ways: dict[str, tuple[Way, Sample]] = {
            LOCAL: (Local(table), sample),
            PRODUCT: (Engrid(client, self.spec.name), sample),
            **baselines(stack, self.spec, point.shards),
        }

    def steps(self, point: Point, scale: Scale) -> list[Step]:
        size = point.tokens * len(self.spec.buckets) * self.spec.row_bytes
        count = min(max(scale.steps, STEP_BYTES // size), 256) if not scale.quick else scale.steps
        if point.ids == "uniform":
            return uniform_steps(self.spec, point.tokens, count)
        return self._text.steps(self._hasher, point.tokens)[:count]


def baselines(stack: ExitStack, spec: TableSpec, shards: int) -> dict[str, tuple[Way, Sample]]:
    """One raw socket whatever the shards; the naive path over as many."""
    part = -(-spec.rows // shards)
    width = ("--row-bytes", str(spec.row_bytes))
    socket = RawSocketClient(start_baseline(stack, "raw_socket", "--rows", str(spec.rows), *width), spec.row_bytes)
    stack.callback(socket.close)
    addresses = [start_baseline(stack, "naive", "--rows", str(part), *width) for _ in range(shards)]
    naive = NaiveClient(addresses, part, spec.row_bytes)
    stack.callback(naive.close)
    # One array serves both: numpy draws the rows of the shorter table as the first of the longer.
    known = naive_content(spec.rows, spec.row_bytes, 0)
    return {
        "raw socket": (Flat(socket), Sample(lambda ids: known[ids])),
        "naive": (Naive(naive), Sample(lambda ids: known[ids % part])),
    }


def measure(store: Store, point: Point, scale: Scale) -> list[Line]:
    """All ways in turn within each repeat: throughput, then one step at a time."""
    steps = store.steps(point, scale)
    rates: dict[str, list[float]] = {name: [] for name in store.ways}
    waits: dict[str, list[tuple[float, float]]] = {name: [] for name in store.ways}
    calls = scale.calls if point.tokens < BASE.tokens else max(10, scale.calls // 10)
    for way, sample in store.ways.values():
        latencies(way, steps, 1, sample)
    for _ in range(scale.repeats):
        for name, (way, sample) in store.ways.items():
            rates[name].append(rate(way, steps, scale.seconds / 2, sample))
            waits[name].append(latencies(way, steps, calls, sample))
    lines = []
    for name, values in rates.items():
        p50 = sorted(p50 for p50, _ in waits[name])[len(values) // 2]
        p99 = sorted(p99 for _, p99 in waits[name])[len(values) // 2]
        note = f"alone p50 {1e6 * p50:,.0f} us, p99 {1e6 * p99:,.0f} us"
        over = ratios(values, rates[LOCAL])
        mrows = [value / 1e6 for value in values]
        lines.append(Line(what=str(point), path=name, unit="Mrow/s", values=mrows, over=over, note=note))
    return lines


def by_clients(store: Store, scale: Scale, counts: tuple[int, ...], local: list[float]) -> list[Line]:
    """Client processes at the base point, all of them started first. local: Mrow/s of each repeat in one process."""
    lines = []
    with ExitStack() as stack:
        loads = {
            count: Clients(stack, count, store.folder, store.spec.name, tokens=BASE.tokens // 8, steps=scale.steps)
            for count in counts
        }
        found = {
            count: [clients.run(scale.seconds, store.shards) for _ in range(scale.repeats)]
            for count, clients in loads.items()
        }
    for count, each in found.items():
        rates = [load.rows_per_second / 1e6 for load in each]
        per_core = sorted(load.rows_per_cpu_second / 1e6 for load in each)[len(each) // 2]
        lines.append(
            Line(
                what=f"{HEADS * BASE.tokens // 8:,} rows a request, client processes",
                path=f"Engrid, {count} client{'s' * (count > 1)}",
                unit="Mrow/s",
                values=rates,
                over=ratios(rates, local),
                note=f"{per_core:.2f} Mrow per second of CPU time, clients and shards",
            )
        )
    return lines


def run(path: Path, *, repeats: int, quick: bool) -> None:
    """Measures, writes and shows."""
    check_output(path)
    keep_buffers()
    scale, machine = Scale.of(repeats, quick=quick), about()
    text = Text((scale.steps if quick else WINDOWS) * BASE.tokens)
    points = QUICK_POINTS if quick else POINTS
    lines: list[Line] = []
    for key in dict.fromkeys(point.store for point in points):
        here = [point for point in points if point.store == key]
        with ExitStack() as stack:
            store = Store(stack, here[0], scale, text)
            for point in here:
                lines += measure(store, point, scale)
            if BASE in here:
                local = next(line.values for line in lines if line.path == LOCAL and line.what == str(BASE))
                lines += by_clients(store, scale, QUICK_CLIENTS if quick else CLIENTS, local)
    title = f"Lookups of a {scale.mib} MiB table{' (smoke run)' * quick}"
    finish(path, title, "over in process", lines, machine)
