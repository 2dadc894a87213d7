"""The memory shards as the model's row source."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from engrid.addressing.lookup import Lookup
from engrid.addressing.spec import EngramSpec
from engrid.client import Attempt, MemoryClient, Pending, RowLookup, Traffic, TrainingRun
from engrid.rpc.errors import ShardUnavailableError
from engrid.rpc.frames import Bytes, Floats, Ids

from .device import DeviceRows, to_device

PAUSE = 0.05
"""Seconds before a shard that is away is asked again."""


class RemoteRows:
    """RowSource over a MemoryClient: of sealed tables, or of live ones, whose lookups wait for the step pushed last."""

    def __init__(
        self,
        client: MemoryClient,
        spec: EngramSpec,
        tables: Mapping[int, str],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        """tables: name of each Engram layer's table."""
        self._client = client
        self._spec = spec
        self._tables = dict(tables)
        self._device_rows = to_device(torch.device(device))
        self._identity = ""
        self._run: TrainingRun | None = None
        self._step = 0
        self._bounded = True
        self.read_step = 0
        """The step whose rows were read last, or an older one."""
        self.traffic = Traffic()
        """Asked for over the wire through this source."""
        self.tokens = 0
        """Positions looked up, per layer and order."""

    def begin(self, *, attempt: Attempt, worker: int, workers: int, durable: bool = False, bounded: bool = True) -> int:
        """Opens a training run on the tables; returns the step they are at.

        durable: as of TrainingRun. bounded: rows read hold the step pushed last; else whatever is there.
        """
        self._run = TrainingRun(
            self._client,
            run=attempt.run,
            attempt=attempt,
            worker=worker,
            workers=workers,
            tables=list(self._tables.values()),
            durable=durable,
        )
        self._identity, self._step, self._bounded = attempt.run, self._run.step, bounded
        return self._step

    def prefetch(self, lookups: Sequence[Lookup]) -> RemotePending:
        """See RowSource; the requests leave before this returns."""
        for lookup in lookups:
            if lookup.layer not in self._tables:
                raise ValueError(f"no table for layer {lookup.layer}; there are tables for {sorted(self._tables)}")
        self.tokens += len(lookups[0].keys) if lookups else 0
        if self._run is not None:  # may be sent again later, when the caller's arrays may hold others
            lookups = [replace(each, keys=each.keys.copy(), row_ids=each.row_ids.copy()) for each in lookups]
        named = [RowLookup(self._tables[lookup.layer], lookup.row_ids, lookup.keys, lookup.order) for lookup in lookups]
        step = self._step if self._bounded else 0

        def ask() -> Pending:
            return self._client.prefetch(named, step=step, run=self._identity, traffic=self.traffic)

        patience = self._client.config.push_timeout if self._run is not None else 0.0
        return RemotePending(ask, patience, self._spec, self._tables, self._device_rows, self._read)

    def _read(self, step: int) -> None:
        self.read_step = step

    def push(self, gradients: Mapping[int, tuple[Ids, Floats]], *, step: int, learning_rate: float) -> None:
        """Pushes this worker's gradients of a step: per layer, row ids int64 [n] and gradients float32 [n, width]."""
        assert self._run is not None, "begin the run before pushing"
        by_table = {self._tables[layer]: gradient for layer, gradient in gradients.items()}
        self._run.push(by_table, step=step, learning_rate=learning_rate)
        self._step = step


class RemotePending:
    """PendingRows: decoded to float32 where the model asks for them."""

    def __init__(
        self,
        ask: Callable[[], Pending],
        patience: float,
        spec: EngramSpec,
        tables: Mapping[int, str],
        device_rows: DeviceRows,
        on_step: Callable[[int], None],
    ) -> None:
        """ask: sends the requests. patience: seconds for which a shard that is away is asked again. on_step: told the step of
        the rows once they have come."""
        self._ask, self._patience = ask, patience
        self._pending = ask()
        self._spec = spec
        self._tables = tables
        self._device_rows = device_rows
        self._on_step = on_step

    def rows(self, layer: int) -> torch.Tensor:
        """float32 [T, heads of all orders, row_width]; dead positions are zeros."""
        raw = self._wait(self._tables[layer])
        self._on_step(self._pending.step)
        return self._device_rows.values(raw, self._spec.row_format, self._spec.row_width)

    def _wait(self, table: str) -> Bytes:
        until = time.monotonic() + self._patience
        again = False
        while True:
            try:
                if again:
                    self._pending = self._ask()
                return self._pending.rows(table, self._device_rows.buffer)
            except ShardUnavailableError:
                if time.monotonic() >= until:
                    raise
            again = True
            time.sleep(PAUSE)
