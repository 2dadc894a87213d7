"""The state machine, its rows and its log kept in step: what counts is in the log first, and a start replays it.

    message ──► core.check_*  ──► log.append ──► core.*  ──► Apply: the shell updates rows, then acknowledges
                refuses, and       refuses        takes it    `memory`: at once
                nothing happens    (disk full),               `durable`: after log.wait_durable(number)
                                   same

Before a push comes to that, the shell makes sure that what it would have applied leaves neither NaN nor infinity
(`unsure`): a push that is in the log is never refused again, nor does replay ask.

Everything between the two ends happens under the shell's lock, so records lie in the log in the order in which the
state machine took them. A start rebuilds the state from the newest base (base.py: rows, optimizer state and the state
machine at one record) and hands the records behind it to the same state machine; as it knows no clock and no chance,
rows come out bit for bit. Rows of a new table are in no log: they follow from its spec.

What a record cannot bring back is rows that came by Load. After such a load the shell makes a base before it answers;
where it died in between, replay finds the record, leaves the partition empty and drops what nobody was told of.

A seq seen before (DUPLICATE) is answered like the push itself, and with `durable` waits for the log as that would: its
first answer may have been lost before it was durable.

Rejected: logging rows instead of gradients (with Adam's state five times the bytes, and read back for each push);
applying first and logging after (a crash in between leaves rows that no log explains).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from engrid.directory import Placement
from engrid.rpc.errors import BadRequestError, EngridError
from engrid.shard.core.machine import ShardCore
from engrid.shard.core.messages import Adoption, Apply, PartitionKey, PartitionPush, Push, Together
from engrid.shard.rows.gradients import Gradients
from engrid.shard.rows.partitions import AnyPartition, PartitionRows, ShardRows
from engrid.storage.disk import Disk, Piece
from engrid.storage.log.log import SEGMENT_BYTES, Log
from engrid.storage.log.segments import CorruptLogError, checksum

from .base import Base, read_newest_base
from .records import (
    AdoptRecord,
    BeginRunRecord,
    CommitRecord,
    LoadedRecord,
    PushPart,
    PushRecord,
    Record,
    decode,
    encode,
)

LOG_FOLDER = "log"


@dataclass(frozen=True)
class Taken:
    """A push or commit that counts from now on."""

    new: Sequence[bool]
    """Per part of a push."""
    applies: Sequence[Apply]
    record: int
    """Durable once this record of the log is; 0 without a log."""


@dataclass(frozen=True)
class Logged:
    """A record of the log."""

    pieces: Sequence[Piece]
    crc: int
    """Their checksum."""


class Journal:
    """Not thread-safe: the shell serialises calls, and carries out every Apply it is given before it stops."""

    def __init__(self, shard: str, disk: Disk | None = None, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        """disk: the shard's own folder; what is in it is recovered. None: nothing is kept.

        Raises CorruptLogError or CheckpointDamagedError, naming file and place, where it is not what was written.
        """
        self.shard = shard
        self.disk = disk
        self.core = ShardCore(shard)
        self.rows = ShardRows()
        self.log: Log | None = None
        self.base: Base | None = None
        """The newest; replay begins behind it."""
        self.replayed = 0
        """Records handed to the state machine at the start."""
        if disk is not None:
            self.log = Log(disk, LOG_FOLDER, segment_bytes=segment_bytes)
            self._recover(disk, self.log)

    # -- messages

    def logged(self, push: Push, parts: Sequence[PushPart]) -> Logged | None:
        """A push as the log will take it; None without a log. parts: the same gradients as they came. Any thread, and not
        under the shell's lock: every byte is read for the checksum."""
        if self.log is None:
            return None
        pieces = encode(
            PushRecord(
                run=push.run,
                attempt=push.attempt,
                worker=push.worker,
                step=push.step,
                learning_rate=push.learning_rate,
                hold=push.hold,
                epoch=push.epoch,
                parts=parts,
            )
        )
        return Logged(pieces, checksum(pieces))

    def unsure(self, push: Push) -> list[Together]:
        """What the push would have applied and may leave NaN or infinity: to be asked of the rows (`refuse_not_finite`)
        before the push is taken, and then again whether it is the same still. Raises what ShardCore.push raises."""
        return [
            each
            for each in self.core.together(push)
            if not self.rows.live(each.key).stays_finite(push.step, each.learning_rate, each.gradients)
        ]

    def push(self, push: Push, logged: Logged | None) -> Taken:
        """logged: what `logged` made of it. Raises what ShardCore.push raises, and DiskFullError."""
        new = self.core.check_push(push)
        record = 0
        if any(new) and self.log is not None:
            assert logged is not None
            record = self.log.append(logged.pieces, logged.crc)
        new, applies = self.core.push(push)
        return Taken(new, applies, record or self._last())

    def commit(self, run: str, attempt: int, worker: int, step: int, epoch: int) -> Taken:
        """See ShardCore.commit."""
        record = 0
        if self.core.check_commit(run, attempt, worker, step, epoch):
            record = self._append(CommitRecord(run=run, attempt=attempt, worker=worker, step=step))
        return Taken((), self.core.commit(run, attempt, worker, step, epoch), record or self._last())

    def begin_run(
        self, run: str, attempt: int, workers: int, tables: Sequence[str], token: str = ""
    ) -> tuple[int, int]:
        """See ShardCore.begin_run; returns the step and the record to wait for."""
        record = 0
        if self.core.check_begin_run(run, attempt, workers, tables, token):
            begun = BeginRunRecord(run=run, attempt=attempt, workers=workers, tables=tables, token=token)
            record = self._append(begun)
        return self.core.begin_run(run, attempt, workers, tables, token), record or self._last()

    def adopt(self, adoption: Adoption, added: dict[PartitionKey, AnyPartition]) -> int:
        """Serves the placement; added: from ShardRows.allocate. Returns the record to wait for. No Apply may be under way:
        it would reach the rows of a table made anew."""
        assert not self.core.is_applying, "carry out what was decided first"
        record = self._append(AdoptRecord(placement=json.dumps(adoption.placement.to_json())))
        self._adopt(adoption, added)
        return record

    def loading(self, key: PartitionKey, step: int, run: str, attempt: int) -> None:
        """Rows of a live partition are about to be replaced from outside: it serves nothing until they are."""
        self._append(LoadedRecord(table=key[0], partition=key[1], step=step, run=run, attempt=attempt, checkpoint=""))
        self.core.loading(key)

    def loaded(self, key: PartitionKey, step: int, run: str, attempt: int, *, rows_kept: bool) -> None:
        """Rows of a partition were replaced from outside. rows_kept: a base will hold them, and no record says so yet."""
        if rows_kept:
            self._append(
                LoadedRecord(table=key[0], partition=key[1], step=step, run=run, attempt=attempt, checkpoint="")
            )
        self.core.loaded(key, step, run, attempt)

    def wait_durable(self, record: int) -> None:
        """Returns once the record survives a power failure. Any thread, and not under the shell's lock."""
        if self.log is not None and record:
            self.log.wait_durable(record)

    def needed_disk(self) -> Disk:
        """Raises BadRequestError where this shard keeps nothing."""
        if self.disk is None:
            raise BadRequestError(f"shard {self.shard} keeps no log; start it with a state folder")
        return self.disk

    def backlog_bytes(self) -> int:
        """Bytes of log that a start would replay."""
        return self.log.after(self.base.record if self.base else 0).bytes if self.log else 0

    def rebased(self, base: Base) -> None:
        """A newer base is on disk: the log behind it is let go. Any thread."""
        assert self.log is not None
        self.base = base
        self.log.truncate_before(base.record + 1)

    def _append(self, record: Record) -> int:
        return self.log.append(encode(record)) if self.log is not None else 0

    def _last(self) -> int:
        return self.log.last if self.log is not None else 0

    def _adopt(self, adoption: Adoption, added: dict[PartitionKey, AnyPartition]) -> None:
        self.core.adopt(adoption)
        self.rows.replace(adoption.placement, added, adoption.removed)

    # -- recovery

    def _recover(self, disk: Disk, log: Log) -> None:
        self.base = read_newest_base(disk)
        start = 1
        if self.base is not None:
            self.core, self.rows = self.base.restore(disk, self.shard)
            start = self.base.record + 1
        lost: set[str] = set()
        for number, payload in log.recover(start=start, at_least=start - 1):
            try:
                self._replay(decode(payload), lost)
            except EngridError as error:
                if not lost:
                    raise CorruptLogError(
                        f"record {number} of {LOG_FOLDER} cannot be taken again: {error}. The log is not of this shard, or "
                        "another engrid wrote it"
                    ) from error
            self.replayed += 1

    def _replay(self, record: Record, lost: set[str]) -> None:
        match record:
            case AdoptRecord():
                placement = Placement.from_json(json.loads(record.placement))
                adoption = self.core.plan_adoption(placement)
                if adoption is not None:
                    self._adopt(adoption, self.rows.allocate(placement, adoption.added))
            case BeginRunRecord():
                self.core.begin_run(record.run, record.attempt, record.workers, record.tables, record.token)
            case PushRecord():
                _, applies = self.core.push(self._as_push(record))
                self.carry_out(applies)
            case CommitRecord():
                applies = self.core.commit(record.run, record.attempt, record.worker, record.step, self.core.epoch)
                self.carry_out(applies)
            case LoadedRecord():
                lost.add(record.table)
                with suppress(KeyError):
                    self.core.emptied((record.table, record.partition))

    def _as_push(self, record: PushRecord) -> Push:
        parts = []
        for part in record.parts:
            key = (part.table, part.partition)
            width = self.rows.live(key).rows.spec.width
            ids = np.frombuffer(part.row_ids, "<i8")
            values = np.frombuffer(part.gradients, "<f4").reshape(len(ids), width)
            parts.append(PartitionPush(key=key, seq=part.seq, gradients=Gradients.of(ids, values)))
        return Push(
            run=record.run,
            attempt=record.attempt,
            worker=record.worker,
            step=record.step,
            learning_rate=record.learning_rate,
            hold=record.hold,
            epoch=record.epoch,
            parts=parts,
        )

    def carry_out(self, applies: Sequence[Apply]) -> None:
        """Updates rows as decided, with nobody else about. The shell does it itself, when others wait (applying.py)."""
        for apply in applies:
            self.rows.live(apply.key).apply(apply.step, apply.learning_rate, apply.gradients)
            self.core.applied(apply.key, apply.step)

    # -- bases

    @property
    def is_based(self) -> bool:
        """Whether the newest base holds everything: another would be the same under the same name."""
        return self.base is not None and self.base.record == self._last()

    def capture(self) -> tuple[Base, list[tuple[PartitionKey, PartitionRows]]]:
        """The state machine as it stands, and the live partitions whose rows belong to it. No Apply may be under way.

        The caller begins a snapshot of each before anything else is taken, and writes them (base.py).
        """
        assert not self.core.is_applying, "carry out what was decided first"
        base = Base.of(self.core, self._last())
        live = [
            (key, part)
            for key, part in self.rows.partitions().items()
            if isinstance(part, PartitionRows) and not self.core.partitions[key].empty
        ]
        return base, live
