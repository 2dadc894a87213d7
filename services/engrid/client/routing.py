"""Which shard holds which row, for a whole batch at once. Pure: a placement in, index arrays out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engrid.directory import Partition, Placement
from engrid.rpc.frames import Ids


@dataclass(frozen=True)
class Piece:
    """The part of a batch that one shard answers."""

    shard: str
    where: Ids | slice
    """Positions in the batch, rising; a slice where they are all consecutive."""
    ids: Ids
    """Row ids of the table at those positions."""


class TableRoute:
    """Routing of one table at one epoch."""

    def __init__(self, partitions: Sequence[Partition]) -> None:
        """partitions: in row order, without gaps (a Placement's own)."""
        self._starts = np.array([part.start for part in partitions], np.int64)
        self._shards = list(dict.fromkeys(part.shards[0] for part in partitions))
        self._shard_of = np.array([self._shards.index(part.shards[0]) for part in partitions])

    def split(self, ids: Ids) -> Iterator[Piece]:
        """Pieces of int64 ids [n], each id within the table. Nothing for an empty batch."""
        if not len(ids):
            return
        if len(self._shards) == 1:
            yield Piece(self._shards[0], slice(0, len(ids)), ids)
            return
        # Methods, not numpy's functions: those are Python, and tell in a lookup of a few rows.
        owner = self._shard_of[self._starts.searchsorted(ids, side="right") - 1]
        for index, shard in enumerate(self._shards):
            (where,) = (owner == index).nonzero()
            if len(where):
                yield _piece(shard, where, ids)


def _piece(shard: str, where: Ids, ids: Ids) -> Piece:
    first, last = int(where[0]), int(where[-1])
    if last - first + 1 == len(where):
        return Piece(shard, slice(first, last + 1), ids[first : last + 1])
    return Piece(shard, where, ids[where])


def routes(placement: Placement) -> dict[str, TableRoute]:
    """One route per table of the placement."""
    return {table: TableRoute(parts) for table, parts in placement.partitions.items()}
