"""The facade of the client: lookups in, rows out."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import overload

import numpy as np
import numpy.typing as npt

from engrid.directory import Placement
from engrid.rpc.errors import BadRequestError
from engrid.rpc.forks import check_not_forked, is_forked
from engrid.rpc.frames import Bytes, Floats
from engrid.tables import TableSpec, decode_rows

from .arrays import IdsLike, as_ids, as_integer, check_text
from .batch import Batch, Lookup, RowLookup, TableBatch, own
from .cache.cached import Caches
from .config import MOST_SECONDS, ClientConfig
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
        self.identity = uuid.uuid4().hex
        """No other client has it."""
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
        """Closes all connections and lets go of what was pinned; lookups and pushes under way fail. In a forked child,
        where none of it works, nothing."""
        if is_forked():
            return
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
        timeout: seconds from now until `rows` must have them, all that is asked on the way included. traffic: counts to
        add to, beside the client's. Ids and keys may be lists or arrays of any integers; what is done to them afterwards
        changes nothing. Raises BadRequestError, UnknownTableError and RowOutOfRangeError before anything is sent.
        """
        check_not_forked()
        deadline = time.monotonic() + self._seconds(timeout)
        _check_step(step)
        check_text("run", run)
        by_table: dict[str, list[Lookup]] = {}
        for lookup in lookups:
            by_table.setdefault(lookup.table, []).append(own(lookup))
        batches: dict[str, Batch] = {}
        for table, of_table in by_table.items():
            spec, _ = self.connections.table(table, deadline)
            if spec.version and (step or run):
                raise BadRequestError(f"table {table} is sealed: it has no step and no run to ask for")
            batches[table] = self._batch(spec, of_table, deadline)
            batches[table].check_range()
        counts = [self.traffic] if traffic is None else [self.traffic, traffic]
        return Pending(self.connections, batches, Wanted(step, run, deadline), counts)

    def _seconds(self, timeout: float | None) -> float:
        if timeout is None:
            return self.config.timeout
        if isinstance(timeout, bool) or not isinstance(timeout, int | float | np.integer | np.floating):
            raise BadRequestError(f"timeout {timeout!r}: give seconds")
        if not 0 <= (seconds := float(timeout)) <= MOST_SECONDS:
            raise BadRequestError(f"timeout {timeout!r}: give seconds from 0 to {MOST_SECONDS:.0f}")
        return seconds

    def _batch(self, spec: TableSpec, lookups: Sequence[Lookup], deadline: float) -> Batch:
        """The nearest way to the rows: memory of this host, else the cache, else the wire alone."""
        if spec.version and self.config.shared_memory and (shared := self.shared.table(spec, deadline)) is not None:
            return SharedBatch(shared, lookups)
        return self.caches.batch(spec, lookups) or TableBatch(spec, lookups)

    def forget(self, tables: Sequence[str]) -> None:
        """Lets go of what is held of sealed tables, when they are not to be read any more."""
        self.shared.forget(tables)
        self.caches.forget(tables)

    @overload
    def lookup(
        self, table: str, row_ids: IdsLike, *, step: int = 0, timeout: float | None = None, dtype: None = None
    ) -> Bytes: ...

    @overload
    def lookup(
        self, table: str, row_ids: IdsLike, *, step: int = 0, timeout: float | None = None, dtype: npt.DTypeLike
    ) -> Floats: ...

    def lookup(
        self,
        table: str,
        row_ids: IdsLike,
        *,
        step: int = 0,
        timeout: float | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> Bytes | Floats:
        """Rows of ids [n], waited for: uint8 [n, row_bytes], or with dtype=np.float32 their values [n, width]."""
        if dtype is not None and np.dtype(dtype) != np.float32:
            raise BadRequestError(f"table {table}: rows are read as bytes (dtype=None) or as float32, not as {dtype}")
        ids = as_ids(row_ids, f"table {table}: row ids", 1)
        pending = self.prefetch([RowLookup(table, ids[:, None])], step=step, timeout=timeout)
        raw = pending.rows(table)[:, 0]
        if dtype is None:
            return raw
        spec, _ = self.connections.table(table)
        return decode_rows(raw, spec.row_format, spec.width)


def _check_step(step: int) -> None:
    number = as_integer(step)
    if number is None or not 0 <= number < 2**63:
        raise BadRequestError(f"step {step!r}: give the step that must have been applied, or 0 for whatever is there")
