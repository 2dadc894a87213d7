"""The measurements behind the marks of the data plane; each part starts what it needs and stops it."""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

from benchmarks import model
from benchmarks.baselines.stream_echo import EchoClient
from benchmarks.common import HEADS, ROW_BYTES, bench_table, start_baseline, start_shards
from benchmarks.load import Clients
from benchmarks.measure import Sample, Scale, latencies, ratios, rows_of, uniform_steps
from benchmarks.paths import Engrid
from benchmarks.peers import KINDS, UNCACHED, Ours, compare
from engrid.client import MemoryClient
from engrid.control.tables import create_tables

REQUEST = 8192
"""Rows in one bulk request."""
SMALL_MIB = 64
THREADS = 1
"""Of torch, so that shards and gRPC find a core."""


@dataclass
class Figures:
    """What parts found."""

    values: dict[str, list[float]] = field(default_factory=dict)
    """By name, one per repeat."""
    notes: dict[str, str] = field(default_factory=dict)
    """By name: why it could not be measured, or what to know about it."""

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)


def bulk(stack: ExitStack, scale: Scale, figures: Figures) -> None:
    """8,192 uniform rows a request from one shard, in turn with each peer."""
    ours = Ours(stack, scale.mib, ROW_BYTES)
    for name, kind in KINDS.items():
        found = compare(kind, ours, scale, (REQUEST,))
        if found.why_not:
            figures.notes[f"uncached_vs_{name}"] = found.why_not
            continue
        figures.values[f"uncached_vs_{name}"] = ratios(found.ours[REQUEST], found.best(REQUEST))
        for in_flight, theirs in found.theirs[REQUEST].items():
            figures.values[f"{name}_{in_flight}_in_flight_mrows"] = [value / 1e6 for value in theirs]
        figures.values.setdefault("uncached_mrows", []).extend(value / 1e6 for value in found.ours[REQUEST])


def token(stack: ExitStack, scale: Scale, figures: Figures) -> None:
    """One token's 16 rows, half of them on each of two shards, beside an echo of as many bytes."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    start_shards(stack, folder, 2)
    echo = EchoClient(start_baseline(stack, "stream_echo"))
    stack.callback(echo.close)
    client = stack.enter_context(MemoryClient(f"file:{folder}", UNCACHED))
    spec = bench_table(min(scale.mib, 128))
    create_tables(client, [spec])
    path, sample, steps = Engrid(client, spec.name), Sample(rows_of(spec)), uniform_steps(spec, 1, 256)
    latencies(path, steps, scale.calls, sample)
    for _ in range(scale.repeats):
        p50, p99 = latencies(path, steps, 3 * scale.calls, sample)
        floor = echo_p50(echo, HEADS * ROW_BYTES, 3 * scale.calls)
        figures.add("one_token_vs_echo", p50 / floor)
        figures.add("one_token_p99_over_p50", p99 / p50)
        figures.add("one_token_us", p50 * 1e6)


def echo_p50(echo: EchoClient, size: int, calls: int) -> float:
    """Seconds for a message of `size` bytes there and back."""
    message, times = bytes(size), []
    for _ in range(calls):
        begun = time.perf_counter()
        echo.call(message)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def per_core(stack: ExitStack, scale: Scale, figures: Figures) -> None:
    """Rows per second of CPU time on all sides: a table of 4 GiB over one of 64 MiB, eight clients over one.

    Clients are processes. Two shards, cut between heads.
    """
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    shards = start_shards(stack, folder, 2)
    tables = {"small": bench_table(SMALL_MIB, name="small"), "large": bench_table(scale.large_mib, name="large")}
    with MemoryClient(f"file:{folder}", UNCACHED) as client:
        create_tables(client, list(tables.values()))
    sizes = {"tokens": REQUEST // HEADS, "steps": scale.steps}
    small = Clients(stack, 1, folder, "small", **sizes)
    large = Clients(stack, 1, folder, "large", **sizes)
    eight = Clients(stack, 2 if scale.quick else 8, folder, "small", **sizes)
    for _ in range(scale.repeats):
        on_small, on_large, of_eight = (clients.run(scale.seconds, shards) for clients in (small, large, eight))
        figures.add("table_4g_vs_64m", on_large.rows_per_cpu_second / on_small.rows_per_cpu_second)
        figures.add("clients_8_vs_1", of_eight.rows_per_cpu_second / on_small.rows_per_cpu_second)
        figures.add("clients_1_mrows", on_small.rows_per_second / 1e6)
        figures.add("clients_8_mrows", of_eight.rows_per_second / 1e6)


def demo_model(stack: ExitStack, scale: Scale, figures: Figures) -> None:
    """Tokens/s over remote tables, gRPC with the cache for the marks, the other ways beside."""
    found = model.measure(stack, scale, threads=THREADS)
    for job, name in (
        (model.PREFILL, "model_prefill"),
        (model.DECODE, "model_decode"),
        (model.SINGLE, "model_decode_1"),
    ):
        ways = found[job]
        local = ways[model.LOCAL].rates
        figures.values[f"{name}_vs_local"] = ratios(ways[model.GRPC].rates, local)
        figures.values[f"{name}_uncached_vs_local"] = ratios(ways[model.UNCACHED].rates, local)
        figures.values[f"{name}_shared_vs_local"] = ratios(ways[model.SHARED].rates, local)
    figures.values["exposed_wait_share"] = found[model.PREFILL][model.GRPC].waited
    figures.values["exposed_wait_share_local"] = found[model.PREFILL][model.LOCAL].waited
