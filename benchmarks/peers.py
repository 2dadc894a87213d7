"""Engrid beside other ways to fetch rows from another process: Redis, a Ray actor, Mooncake, and a raw socket.

Uniform ids, 16 heads a token. Ours: one shard, a table of 1 GiB, no cache, no shared memory. Theirs: a table of 2^20
rows, smaller because filling it takes long, which favours them; each is started, measured in turn with ours within each
repeat, and stopped before the next starts. Where a peer can have several requests in flight it is measured with four and
with one, and compared by whichever is faster.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from benchmarks.baselines.mooncake_engram import MooncakePeer
from benchmarks.baselines.peer import PeerUnavailableError, content
from benchmarks.baselines.raw_socket import RawSocketClient
from benchmarks.baselines.raw_socket import content as socket_content
from benchmarks.baselines.ray_call import RayPeer
from benchmarks.baselines.redis_mget import RedisPeer
from benchmarks.common import FP8_ROW_BYTES, HEADS, ROW_BYTES, about, bench_table, start_baseline, start_shards
from benchmarks.measure import IN_FLIGHT, Sample, Scale, Step, gathered, latencies, rate, ratios, uniform_steps
from benchmarks.paths import ByIds, Engrid, Flat
from benchmarks.report import Line, check_output, finish
from engrid.client import ClientConfig, MemoryClient
from engrid.control.tables import create_tables
from engrid.host.allocator import keep_buffers
from engrid.tables import RowTable, TableSpec

UNCACHED = ClientConfig(shared_memory=False, cache_bytes=0)
SIZES = (2048, 8192)
"""Rows a request; one token's 16 beside them for the latency."""
SLOW_STEPS = 2
"""Steps in one pass of a peer whose pass of 32 would take ten seconds."""


class Peer(ByIds, Protocol):
    """A system that was started for us."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Kind:
    """A peer and how it is measured."""

    name: str
    make: Callable[[int, int, int], Peer]
    in_flight: tuple[int, ...] = (IN_FLIGHT, 1)
    slow: bool = False
    widths: tuple[int, ...] = (ROW_BYTES,)


class SocketPeer(RawSocketClient):
    """baselines/raw_socket.py with its server."""

    def __init__(self, rows: int, row_bytes: int, seed: int) -> None:
        self._stack = ExitStack()
        options = ("--rows", str(rows), "--row-bytes", str(row_bytes), "--seed", str(seed))
        super().__init__(start_baseline(self._stack, "raw_socket", *options), row_bytes)

    def close(self) -> None:
        super().close()
        self._stack.close()


KINDS = {
    "socket": Kind("raw socket", SocketPeer, in_flight=(IN_FLIGHT,)),
    "redis": Kind("Redis MGET", RedisPeer),
    "ray_call": Kind("Ray actor call", RayPeer),
    "mooncake": Kind(
        "Mooncake EngramStore", MooncakePeer, in_flight=(1,), slow=True, widths=(ROW_BYTES, FP8_ROW_BYTES)
    ),
}


@dataclass
class Found:
    """Of one peer at one width; each list has one value per repeat."""

    kind: Kind
    row_bytes: int
    why_not: str = ""
    ours: dict[int, list[float]] = field(default_factory=dict)
    """By rows a request: rows a second, or at 16 rows the p50 in seconds."""
    theirs: dict[int, dict[int, list[float]]] = field(default_factory=dict)
    """The same, by rows a request and requests in flight."""

    def record(self, rows: int, ours: float, theirs: dict[int, float]) -> None:
        self.ours.setdefault(rows, []).append(ours)
        for in_flight, value in theirs.items():
            self.theirs.setdefault(rows, {}).setdefault(in_flight, []).append(value)

    def best(self, rows: int) -> list[float]:
        """Theirs with as many requests in flight as suits them best."""
        return max(self.theirs[rows].values(), key=statistics.median)


class Ours:
    """One shard with a table, and the path to it."""

    def __init__(self, stack: ExitStack, mib: int, row_bytes: int) -> None:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        start_shards(stack, folder, 1)
        client = stack.enter_context(MemoryClient(f"file:{folder}", UNCACHED))
        # float32 rows for 264 bytes too: Mooncake knows no others.
        self.spec = replace(bench_table(mib, row_bytes=ROW_BYTES), width=row_bytes // 4)
        create_tables(client, [self.spec])
        self.path = Engrid(client, self.spec.name)
        self.sample = Sample(gathered(RowTable(self.spec)))


def compare(kind: Kind, ours: Ours, scale: Scale, sizes: tuple[int, ...]) -> Found:
    """Starts a peer, measures it and ours in turn, stops it. sizes: rows a request; 16 is measured as p50."""
    found = Found(kind, ours.spec.row_bytes)
    large = kind.make is SocketPeer  # a socket's server needs no filling, so it gets a table as large as ours
    rows = ours.spec.rows if large else scale.peer_rows
    table = replace(ours.spec, rows=rows, buckets=(rows // HEADS,) * HEADS)
    try:
        peer = kind.make(rows, ours.spec.row_bytes, 0)
    except PeerUnavailableError as error:
        found.why_not = str(error)
        return found
    with ExitStack() as stack:
        stack.callback(peer.close)
        known = (socket_content if large else content)(rows, ours.spec.row_bytes, 0)
        sample = Sample(lambda ids: known[ids])
        for _ in range(scale.repeats):
            for size in sizes:
                mine, their = steps_of(ours.spec, size, scale), steps_of(table, size, scale)
                if size == HEADS:
                    a, _ = latencies(ours.path, mine, scale.calls, ours.sample)
                    b = {1: latencies(Flat(peer), their, scale.calls, sample)[0]}
                else:
                    few = their[: SLOW_STEPS if kind.slow else None]
                    a = rate(ours.path, mine, scale.seconds, ours.sample)
                    b = {count: rate(Flat(peer), few, scale.seconds, sample, count) for count in kind.in_flight}
                found.record(size, a, b)
    return found


def steps_of(spec: TableSpec, rows: int, scale: Scale) -> list[Step]:
    return uniform_steps(spec, rows // HEADS, scale.steps)


def lines_of(found: Found) -> list[Line]:
    if found.why_not:
        return [Line(what=f"{found.row_bytes} bytes", path=found.kind.name, unit="", note=found.why_not)]
    lines = []
    for rows, ours in found.ours.items():
        what = f"{rows:,} rows of {found.row_bytes} bytes"
        unit, factor = ("us, p50", 1e6) if rows == HEADS else ("Mrow/s", 1e-6)
        for in_flight, theirs in found.theirs[rows].items():
            better = ratios(theirs, ours) if rows == HEADS else ratios(ours, theirs)
            name = f"{found.kind.name}, {in_flight} in flight"
            lines.append(
                Line(what=what, path=name, unit=unit, values=[factor * value for value in theirs], over=better)
            )
        beside = f"Engrid beside {found.kind.name}"
        lines.append(Line(what=what, path=beside, unit=unit, values=[factor * value for value in ours]))
    return lines


def run(path: Path, *, repeats: int, quick: bool) -> None:
    """Measures, writes and shows."""
    check_output(path)
    keep_buffers()
    scale, machine = Scale.of(repeats, quick=quick), about()
    lines = []
    for width in (ROW_BYTES, FP8_ROW_BYTES):
        with ExitStack() as stack:
            ours = Ours(stack, scale.mib, width)
            for kind in KINDS.values():
                if width in kind.widths:
                    lines += lines_of(compare(kind, ours, scale, (HEADS, *SIZES)))
    lines.sort(key=lambda line: line.what)
    title = f"Engrid and other ways to fetch rows, uniform ids{' (smoke run)' * quick}"
    finish(path, title, "Engrid is better by", lines, machine)
