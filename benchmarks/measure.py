"""How anything here is measured: steps of ids, paths that deliver their rows, and a clock.

A path takes the steps of a model and yields their rows, so many steps ahead. Every path is driven by the same loop, and
of all it delivers one row in a hundred is copied while the clock runs and compared with the table when it has stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engrid.rpc.frames import Bytes, Ids
from engrid.tables import RowTable, TableSpec, encode_rows, initial_rows

IN_FLIGHT = 4
"""Requests under way where a path can have several."""
CHECKED = 100
"""One delivered row in so many is compared with the table."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of it all is done."""

    repeats: int
    seconds: float = 1.0
    """Of each path in each repeat."""
    mib: int = 1024
    """Of a table; beyond the processor's caches."""
    large_mib: int = 4096
    """Of the large table of `table_4g_vs_64m`."""
    steps: int = 32
    """Distinct steps that a path goes through in turn: one alone would lie in the processor's cache."""
    calls: int = 300
    """Calls, one at a time, for a percentile."""
    peer_rows: int = 1 << 20
    """Rows of the other systems' tables, a smaller one than ours where filling it takes minutes."""
    quick: bool = False
    """A smoke run: its figures mean nothing."""

    @staticmethod
    def of(repeats: int, *, quick: bool) -> Scale:
        if not quick:
            return Scale(repeats=repeats)
        return Scale(
            repeats=repeats, seconds=0.02, mib=8, large_mib=32, steps=4, calls=10, peer_rows=1 << 12, quick=True
        )


@dataclass(frozen=True)
class Step:
    """What one step asks of one table."""

    row_ids: Ids
    """int64 [T, heads], C-contiguous."""
    orders: tuple[tuple[Ids, Ids], ...] = ()
    """Where the ids come of text: of each order from 2 on its row ids [T, K] and its keys [T]."""

    @property
    def flat(self) -> Ids:
        """Row ids int64 [T * heads], not deduplicated."""
        return self.row_ids.reshape(-1)


class Path(Protocol):
    """A way to the rows."""

    def lookup(self, steps: Sequence[Step], in_flight: int) -> Iterator[Bytes]:
        """Rows of each step in order, uint8 [T * heads, row_bytes], valid until the next is asked for."""


def uniform_steps(spec: TableSpec, tokens: int, count: int, seed: int = 1) -> list[Step]:
    """Every head's rows drawn evenly."""
    rng = np.random.default_rng(seed)
    sizes = np.array(spec.buckets, np.int64)
    starts = np.cumsum(sizes) - sizes
    return [Step(rng.integers(0, sizes, (tokens, len(sizes))) + starts) for _ in range(count)]


class Sample:
    """One delivered row in a hundred, kept while the clock runs."""

    def __init__(self, expected: Callable[[Ids], Bytes]) -> None:
        """expected: the table's rows of int64 ids [n], uint8 [n, row_bytes]."""
        self._expected = expected
        self._skip = 0
        self._kept: list[tuple[Ids, Bytes]] = []
        self.compared = 0

    def keep(self, ids: Ids, rows: Bytes) -> None:
        """Copies what falls to this delivery."""
        if len(rows) != len(ids):
            raise SystemExit(f"{len(rows)} rows came for {len(ids)} ids")
        if self._skip < len(ids):
            self._kept.append((ids[self._skip :: CHECKED], rows[self._skip :: CHECKED].copy()))
        self._skip = (self._skip - len(ids)) % CHECKED

    def compare(self) -> None:
        """Ends the run where a row is not the one asked for."""
        if not self._kept:
            return
        ids = np.concatenate([ids for ids, _ in self._kept])
        rows = np.concatenate([rows for _, rows in self._kept])
        self._kept = []
        wrong = np.flatnonzero((self._expected(ids) != rows).any(axis=1))
        if len(wrong):
            raise SystemExit(
                f"{len(wrong)} of {len(ids)} rows compared are not the rows asked for, first row {ids[wrong[0]]}"
            )
        self.compared += len(ids)


def rows_of(spec: TableSpec) -> Callable[[Ids], Bytes]:
    """Initial rows by id, each made anew: slow, but without a second table."""

    def expected(ids: Ids) -> Bytes:
        return np.concatenate([encode_rows(initial_rows(spec, row, row + 1), spec.row_format) for row in ids.tolist()])

    return expected


def gathered(table: RowTable) -> Callable[[Ids], Bytes]:
    """Rows by id from a table in this process."""

    def expected(ids: Ids) -> Bytes:
        out = np.empty((len(ids), table.spec.row_bytes), np.uint8)
        table.gather(ids, out)
        return out

    return expected


def drive(path: Path, steps: Sequence[Step], seconds: float, sample: Sample, in_flight: int) -> tuple[int, float]:
    """Rows delivered and seconds taken, in whole passes over the steps, at least one; the sample is not compared yet."""
    rows, spent, started = 0, 0.0, time.perf_counter()
    while not rows or spent < seconds:
        for step, got in zip(steps, path.lookup(steps, in_flight), strict=True):
            rows += len(got)
            sample.keep(step.flat, got)
        spent = time.perf_counter() - started
    return rows, spent


def rate(path: Path, steps: Sequence[Step], seconds: float, sample: Sample, in_flight: int = IN_FLIGHT) -> float:
    """Rows a second."""
    rows, spent = drive(path, steps, seconds, sample, in_flight)
    sample.compare()
    return rows / spent


def latencies(path: Path, steps: Sequence[Step], calls: int, sample: Sample) -> tuple[float, float]:
    """p50 and p99 in seconds of one step at a time."""
    times: list[float] = []
    while len(times) < calls:
        delivered = path.lookup(steps, 1)
        for step in steps:
            begun = time.perf_counter()
            got = next(delivered)
            times.append(time.perf_counter() - begun)
            sample.keep(step.flat, got)
    sample.compare()
    p50, p99 = np.percentile(times[:calls], [50, 99])
    return float(p50), float(p99)


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Of each repeat."""
    return [one / other for one, other in zip(over, under, strict=True)]
