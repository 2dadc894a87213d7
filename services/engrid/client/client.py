"""The facade of the client: lookups in, rows out."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from types import TracebackType

from engrid.directory import Placement
from engrid.rpc.errors import BadRequestError
from engrid.rpc.frames import Bytes, Ids
from engrid.tables import TableSpec

from .batch import Batch, Lookup, RowLookup, TableBatch
from .cached import Caches
from .config import ClientConfig
from .connections import Connections
from .pending import Pending, Traffic
from .pins import Pins
from .shared import SharedBatch, SharedTables
from .transport import Wanted


class MemoryClient:
    """Reads rows of all shards of one placement. Threads may share it."""

    def __init__(self, source: str | os.PathLike[str], config: ClientConfig | None = None) -> None:
        """source: a directory (a path object, file:PATH, /PATH or redis://...), or host:port of any shard.

        Raises ValueError for what is none of them, DirectoryError or ShardUnavailableError where the source cannot be read.
        """
        self.config = config or ClientConfig()
        self.connections = Connections(source, self.config)
        self.traffic = Traffic()
        """Since it was opened."""
        self.shared = SharedTables(self.connections)
        """Sealed tables that are read without asking."""
        self.pins = Pins(self.connections)
        """Sealed tables that must stay while this client reads them."""
        self.caches = Caches(self.config.cache_bytes)
        """Rows of sealed tables that need not be asked for again."""

    def __enter__(self) -> MemoryClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes all connections and lets go of what was pinned; lookups under way fail."""
        self.pins.close()
        self.connections.close()

    @property
    def placement(self) -> Placement:
        """The newest placement this client knows; raises UnknownTableError before the first table is made."""
        return self.connections.placement()

    def prefetch(
        self,
        lookups: Sequence[Lookup],
        *,
        step: int = 0,
        run: str = "",
        timeout: float | None = None,
        traffic: Traffic | None = None,
    ) -> Pending:
        """Sends everything the lookups need and returns at once.

        All lookups of one table must have the same number of positions; their heads lie side by side in the
        output, in the order given. step: the training step that must have been applied to the rows read. run: identity
        of the run whose result they must be, else RunMismatchError; empty for any. A sealed table (NAME@VERSION) has
        neither, as its name says what its rows are.
        timeout: seconds from now until `rows` must have them. traffic: counts to add to, beside the client's. Raises BadRequestError, UnknownTableError and
        RowOutOfRangeError before anything is sent.
        """
        deadline = time.monotonic() + (self.config.timeout if timeout is None else timeout)
        by_table: dict[str, list[Lookup]] = {}
        for lookup in lookups:
            by_table.setdefault(lookup.table, []).append(lookup)
        batches: dict[str, Batch] = {}
        for table, of_table in by_table.items():
            spec, _ = self.connections.table(table)
            if spec.version and (step or run):
                raise BadRequestError(f"table {table} is sealed: it has no step and no run to ask for")
            batches[table] = self._batch(spec, of_table)
            batches[table].check_range()
        counts = [self.traffic] if traffic is None else [self.traffic, traffic]
        return Pending(self.connections, batches, Wanted(step, run, deadline), counts)

    def _batch(self, spec: TableSpec, lookups: Sequence[Lookup]) -> Batch:
        """The nearest way to the rows: memory of this host, else the cache, else the wire alone."""
        if spec.version and self.config.shared_memory and (shared := self.shared.table(spec)) is not None:
            return SharedBatch(shared, lookups)
        return self.caches.batch(spec, lookups) or TableBatch(spec, lookups)

    def forget(self, tables: Sequence[str]) -> None:
        """Lets go of what is held of sealed tables, when they are not to be read any more."""
        self.shared.forget(tables)
        self.caches.forget(tables)

    def lookup(self, table: str, row_ids: Ids, *, step: int = 0, timeout: float | None = None) -> Bytes:
        """Rows of int64 ids [n] -> uint8 [n, row_bytes], waited for."""
        if row_ids.ndim != 1:
            raise BadRequestError(f"table {table}: row ids must be [n], not {list(row_ids.shape)}; see prefetch")
        pending = self.prefetch([RowLookup(table, row_ids[:, None])], step=step, timeout=timeout)
        return pending.rows(table)[:, 0]
