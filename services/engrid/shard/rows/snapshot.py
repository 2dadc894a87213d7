"""A partition's rows and optimizer state as they were at one step, copied out while pushes go on.

Hashed rows touch every partition in every step, so copying a partition whole before the next push would stop training.
Instead each push first saves what it is about to overwrite:

                 swept: out already          still to sweep
    rows     |............................|..........o....o......o....|        o  touched since the snapshot began
                                          ^ cursor    \\    |     /
    images                                            [o][o][o][ ][ ]         their rows and state as they were then

`save`, called by a push under the partition's lock, copies the rows that are neither swept nor saved yet. `advance`,
called by the one thread that writes the checkpoint, copies the next chunk of about a MiB under the same lock, lays the
images over it and gives their slots back. So the lock is held for one chunk, and a row is saved at most once.

    _slots, int32 by row       0 to be swept        slot + 1 saved        -1 swept
    image slots                a stack of free ones: what is given back is taken next, so memory stays at the peak used

The images of all partitions of a shard share one bound, `ImageMemory`. Where it is reached a push waits until the sweep
has given slots back: it holds no lock meanwhile, so lookups go on. Training is then held to the speed of the disk,
which is what a bound on memory means; giving the checkpoint up instead would let a busy store never have one. A sweep
that stands still is another matter: after `patience_s` without a chunk the checkpoint is given up and the pushes go on.

Rejected: replaying the log onto fuzzily copied partitions (the log would have to reach back to the copy, and optimizer
arithmetic runs twice); fork (a copy of the page tables stalls for seconds at 100 GB, and gRPC's threads do not survive
it); sweeping the rows to be pushed next first (a random write per row).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engrid.rpc.errors import BadRequestError, ShardUnavailableError
from engrid.rpc.frames import Ids
from engrid.tables import RowTable

Arrays = Mapping[str, npt.NDArray[np.generic]]
"""By name, first dimension the row: `rows` uint8 [n, row_bytes], each array of the optimizer's state, and `ids`."""

CHUNK_BYTES = 1 << 20
"""Rows and state copied under one hold of a partition's lock."""
_SCAN_ROWS = 1 << 20
_SWEPT = -1


class SnapshotGivenUpError(ShardUnavailableError):
    """The checkpoint being taken was given up; nothing of it is kept. Take another one."""


class SnapshotBaseError(BadRequestError):
    """The partition does not know what changed since that checkpoint. Take a full one."""


class ImageMemory:
    """The bound on before-images of one checkpoint, shared by the snapshots of all partitions of a shard."""

    def __init__(self, limit_bytes: int, patience_s: float = 10.0) -> None:
        """patience_s: how long a push that found no room waits for a sweep that sweeps nothing."""
        self.limit_bytes = limit_bytes
        self.patience_s = patience_s
        self.used_bytes = 0
        self.peak_bytes = 0
        self.waits = 0
        """Times that a push had to wait."""
        self.given_up = ""
        """Why, once the checkpoint is."""
        self._chunks = 0
        self._moved = threading.Condition()

    def take(self, count: int, each: int) -> int:
        """Reserves room for up to `count` images of `each` bytes; returns for how many there is."""
        with self._moved:
            count = min(count, (self.limit_bytes - self.used_bytes) // each)
            self.used_bytes += count * each
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
            return count

    def swept(self, freed_bytes: int) -> None:
        """A chunk was swept."""
        with self._moved:
            self._chunks += 1
            self.used_bytes -= freed_bytes
            self._moved.notify_all()

    def give_up(self, reason: str) -> None:
        """Ends every snapshot that shares this memory; pushes that wait go on. Only the first reason counts."""
        with self._moved:
            self.given_up = self.given_up or reason
            self._moved.notify_all()

    def wait(self) -> None:
        """Returns once another chunk is swept, or the checkpoint is given up, if need be by us."""
        with self._moved:
            self.waits += 1
            before = self._chunks
            if not self._moved.wait_for(lambda: self._chunks != before or bool(self.given_up), self.patience_s):
                self.given_up = (
                    f"before-images filled {self.limit_bytes} bytes and no row was swept for {self.patience_s:g} s; "
                    "see whether the checkpoint's disk hangs, or raise the bound"
                )
                self._moved.notify_all()


class TouchedRows:
    """Which rows changed since checkpoint `base`, a byte per row: what an incremental checkpoint must hold."""

    def __init__(self, rows: int, base: str = "") -> None:
        """base: "" where no checkpoint holds the rows that are not marked."""
        self.base = base
        self.marks = np.zeros(rows, np.bool_)

    def mark(self, ids: Ids) -> None:
        """Local ids [u] have changed."""
        self.marks[ids] = True


@dataclass(frozen=True)
class Chunk:
    """The next rows of a snapshot in rising order; the arrays are overwritten by the next `advance`."""

    rows: int
    arrays: Arrays
    """Of an incremental snapshot also `ids` int64 [rows], ids of the table."""


class PartitionSnapshot:
    """What one partition held when this was made. Made under the partition's lock; see PartitionRows."""

    def __init__(
        self,
        table: RowTable,
        lock: threading.Lock,
        memory: ImageMemory,
        only: npt.NDArray[np.bool_] | None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """only: the rows of an incremental snapshot, by local id; the caller changes it no more."""
        self.memory = memory
        self._start = table.start
        self._lock = lock
        self._only = only
        self._live = {name: _by_row(array) for name, array in table.arrays().items()}
        self._image_bytes = sum(array.itemsize for array in self._live.values())
        self.chunk_rows = max(1, chunk_bytes // self._image_bytes)
        """Rows of every chunk but the last."""
        self._swept = False
        self._cursor = 0
        self._picked = np.empty(0, np.int64)
        capacity = min(len(table), memory.limit_bytes // self._image_bytes)
        if not capacity:
            raise ValueError(
                f"{memory.limit_bytes} bytes of before-images do not hold one row of table {table.spec.name}"
                f" ({self._image_bytes} bytes with its state); raise the bound"
            )
        self._slots = np.zeros(len(table), np.int32)
        self._images = {name: np.empty(capacity, array.dtype) for name, array in self._live.items()}
        self._free = np.arange(capacity, 0, -1, dtype=np.int32)
        self._free_count = capacity
        shapes = {name: (array.dtype, array.shape[1:]) for name, array in table.arrays().items()}
        self._out = {name: np.empty((self.chunk_rows, *shape), dtype) for name, (dtype, shape) in shapes.items()}

    @property
    def incremental(self) -> bool:
        """Whether it holds only the rows that changed since its base."""
        return self._only is not None

    def count(self) -> int:
        """Rows that the chunks will hold together."""
        return len(self._slots) if self._only is None else int(np.count_nonzero(self._only))

    # -- the push's side, under the partition's lock

    def save(self, ids: Ids) -> bool:
        """Saves what is still needed of local rows `ids` [u], rising, which are about to change.

        False: there was no room for all. Let go of the lock, call `memory.wait`, and then save the same rows again.
        """
        if self._swept or self.memory.given_up:
            return True
        needed = ids[self._slots[ids] == 0]
        if self._only is not None:
            needed = needed[self._only[needed]]
        count = self.memory.take(len(needed), self._image_bytes)
        if count:
            taken = self._free[self._free_count - count : self._free_count][::-1]
            self._free_count -= count
            self._slots[needed[:count]] = taken
            slots = taken.astype(np.int64) - 1
            for name, images in self._images.items():
                _copy_rows(self._live[name], needed[:count], images, slots)
        return count == len(needed)

    # -- the sweeper's side

    def advance(self) -> Chunk | None:
        """Copies out the next rows; None after the last. Raises SnapshotGivenUpError."""
        picked = self._next()
        count = picked.stop - picked.start if isinstance(picked, slice) else len(picked)
        freed = 0
        with self._lock:
            if self.memory.given_up:
                self._drop()
                raise SnapshotGivenUpError(f"the checkpoint was given up: {self.memory.given_up}")
            if not count:
                self._drop()
                return None
            for name, live in self._live.items():
                out = _by_row(self._out[name])[:count]
                if isinstance(picked, slice):
                    out[...] = live[picked]
                else:
                    np.take(live, picked, out=out, mode="clip")
            freed = self._lay_over(self._slots[picked])
            self._slots[picked] = _SWEPT
        self.memory.swept(freed * self._image_bytes)
        arrays = {name: out[:count] for name, out in self._out.items()}
        if not isinstance(picked, slice):
            arrays["ids"] = picked + self._start
        return Chunk(count, arrays)

    def _next(self) -> slice | Ids:
        if self._only is None:
            first, self._cursor = self._cursor, min(self._cursor + self.chunk_rows, len(self._slots))
            return slice(first, self._cursor)
        while len(self._picked) < self.chunk_rows and self._cursor < len(self._only):
            found = np.flatnonzero(self._only[self._cursor : self._cursor + _SCAN_ROWS]) + self._cursor
            self._picked = np.concatenate([self._picked, found])
            self._cursor += _SCAN_ROWS
        picked, self._picked = self._picked[: self.chunk_rows], self._picked[self.chunk_rows :]
        return picked

    def _lay_over(self, slots: npt.NDArray[np.int32]) -> int:
        """Puts the images of a chunk's rows, whose slots are given [rows], in place; returns how many there were."""
        where = np.flatnonzero(slots)
        if len(where):
            taken = slots[where]
            self._free[self._free_count : self._free_count + len(taken)] = taken[::-1]
            self._free_count += len(taken)
            for name, images in self._images.items():
                _copy_rows(images, taken.astype(np.int64) - 1, _by_row(self._out[name]), where)
        return len(where)

    def _drop(self) -> None:
        self._swept = True
        self._images = {}


def _by_row(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """One opaque item per row [n]: take, put and assignment then move whole rows."""
    return array if array.ndim == 1 else array.view(f"V{array[0].nbytes}").reshape(-1)


def _copy_rows(source: npt.NDArray[np.generic], ids: Ids, target: npt.NDArray[np.generic], at: Ids) -> None:
    """target[at] = source[ids], items being rows. Where `at` is a run, as it is until slots come back, in one copy."""
    if at[-1] - at[0] == len(at) - 1 and (at[1:] > at[:-1]).all():
        np.take(source, ids, out=target[at[0] : at[-1] + 1], mode="clip")
    else:
        np.put(target, at, np.take(source, ids, mode="clip"), mode="clip")
