"""The rows a shard holds: per partition one RowTable and one lock, and the gather over them.

The lock makes a push to a partition whole or absent to any lookup. It is held for one gather or one update,
both of which release the GIL for the copying itself. After an update that broke off in the middle no lookup is answered.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

from engrid.directory import Placement
from engrid.rpc.errors import (
    BadRequestError,
    NotFiniteError,
    ReadOnlyTableError,
    RowOutOfRangeError,
    RowWidthMismatchError,
    ShardUnavailableError,
    UnknownTableError,
    WrongEpochError,
)
from engrid.rpc.frames import Bytes, Ids, row_view
from engrid.shard.core.messages import PartitionKey
from engrid.tables import NonFiniteGradientError, RowTable, TableSpec

from .gradients import Gradients, read_gradients, total, total_size
from .sealed import SealedRows
from .snapshot import CHUNK_BYTES, ImageMemory, PartitionSnapshot, SnapshotBaseError, TouchedRows


@dataclass
class PartitionRows:
    """Live rows [start, stop) of a table, local row i being table row start + i."""

    start: int
    stop: int
    rows: RowTable
    lock: threading.Lock = field(default_factory=threading.Lock)
    touched: TouchedRows = field(init=False)
    snapshot: PartitionSnapshot | None = field(default=None, init=False)
    """From `begin_snapshot` until it is settled."""
    _taken: TouchedRows = field(init=False)
    """What had been touched when the snapshot began."""

    def __post_init__(self) -> None:
        self.touched = self._taken = TouchedRows(len(self.rows))

    def gather(self, ids: Ids, out: Bytes) -> None:
        """Copies the rows of table ids [n], all in range, into out [n, row_bytes]."""
        with self.lock:
            self._refuse_torn()
            self.rows.gather(ids - self.start, out)

    def copy_out(self, start: int, stop: int) -> bytes:
        """Local rows start..stop-1, end to end."""
        with self.lock:
            self._refuse_torn()
            return self.rows.raw(start, stop).tobytes()

    def _refuse_torn(self) -> None:
        if self.rows.torn:
            raise ShardUnavailableError(f"{self._where}: a step was applied to some rows alone; start the shard again")

    def stays_finite(self, step: int, learning_rate: float, workers: Sequence[Gradients]) -> bool:
        """Whether applying these surely leaves numbers; False: `refuse_not_finite` says. Costs next to nothing."""
        return self.rows.stays_finite(total_size(workers), step, learning_rate)

    def refuse_not_finite(self, step: int, learning_rate: float, workers: Sequence[Gradients]) -> None:
        """Raises NotFiniteError, naming the row, if applying these would leave NaN or infinity; changes nothing."""
        with np.errstate(over="ignore", invalid="ignore"):
            ids, gradients = total(workers)
        try:
            with self.lock:
                self.rows.try_update(ids - self.start, gradients, step, learning_rate)
        except NonFiniteGradientError as error:
            raise NotFiniteError(str(error)) from error

    def apply(self, step: int, learning_rate: float, workers: Sequence[Gradients]) -> int:
        """Adds the workers' gradients in the order given and updates each touched row once; returns their number.

        Raises MemoryError, having changed nothing unless `rows.torn` is set.
        """
        ids, gradients = total(workers)
        local, size = ids - self.start, total_size(workers)
        while len(ids):
            with self.lock:
                snapshot = self.snapshot
                if snapshot is None or self._saved(snapshot, local):
                    self.touched.mark(local)
                    self.rows.apply(
                        local, gradients, step, learning_rate, size
                    )  # last: what fails before can be repeated
                    break
            snapshot.memory.wait()
        return len(ids)

    @staticmethod
    def _saved(snapshot: PartitionSnapshot, local: Ids) -> bool:
        try:
            return snapshot.save(local)
        except BaseException as error:  # it may have taken slots that it has not filled
            snapshot.memory.give_up(f"rows about to change could not be saved: {error!r}")
            raise

    def begin_snapshot(self, memory: ImageMemory, base: str = "", chunk_bytes: int = CHUNK_BYTES) -> PartitionSnapshot:
        """What the partition holds now, to be swept by one thread while pushes go on, and then settled.

        base: the checkpoint that holds the rows not touched since, where only those touched are wanted. Raises
        SnapshotBaseError where it is not the one that the touched rows are counted from: take a full one.
        """
        with self.lock:
            if self.snapshot is not None:
                raise BadRequestError(f"{self._where} has a snapshot that is not settled; settle it first")
            if base and base != self.touched.base:
                raise SnapshotBaseError(
                    f"{self._where} knows what changed since {self.touched.base or 'no checkpoint'}, not since {base};"
                    " take a full checkpoint"
                )
            only = self.touched.marks if base else None
            self.snapshot = PartitionSnapshot(self.rows, self.lock, memory, only, chunk_bytes)
            self._taken, self.touched = self.touched, TouchedRows(len(self.rows), self.touched.base)
            return self.snapshot

    def settle_snapshot(self, published: str = "") -> None:
        """Ends the snapshot, if there is one. published: the checkpoint that holds it, and is the next one's base.

        Without it what the snapshot took counts as touched still, so the next incremental one holds it. That is right
        also where it was published and nobody came to say so.
        """
        with self.lock:
            if self.snapshot is None:
                return
            if published:
                self.touched.base = published
            else:
                self.snapshot.memory.give_up(f"the snapshot of {self._where} was ended before it was published")
                self.touched.marks |= self._taken.marks
            self.snapshot, self._taken = None, self.touched

    def restored(self, base: str = "") -> None:
        """The rows were overwritten by those of checkpoint `base`, or by others that no checkpoint holds."""
        with self.lock:
            if self.snapshot is not None:
                self.snapshot.memory.give_up(f"{self._where} was overwritten while it was saved")
                self.snapshot = None
            self.touched = self._taken = TouchedRows(len(self.rows), base)

    @property
    def _where(self) -> str:
        return f"rows {self.start}..{self.stop - 1} of table {self.rows.spec.name}"


@dataclass
class SealedPartition:
    """Sealed rows [start, stop) of a table. Nothing changes them, so there is nothing to lock."""

    start: int
    stop: int
    rows: SealedRows

    def gather(self, ids: Ids, out: Bytes) -> None:
        """As of PartitionRows."""
        self.rows.gather(ids - self.start, out)

    def copy_out(self, start: int, stop: int) -> bytes:
        """As of PartitionRows."""
        return self.rows.raw(start, stop).tobytes()


AnyPartition = PartitionRows | SealedPartition


class ShardRows:
    """Every partition this shard holds. `replace` swaps the whole set; readers keep the set they started with."""

    def __init__(self) -> None:
        self._tables: dict[str, TableRows] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of rows and optimizer state held."""
        return sum(part.rows.nbytes for table in self._tables.values() for part in table.parts)

    @property
    def live_nbytes(self) -> int:
        """The same of live partitions: what a base holds."""
        parts = [part for table in self._tables.values() for part in table.parts]
        return sum(part.rows.nbytes for part in parts if not isinstance(part, SealedPartition))

    def partition(self, key: PartitionKey) -> AnyPartition:
        """The rows of a partition held here."""
        try:
            return self._tables[key[0]].by_index[key[1]]
        except KeyError as error:
            raise WrongEpochError(f"partition {key[0]}[{key[1]}] is not held by this shard") from error

    def partitions(self) -> dict[PartitionKey, AnyPartition]:
        """All that is held, by table and row."""
        return {(name, index): part for name, table in self._tables.items() for index, part in table.by_index.items()}

    def holds(self, key: PartitionKey) -> bool:
        """Whether memory was given to the partition, be it loaded or not."""
        return key in self.partitions()

    def live(self, key: PartitionKey) -> PartitionRows:
        """The rows of a partition held here that takes pushes; raises ReadOnlyTableError where it is sealed."""
        part = self.partition(key)
        if isinstance(part, SealedPartition):
            raise ReadOnlyTableError(f"table {key[0]} is sealed: its rows never change")
        return part

    def allocate(self, placement: Placement, keys: Sequence[PartitionKey]) -> dict[PartitionKey, AnyPartition]:
        """New partitions, not yet served: live ones with their initial rows, sealed ones still to be loaded."""
        made: dict[PartitionKey, AnyPartition] = {}
        for key in keys:
            part, spec = placement.partitions[key[0]][key[1]], placement.tables[key[0]]
            if spec.version:
                made[key] = SealedPartition(part.start, part.stop, SealedRows(spec, part.start, part.stop))
            else:
                made[key] = PartitionRows(part.start, part.stop, RowTable(spec, part.start, part.stop))
        return made

    def replace(
        self, placement: Placement, added: dict[PartitionKey, AnyPartition], removed: Sequence[PartitionKey]
    ) -> None:
        """Serves the added partitions and no longer the removed, at once."""
        parts = {key: part for key, part in self.partitions().items() if key not in removed} | added
        tables: dict[str, dict[int, AnyPartition]] = {}
        for (name, index), part in sorted(parts.items()):
            tables.setdefault(name, {})[index] = part
        self._tables = {name: TableRows(placement.tables[name], by_index) for name, by_index in tables.items()}

    def table(self, name: str, row_bytes: int, placement: Placement | None) -> TableRows:
        """The rows of a table held here. row_bytes: width the asker expects; 0: any.

        Raises UnknownTableError, RowWidthMismatchError or WrongEpochError.
        """
        table = self._tables.get(name)
        if table is None:
            self._refuse_table(name, placement)
        if row_bytes and row_bytes != table.spec.row_bytes:
            raise RowWidthMismatchError(
                f"table {name} has rows of {table.spec.row_bytes} bytes, the request expects {row_bytes}"
            )
        return table

    @staticmethod
    def _refuse_table(name: str, placement: Placement | None) -> NoReturn:
        if placement is None or name not in placement.tables:
            known = ", ".join(placement.tables) if placement and placement.tables else "none"
            raise UnknownTableError(f"no table {name!r}; tables at this epoch: {known}")
        raise WrongEpochError(f"this shard holds no rows of table {name}", epoch=placement.epoch)

    def check_gradients(self, key: PartitionKey, ids: Ids, gradients: bytes) -> Gradients:
        """A push's part as arrays; raises what `read_gradients` raises and touches nothing."""
        part = self.live(key)
        return read_gradients(part.rows.spec, part.start, part.stop, f"push to {key[0]}[{key[1]}]", ids, gradients)


class TableRows:
    """The partitions of one table held here, in row order."""

    def __init__(self, spec: TableSpec, by_index: dict[int, AnyPartition]) -> None:
        self.spec = spec
        self.by_index = by_index
        self.parts = sorted(by_index.values(), key=lambda part: part.start)
        self.starts = np.array([part.start for part in self.parts], np.int64)
        self.stops = np.array([part.stop for part in self.parts], np.int64)

    def gather(self, ids: Ids, out: Bytes, epoch: int) -> None:
        """Copies the rows of int64 ids [n], in any order, into `out` [n, row_bytes], C-contiguous.

        Raises RowOutOfRangeError or WrongEpochError (with our epoch) before anything is written; never zeros.
        """
        if not len(ids):
            return
        self._check_owned(ids, epoch)
        if len(self.parts) == 1:
            self.parts[0].gather(ids, out)
            return
        which = np.searchsorted(self.starts, ids, side="right") - 1
        items = row_view(out)
        for index in np.unique(which):
            where = np.flatnonzero(which == index)
            piece = np.empty((len(where), self.spec.row_bytes), np.uint8)
            self.parts[index].gather(ids[where], piece)
            items[where] = row_view(piece)

    def _check_owned(self, ids: Ids, epoch: int) -> None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.spec.rows:
            raise RowOutOfRangeError(
                f"row id {low if low < 0 else high} is outside table {self.spec.name} of {self.spec.rows} rows"
            )
        if len(self.parts) == 1:
            owned = self.parts[0].start <= low and high < self.parts[0].stop
        else:
            which = np.searchsorted(self.starts, ids, side="right") - 1
            owned = bool((which >= 0).all() and (ids < self.stops[which]).all())
        if not owned:
            raise WrongEpochError(f"some rows of table {self.spec.name} are not held by this shard", epoch=epoch)


def refuse_empty(shard: str, table: str) -> NoReturn:
    """Raises for a table that has no rows to serve yet."""
    if "@" in table:
        raise ShardUnavailableError(
            f"shard {shard} does not have all rows of sealed table {table} yet; wait until it is loaded, or load it again"
        )
    raise ShardUnavailableError(
        f"shard {shard} lost its live rows of table {table}, by a restart or a restore that failed, or is just given others; wait for those, load a checkpoint or "
        "create the table anew"
    )
