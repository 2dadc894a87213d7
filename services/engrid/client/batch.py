"""A batch of lookups as arrays: which rows are needed once each, and how they spread over the output. Pure.

Equal keys have equal rows, so one key stands for the K rows of its order, and only the rows of distinct keys
are asked for. What comes back for them is spread over all positions that hold the key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engrid.rpc.errors import BadRequestError, RowOutOfRangeError
from engrid.rpc.frames import Bytes, Ids, row_view
from engrid.tables import TableSpec

from .arrays import as_ids

Bools = npt.NDArray[np.bool_]


class Lookup(Protocol):
    """One order of one table: K row ids for each of T positions."""

    @property
    def table(self) -> str:
        """Name of the table."""

    @property
    def order(self) -> int:
        """Of the n-grams. Keys are compared within an order; no two lookups of a table in a batch share one that has
        keys."""

    @property
    def keys(self) -> Ids | None:
        """int64 [T]: equal keys, equal rows; None: unknown, rows are deduplicated by id."""

    @property
    def row_ids(self) -> Ids:
        """int64 [T, K], bucket offsets included; a dead position is -1 in all K."""


@dataclass(frozen=True)
class RowLookup:
    """A Lookup made of its parts. Ids and keys may be lists or arrays of any integers: prefetch makes them int64."""

    table: str
    row_ids: Ids
    keys: Ids | None = None
    order: int = 0


def own(lookup: Lookup) -> RowLookup:
    """The lookup with ids and keys as int64 arrays, maybe the caller's very own: whoever keeps them copies them.

    Raises BadRequestError for what are no whole numbers, RowOutOfRangeError for numbers beyond int64.
    """
    name = f"table {lookup.table}: "
    if not isinstance(lookup.table, str):
        raise BadRequestError(f"table {lookup.table!r}: give the name of a table")
    ids = as_ids(lookup.row_ids, name + "row ids", 2)
    if ids.shape[1] == 0:
        raise BadRequestError(f"{name}row ids must be [positions, heads], not {list(ids.shape)}")
    keys = None if lookup.keys is None else as_ids(lookup.keys, name + "keys", 1)
    if keys is not None and keys.shape != ids.shape[:1]:
        raise BadRequestError(f"{name}keys must be int64 [{len(ids)}], one per position")
    return RowLookup(lookup.table, ids, keys, lookup.order)


@dataclass(frozen=True)
class _Order:
    alive: Ids | None
    """Positions that are not dead; None: all."""
    inverse: Ids | None
    """For each living position, which of the distinct keys it holds; None: each its own."""
    start: int
    """First distinct row of this order in the table's buffer."""
    keys: int
    heads: int


class Batch(Protocol):
    """All lookups of one table in a batch, by whichever way their rows come."""

    spec: TableSpec
    ids: Ids
    """Rows to fetch, int64 [n]; none where nothing has to travel."""
    rows: Bytes
    """uint8 [n, row_bytes], where they are put."""
    here: int
    """Rows that are on this host already."""

    def check_range(self) -> None:
        """Raises RowOutOfRangeError for an id outside the table."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """[T, heads of all orders, row_bytes]."""

    def spread(self, out: Bytes) -> Bytes:
        """Writes the rows of every position to `out`, uint8 of `shape`, C-contiguous; dead positions are zeros.

        Once, and after `rows` were filled. Returns `out`.
        """


class TableBatch:
    """Each distinct key's rows are fetched and then spread over the positions that hold it."""

    def __init__(self, spec: TableSpec, lookups: Sequence[Lookup]) -> None:
        self.spec = spec
        self.positions = check_lookups(lookups)
        self._orders: list[_Order] = []
        pieces: list[Ids] = []
        start = 0
        for lookup in lookups:
            order, ids = _dedup(lookup, start)
            self._orders.append(order)
            pieces.append(ids)
            start += len(ids)
        self.ids = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        self.rows: Bytes = np.empty((len(self.ids), spec.row_bytes), np.uint8)
        self.here = 0

    def check_range(self) -> None:
        check_range(self.spec, self.ids)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.positions, sum(order.heads for order in self._orders), self.spec.row_bytes

    def spread(self, out: Bytes) -> Bytes:
        if any(order.alive is not None for order in self._orders):
            out.fill(0)
        column = 0
        for order in self._orders:
            width = order.heads * self.spec.row_bytes
            distinct = self.rows[order.start : order.start + order.keys * order.heads].reshape(order.keys, width)
            if order.inverse is not None:
                distinct = row_view(distinct)[order.inverse].view(np.uint8)
            spread = distinct.reshape(-1, order.heads, self.spec.row_bytes)
            if order.alive is None:
                out[:, column : column + order.heads] = spread
            else:
                out[order.alive, column : column + order.heads] = spread
            column += order.heads
        return out


def _dedup(lookup: Lookup, start: int) -> tuple[_Order, Ids]:
    ids, keys = lookup.row_ids, lookup.keys
    heads = ids.shape[1]
    alive = living(lookup)
    where = None if alive is None else np.flatnonzero(alive)
    if where is not None:
        ids = ids[where]
        keys = keys[where] if keys is not None else None
    if keys is None:
        ids = ids.reshape(-1) if where is not None else ids.flatten()  # a copy either way
        return _Order(where, None, start, len(lookup.row_ids) if where is None else len(where), heads), ids
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return _Order(where, inverse, start, len(first), heads), ids[first].reshape(-1)


def living(lookup: Lookup) -> Bools | None:
    """[T], False at dead positions; None: all live. Raises RowOutOfRangeError where a position is dead in part."""
    ids = lookup.row_ids
    if not ids.size or int(ids.min()) >= 0:
        return None
    alive: Bools = ids[:, 0] >= 0
    if (ids[~alive] != -1).any() or (ids[alive] < 0).any():
        raise RowOutOfRangeError(f"table {lookup.table}: a negative row id; a dead position is -1 in every head")
    return alive


def check_range(spec: TableSpec, ids: Ids) -> None:
    """Raises RowOutOfRangeError for an id that is no row of the table."""
    # Seen as unsigned, negative ids are the largest: one pass finds both ends.
    if ids.size and int(ids.view(np.uint64).max()) >= spec.rows:
        outside = ids[(ids < 0) | (ids >= spec.rows)][0]
        raise RowOutOfRangeError(
            f"row id {outside} is outside table {spec.name} of {spec.rows} rows; check the spec the ids were hashed with"
        )


def check_lookups(lookups: Sequence[Lookup]) -> int:
    """The number of positions. Raises BadRequestError where the lookups of a table differ in it."""
    positions = len(lookups[0].row_ids)
    for lookup in lookups:
        if len(lookup.row_ids) != positions:
            raise BadRequestError(
                f"table {lookup.table}: lookups of {positions} and {len(lookup.row_ids)} positions in one batch"
            )
    return positions
