"""A push's gradients of one partition: as arrays, checked, and how large they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engrid.rpc.errors import (
    BadRequestError,
    NotFiniteError,
    ReadOnlyTableError,
    RowOutOfRangeError,
    RowWidthMismatchError,
)
from engrid.rpc.frames import Floats, Ids
from engrid.tables import TableSpec, magnitude, sum_duplicates


@dataclass(frozen=True, eq=False)
class Gradients:
    """One worker's of one step; two are the same only if they are one object."""

    ids: Ids
    """Row ids of the table, strictly rising [u]."""
    values: Floats
    """[u, width]."""
    size: float
    """An upper bound on |values|; infinite or NaN if one of them is."""

    @classmethod
    def of(cls, ids: Ids, values: Floats) -> Gradients:
        """Finds the bound."""
        return cls(ids, values, magnitude(values))


def read_gradients(spec: TableSpec, start: int, stop: int, where: str, ids: Ids, raw: bytes) -> Gradients:
    """A push's part as it came, for rows start..stop-1 of a table. where: names it in errors.

    Raises BadRequestError, RowOutOfRangeError, RowWidthMismatchError, NotFiniteError or ReadOnlyTableError.
    """
    if spec.optimizer is None:
        raise ReadOnlyTableError(f"{where}: the table was made without an optimizer ({spec.row_format} rows)")
    if len(raw) != 4 * spec.width * len(ids):
        raise RowWidthMismatchError(
            f"{where}: {len(ids)} rows of {spec.width} float32 are {4 * spec.width * len(ids)} bytes, not {len(raw)}"
        )
    values = np.frombuffer(raw, "<f4").reshape(len(ids), spec.width)
    if len(ids):
        if (ids[1:] <= ids[:-1]).any():
            raise BadRequestError(f"{where}: row ids must rise strictly; sum duplicate rows before the push")
        if ids[0] < start or ids[-1] >= stop:
            raise RowOutOfRangeError(f"{where}: rows {ids[0]}..{ids[-1]} reach outside [{start}, {stop})")
    gradients = Gradients.of(ids, values)
    if not math.isfinite(gradients.size):
        bad = int(ids[~np.isfinite(values).all(axis=1)][0])
        raise NotFiniteError(f"{where}: the gradient of row {bad} holds NaN or Inf; nothing was applied")
    return gradients


def total(workers: Sequence[Gradients]) -> tuple[Ids, Floats]:
    """The workers' gradients added up in the order given: distinct ids, rising [u], and [u, width]."""
    if len(workers) == 1:
        return workers[0].ids, workers[0].values
    ids, values = [part.ids for part in workers], [part.values for part in workers]
    return sum_duplicates(np.concatenate(ids), np.concatenate(values))


def total_size(workers: Sequence[Gradients]) -> float:
    """An upper bound on what `total` returns, rounding included."""
    return 1.001 * sum(part.size for part in workers)
