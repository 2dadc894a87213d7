"""The write-ahead log of a shard: records in the order they were appended, and from when on each survives a power failure.

The idea. A shard's state is what its log makes of its last checkpoint, so a push is acknowledged `durable` once its
record is. A sync costs milliseconds whatever it covers, so it is shared: of all threads that wait, one (the leader)
syncs for everybody, and what is appended meanwhile is covered by the next.

    append ──► page cache ──────────────► disk
               in order, one at a time    wait_durable(n): leader syncs all open segments, then the folder if a
                                          segment is new; the others wait for it

    segment 1                          segment 4               segment 6 (active)
    ┌────────┬────────┬────────┐       ┌────────┬────────┐     ┌────────┬─ ─ ─ ─
    │ 1  d=0 │ 2  d=0 │ 3  d=2 │       │ 4  d=2 │ 5  d=4 │     │ 6  d=4 │
    └────────┴────────┴────────┘       └────────┴────────┘     └────────┴─ ─ ─ ─
    d: what was durable when the record was written; it tells a torn end from damage (segments.py, with the bytes)

A log that has failed. After a sync failed the kernel may have dropped the pages and call them clean, so a second sync
would succeed and mean nothing. Hence any failed sync, and any write that could not be taken back, is for good: every
later call raises LogFailedError. A restarted shard reads what the kernel shows, which until the machine is restarted too
can be more than the disk holds. A full disk is not a failure: the part of the record that was written is cut off again,
DiskFullError is raised, and the next append may succeed.

Rejected: one file (space is given back only by rewriting it, and damage costs all of it); a sync when a segment is full
(it would stop appends that nobody waits for); a record of "durable up to here" after each sync (twice the syncs, for what
the next record says for nothing); padding to blocks (against a disk that, losing power, destroys the bytes of a sector
that it rewrites unchanged; disks write sectors whole); CRC-32C or a wider hash (not in the standard library; zlib's runs
at 4 GB/s here).
"""

from __future__ import annotations

import errno
import itertools
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from engrid.rpc.errors import DiskFullError, ShardUnavailableError
from engrid.storage.disk import Disk, File, Piece

from .segments import (
    RECORD_HEADER_BYTES,
    CorruptLogError,
    Scan,
    checksum,
    encode_record_header,
    encode_segment_header,
    record_crc,
    segment_name,
)

SEGMENT_BYTES = 64 << 20


class LogFailedError(ShardUnavailableError):
    """The disk failed, and what the log holds is unknown until the shard is started again. Nothing was promised."""


@dataclass(frozen=True)
class Backlog:
    """What would have to be replayed."""

    records: int
    bytes: int


@dataclass
class _Segment:
    first: int
    path: str


class Log:
    """The log in `folder` of a disk. `recover` comes first, once and to its end; then the rest.

    append, wait_durable, sync, truncate_before and the properties may be called from any thread, append's order being
    the order of the records. `recover` and `close` are the owner's alone.
    """

    def __init__(self, disk: Disk, folder: str, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        """segment_bytes: a segment that has reached this size takes no further record."""
        self._disk = disk
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._appending = threading.Lock()
        """Held for one append; guards the end of the active file. Taken before _changed."""
        self._truncating = threading.Lock()
        self._changed = threading.Condition()
        """Guards everything below. Notified when a sync ends."""
        self._segments: list[_Segment] = []
        self._open: list[File] = []
        """The active segment's file last; before it those that are full and not synced since."""
        self._last = 0
        self._durable = 0
        self._crc = 0
        self._base = 0
        """Bytes appended before the first record still there, since recovery; never falls."""
        self._ends: array[int] = array("Q")
        """For each record still there, bytes appended up to its end."""
        self._changes = self._changes_synced = 0
        self._names_made = self._names_synced = 0
        self._syncing = False
        self._failure = "it was not recovered yet"

    # -- what is there

    @property
    def first(self) -> int:
        """The first record still there; last + 1 where there is none."""
        with self._changed:
            return self._first()

    @property
    def last(self) -> int:
        """The last record appended; 0 where there never was one."""
        return self._last

    @property
    def durable(self) -> int:
        """The last record that survives a power failure, as do all before it."""
        return self._durable

    def after(self, number: int) -> Backlog:
        """The records behind `number` that are still there."""
        with self._changed:
            count = min(max(0, self._last - number), len(self._ends))
            before = self._ends[-count - 1] if count < len(self._ends) else self._base
            return Backlog(count, (self._ends[-1] - before) if count else 0)

    def _first(self) -> int:
        return self._last + 1 - len(self._ends)

    # -- recovery

    def recover(self, *, start: int = 0, at_least: int = 0) -> Iterator[tuple[int, memoryview]]:
        """(number, payload) of every record from `start` on, each intact; a torn end is cut off when all were read.

        start: the first one needed, 0: whatever is there; at_least: a record known to have been durable. Where one of
        these is missing, or one that the log itself says was durable, raises CorruptLogError, perhaps only after some
        records. Payloads are views that hold a whole segment's bytes. Once exhausted, all that was read is durable and
        the log takes appends.
        """
        with self._telling("recovered"):
            parent, _, name = self._folder.rpartition("/")
            if name not in self._disk.names(parent):
                self._disk.make_folder(self._folder)
            self._disk.sync_folder(parent)
            scan = Scan(self._disk, self._folder)
            if scan.last >= start > 0:
                raise CorruptLogError(f"{self._folder} begins with record {scan.last + 1}; record {start} is needed")
            for number, payload in scan.records():
                self._ends.append(self._bytes() + RECORD_HEADER_BYTES + len(payload))
                if number >= start:
                    yield number, payload
            scan.refuse_if_durable()
            if scan.last < at_least:
                raise CorruptLogError(
                    f"{self._folder} ends with record {scan.last}, but record {at_least} was durable; the log was left "
                    f"as it is ({scan.damage or 'no damage is seen'})"
                )
            self._cut(scan)
            self._last = self._durable = scan.last
            self._crc = scan.crc
            self._failure = ""

    def _cut(self, scan: Scan) -> None:
        """Takes away what lies behind the last intact record, makes what is left durable and opens it."""
        kept = scan.firsts[: scan.segment + 1]
        if scan.end == 0 and len(kept) > 1:
            kept.pop()
        for index in reversed(range(len(kept), len(scan.firsts))):
            self._disk.remove(scan.path(index))
        self._segments = [_Segment(first, scan.path(index)) for index, first in enumerate(kept)]
        for segment, following in zip(self._segments, self._segments[1:], strict=False):
            if following.first > scan.proven + 1:
                file = self._disk.open(segment.path)
                file.sync()
                file.close()
        if not kept:
            self._segments = [self._new_segment(scan.last + 1, scan.crc)]
        else:
            file = self._disk.open(self._segments[-1].path)
            self._open = [file]
            if scan.end == 0 and scan.segment == 0:
                file.truncate(0)
                file.write([encode_segment_header(scan.last + 1, scan.crc)])
            elif len(kept) == scan.segment + 1 and file.size > scan.end:
                file.truncate(scan.end)
        self._open[-1].sync()
        self._disk.sync_folder(self._folder)

    # -- appending

    def append(self, pieces: Sequence[Piece], payload_crc: int | None = None) -> int:
        """Writes the pieces as one record and returns its number. It is not durable yet, but survives kill -9.

        payload_crc: segments.checksum of the pieces, where the caller made it outside its own lock. Raises
        DiskFullError (nothing was appended, the log goes on) or LogFailedError.
        """
        length = sum(memoryview(piece).nbytes for piece in pieces)
        if payload_crc is None:
            payload_crc = checksum(pieces)
        with self._appending:
            self._check()
            file = self._open[-1]
            if file.size >= self._segment_bytes:
                file = self._roll()
            number = self._last + 1
            header = encode_record_header(number, self._durable, length, self._crc, payload_crc)
            size = file.size
            try:
                file.write([header, *pieces])
            except OSError as error:
                self._take_back(error, f"record {number}", lambda: file.truncate(size))
            except BaseException:
                self._fail(f"an append to {file.path} was interrupted")
                raise
            with self._changed:
                self._last = number
                self._crc = record_crc(header)
                self._ends.append(self._bytes() + len(header) + length)
                self._changes += 1
            return number

    def _bytes(self) -> int:
        return self._ends[-1] if self._ends else self._base

    def _roll(self) -> File:
        first = self._last + 1
        segment = self._new_segment(first, self._crc)
        with self._changed:
            self._segments.append(segment)
        return self._open[-1]

    def _new_segment(self, first: int, crc: int) -> _Segment:
        segment = _Segment(first, f"{self._folder}/{segment_name(first)}")
        try:
            file = self._disk.create(segment.path)
        except OSError as error:
            self._take_back(error, segment.path, lambda: None)
        with self._changed:
            self._names_made += 1
        try:
            file.write([encode_segment_header(first, crc)])
        except OSError as error:
            file.close()
            self._take_back(error, segment.path, lambda: self._disk.remove(segment.path))
        with self._changed:
            self._open.append(file)
        return segment

    def _take_back(self, error: OSError, what: str, undo: Callable[[], None]) -> NoReturn:
        """After a failed write: the disk as it was before, or no more trust in it."""
        try:
            undo()
        except OSError as second:
            self._fail(f"writing {what} failed ({error}), and what was written could not be taken back: {second}")
            self._check()
        with self._changed:
            self._changes += 1
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"no room for {what}: {error}. Nothing was taken; make room on the disk, or save a checkpoint, which "
                "lets the log be shortened, and send it again"
            ) from error
        self._fail(f"writing {what} failed: {error}")
        raise LogFailedError(self._failure_text()) from error

    # -- durability

    def wait_durable(self, number: int) -> None:
        """Returns once the record and all before it survive a power failure; LogFailedError where that stays unknown."""
        assert number <= self._last, f"record {number} was not appended; the last is {self._last}"
        self._sync_until(lambda: self._durable >= number)

    def sync(self) -> None:
        """Makes everything appended before the call durable."""
        with self._changed:
            changes = self._changes
        self._sync_until(lambda: self._changes_synced >= changes)

    def _sync_until(self, done: Callable[[], bool]) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: done() or not self._syncing or self._failure)
                if done():
                    return
                self._check()
                self._syncing = True
            self._lead()

    def _lead(self) -> None:
        """One sync for all that wait."""
        with self._changed:
            files, last = list(self._open), self._last
            changes, names = self._changes, self._names_made
        try:
            for file in files:
                file.sync()
            if names > self._names_synced:
                self._disk.sync_folder(self._folder)
        except OSError as error:
            self._fail(f"a sync failed: {error}")
            raise LogFailedError(self._failure_text()) from error
        else:
            with self._changed:
                self._durable, self._changes_synced, self._names_synced = last, changes, names
                self._open = [file for file in self._open if file not in files[:-1]]
            for file in files[:-1]:
                file.close()
        finally:
            with self._changed:
                self._syncing = False
                self._changed.notify_all()

    # -- the rest

    def truncate_before(self, number: int) -> None:
        """Removes the segments that hold only records before `number`; the active one always stays.

        What stays is synced first, else a crash could leave nothing that knows the last number. One removal is synced
        before the next, else the removal of the second could survive without the first's: a gap.
        """
        with self._truncating:
            with self._changed:
                segments = list(self._segments)
            self.sync()
            for oldest, following in itertools.pairwise(segments):
                if following.first > number:
                    break
                with self._telling("shortened"):
                    self._disk.remove(oldest.path)
                    self._disk.sync_folder(self._folder)
                with self._changed:
                    gone = following.first - self._first()
                    self._base = self._ends[gone - 1] if gone else self._base
                    del self._ends[:gone]
                    self._segments.pop(0)

    def close(self) -> None:
        """Makes nothing durable. Every later call raises LogFailedError."""
        with self._appending, self._changed:
            self._failure = self._failure or "it is closed"
            self._changed.wait_for(lambda: not self._syncing)
            for file in self._open:
                file.close()
            self._open = []

    def _fail(self, why: str) -> None:
        with self._changed:
            self._failure = self._failure or why
            self._changed.notify_all()

    def _check(self) -> None:
        if self._failure:
            raise LogFailedError(self._failure_text())

    def _failure_text(self) -> str:
        return f"the log in {self._folder} takes nothing more: {self._failure}. Look at the disk, then start the shard again"

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LogFailedError(
                f"the log in {self._folder} cannot be {what}: {error}. Look at the disk named"
            ) from error
