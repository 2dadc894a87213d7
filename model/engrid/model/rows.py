"""Where the model's rows come from: the RowSource it asks, and the in-process tables that are the reference.

The model knows no transport. It hands all lookups of a batch to a source before its first layer runs, and asks the
pending result for a layer's rows when it reaches that layer. Remote memory is the other implementation; both give
the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from engrid.addressing.lookup import Ids, Lookup, check_lookup
from engrid.tables import RowTable, decode_rows, sum_duplicates

Floats = npt.NDArray[np.float32]


class PendingRows(Protocol):
    """Rows under way."""

    def rows(self, layer: int) -> torch.Tensor:
        """float32 [T, heads of all orders, row_width], orders rising; zeros at dead positions. Once per layer."""


class RowSource(Protocol):
    """Gives rows for lookups."""

    def prefetch(self, lookups: Sequence[Lookup]) -> PendingRows:
        """Begins to fetch and returns at once. A row outside its table is an error, never zeros."""


class InProcessTables:
    """RowSource over tables in this process's memory: the reference that remote rows are compared with."""

    def __init__(self, tables: Mapping[int, RowTable]) -> None:
        """tables: the whole table of each Engram layer."""
        self.tables = dict(tables)

    def prefetch(self, lookups: Sequence[Lookup]) -> _Gathered:
        by_layer: dict[int, list[Lookup]] = {}
        for lookup in lookups:
            check_lookup(lookup)
            if lookup.layer not in self.tables:
                raise ValueError(f"no table for layer {lookup.layer}; there are tables for {sorted(self.tables)}")
            by_layer.setdefault(lookup.layer, []).append(lookup)
        return _Gathered({layer: self._gather(layer, orders) for layer, orders in by_layer.items()})

    def _gather(self, layer: int, orders: Sequence[Lookup]) -> torch.Tensor:
        table = self.tables[layer]
        ids = np.concatenate([lookup.row_ids for lookup in orders], axis=1)
        flat = ids.reshape(-1)
        alive = np.flatnonzero(flat != -1)
        raw = np.zeros((len(flat), table.spec.row_bytes), np.uint8)
        if len(alive) == len(flat):
            table.gather(flat, raw)
        else:
            living = np.empty((len(alive), table.spec.row_bytes), np.uint8)
            table.gather(flat[alive], living)
            raw[alive] = living
        values = decode_rows(raw, table.spec.row_format, table.spec.width)
        values[flat == -1] = 0
        return torch.from_numpy(values.reshape(*ids.shape, table.spec.width))

    def push(self, gradients: Mapping[int, tuple[Ids, Floats]], *, step: int, learning_rate: float) -> None:
        """Updates rows by gradients float32 [n, width] of row ids int64 [n]; duplicates add up, -1 is left out.

        Raises NonFiniteGradientError, or what RowTable.apply raises, before anything of any layer is changed.
        """
        summed = {layer: sum_duplicates(row_ids, values) for layer, (row_ids, values) in gradients.items()}
        if unknown := sorted(summed.keys() - self.tables.keys()):
            raise ValueError(f"no table for layers {unknown}; there are tables for {sorted(self.tables)}")
        checked = {
            layer: self.tables[layer].check(ids, values, step, learning_rate) for layer, (ids, values) in summed.items()
        }
        for layer, (ids, values) in summed.items():
            self.tables[layer].apply(ids, values, step, learning_rate, checked[layer])


@dataclass(frozen=True)
class _Gathered:
    by_layer: Mapping[int, torch.Tensor]

    def rows(self, layer: int) -> torch.Tensor:
        return self.by_layer[layer]
