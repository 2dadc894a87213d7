"""The ways to the rows that are compared."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from benchmarks.baselines.naive import NaiveClient
from benchmarks.measure import Step
from engrid.client import MemoryClient, Pending, RowLookup
from engrid.rpc.frames import Bytes, Ids, row_view
from engrid.tables import RowTable


def lookups_of(table: str, step: Step) -> list[RowLookup]:
    """As the client takes them: an order each where keys are known, else all heads in one."""
    if not step.orders:
        return [RowLookup(table, step.row_ids)]
    return [RowLookup(table, ids, keys, order) for order, (ids, keys) in enumerate(step.orders, 2)]


class Engrid:
    """The product, however its client is configured."""

    def __init__(self, client: MemoryClient, table: str) -> None:
        self._client = client
        self._table = table

    def lookup(self, steps: Sequence[Step], in_flight: int) -> Iterator[Bytes]:
        under_way: deque[Pending] = deque()
        for step in steps:
            under_way.append(self._client.prefetch(lookups_of(self._table, step)))
            if len(under_way) == in_flight:
                yield self._rows(under_way.popleft())
        while under_way:
            yield self._rows(under_way.popleft())

    def _rows(self, pending: Pending) -> Bytes:
        rows = pending.rows(self._table)
        return rows.reshape(-1, rows.shape[-1])


class Local:
    """The bound of them all: np.take in this process of the ids as they are, into one reused output."""

    def __init__(self, table: RowTable) -> None:
        self._rows = row_view(table.raw(0, len(table)))
        self._out = np.empty((0, table.spec.row_bytes), np.uint8)

    def lookup(self, steps: Sequence[Step], _in_flight: int) -> Iterator[Bytes]:
        for step in steps:
            ids = step.flat
            if len(self._out) < len(ids):
                self._out = np.empty((len(ids), self._out.shape[1]), np.uint8)
            out = self._out[: len(ids)]
            np.take(self._rows, ids, out=row_view(out), mode="clip")
            yield out


class Naive:
    """One unary call per shard, one step in flight (baselines/naive.py)."""

    def __init__(self, client: NaiveClient) -> None:
        self._client = client

    def lookup(self, steps: Sequence[Step], _in_flight: int) -> Iterator[Bytes]:
        for step in steps:
            yield self._client.lookup(step.flat)


class ByIds(Protocol):
    """A baseline that takes batches of ids."""

    def lookup(self, batches: list[Ids], in_flight: int) -> Iterator[Bytes]: ...


class Flat:
    """A baseline given each step's ids as they are."""

    def __init__(self, baseline: ByIds) -> None:
        self._baseline = baseline

    def lookup(self, steps: Sequence[Step], in_flight: int) -> Iterator[Bytes]:
        return self._baseline.lookup([step.flat for step in steps], in_flight)
