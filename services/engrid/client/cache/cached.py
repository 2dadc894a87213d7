"""A batch of lookups of a sealed table whose keys are looked for in the cache before they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from engrid.client.batch import Lookup, check_lookups, check_range, living
from engrid.rpc.errors import CancelledError
from engrid.rpc.frames import Bytes
from engrid.tables import TableSpec

from .key_cache import Column, KeyCache, TagCounts


class Caches:
    """The caches of one client: one per width of entry, which the tables of a model share. Threads may share it."""

    def __init__(self, budget: int) -> None:
        """budget: bytes for each width of entry; 0: none."""
        self._budget = budget
        self._by_width: dict[int, KeyCache] = {}
        self._lock = threading.Lock()

    def batch(self, spec: TableSpec, lookups: Sequence[Lookup]) -> CachedBatch | None:
        """None where these lookups cannot be cached: rows of a live table, no keys, orders of unequal heads.

        Raises ValueError for a budget that holds not even one set of this width.
        """
        if not self._budget or not spec.version:
            return None
        if any(lookup.keys is None for lookup in lookups) or len({lookup.order for lookup in lookups}) < len(lookups):
            return None
        check_lookups(lookups)
        heads = {lookup.row_ids.shape[1] for lookup in lookups}
        if len(heads) > 1:
            return None
        width = heads.pop() * spec.row_bytes
        with self._lock:
            cache = self._by_width.get(width)
            if cache is None:
                cache = self._by_width[width] = KeyCache(self._budget, width)
        return CachedBatch(cache, spec, lookups)

    def counts(self, table: str) -> dict[int, TagCounts]:
        """What became of the keys of a table so far, by order."""
        with self._lock:
            caches = list(self._by_width.values())
        found: dict[int, TagCounts] = {}
        for cache in caches:
            for order, counts in cache.counts_of(table).items():
                found[order] = found.get(order, TagCounts()) + counts
        return found

    def forget(self, tables: Sequence[str]) -> None:
        """Frees the entries of tables that are no more."""
        with self._lock:
            caches = list(self._by_width.values())
        for cache in caches:
            cache.drop_tables(tables)


class CachedBatch:
    """All lookups of one sealed table in a batch. `ids` are the rows of missing keys; see Batch."""

    def __init__(self, cache: KeyCache, spec: TableSpec, lookups: Sequence[Lookup]) -> None:
        width = cache.entry_bytes
        self.spec = spec
        self.positions = len(lookups[0].row_ids)
        self._heads = sum(lookup.row_ids.shape[1] for lookup in lookups)
        columns = []
        for lookup in lookups:
            assert lookup.keys is not None
            columns.append(Column(cache.tag(spec.name, lookup.order, spec.version), lookup.keys, living(lookup)))
        self._cache = cache
        self._plan = cache.probe(columns)
        missing = [lookup.row_ids[where] for lookup, where in zip(lookups, self._plan.missing, strict=True)]
        self.ids = np.concatenate(missing).reshape(-1)
        self.rows: Bytes = self._plan.staging.reshape(-1, spec.row_bytes)
        self.here = self._plan.hits * (width // spec.row_bytes)

    def check_range(self) -> None:
        """Of the rows that have to be fetched."""
        check_range(self.spec, self.ids)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.positions, self._heads, self.spec.row_bytes

    def spread(self, out: Bytes) -> Bytes:
        if self._plan.closed:
            raise CancelledError(
                f"rows of table {self.spec.name} were placed before, and are kept no longer; prefetch again"
            )
        self._plan.take(out)
        self._cache.admit(self._plan)
        self._plan.close()
        return out
