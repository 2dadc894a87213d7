"""A shard's own starting point: its rows, their optimizer state and its state machine as of one record of its log.

    base/0000000000001234/       the record it stands at; replay begins with 1235
        base.json                placement, where each partition stands, what was saved; a digest over it all
        held                     pushes taken and not applied yet, as records; their gradients are nowhere else
        tables/...               one file per array of each live partition (engrid.storage.partition)
    base/.0000000000001290.partial/     being written, or left by a crash

It bounds what a start has to replay, and lets the log be cut off. It is this shard's alone and says nothing of others:
a model is saved and resumed by checkpoints, which are of all shards at one step. Written while pushes go on
(snapshot.py), published by one rename: files and names are durable before it, the name after. Sealed rows are not in it;
whoever serves a version loads it again.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from engrid.directory import Placement
from engrid.rpc.errors import EngridError
from engrid.rpc.frames import floats_to_bytes, ids_to_bytes
from engrid.shard.core.machine import ShardCore
from engrid.shard.core.messages import Held, PartitionKey, PartitionState
from engrid.shard.rows.gradients import Gradients
from engrid.shard.rows.partitions import AnyPartition, PartitionRows, SealedPartition, ShardRows
from engrid.shard.rows.saving import save_snapshot
from engrid.shard.rows.snapshot import ImageMemory
from engrid.storage import partition
from engrid.storage.disk import Disk
from engrid.storage.errors import CheckpointDamagedError
from engrid.storage.partition import SavedPartition

from .records import PushPart, PushRecord, decode, encode

BASES = "base"
_FORMAT = 2
_SIZE = struct.Struct("<Q")


@dataclass(frozen=True, kw_only=True)
class Base:
    """A shard's state at a record."""

    record: int
    placement: Placement | None
    states: Mapping[PartitionKey, PartitionState]
    """Copies, `held` included."""
    saved: Sequence[SavedPartition] = field(default_factory=list)

    @property
    def folder(self) -> str:
        """Where it lies once it is published."""
        return f"{BASES}/{self.record:016d}"

    @classmethod
    def of(cls, core: ShardCore, record: int) -> Base:
        """The state machine as it stands; its rows are still to be saved."""
        states = {
            key: replace(state, watermarks=dict(state.watermarks), held={w: replace(h) for w, h in state.held.items()})
            for key, state in core.partitions.items()
        }
        return cls(record=record, placement=core.placement, states=states)

    def write(self, disk: Disk, live: Sequence[tuple[PartitionKey, PartitionRows]]) -> Base:
        """Sweeps the snapshots that `live` have begun into files, publishes the base and removes older ones.

        Raises OSError or SnapshotGivenUpError; the older base then stays, and what was written is removed. The
        snapshots are not settled.
        """
        disk.make_folder(BASES)
        disk.sync_folder("")
        _remove_all(disk, keep=None, partials=True)
        try:
            whole = self._write(disk, live)
        except (OSError, EngridError):
            with suppress(OSError):  # the next base begins with it
                _remove_all(disk, keep=None, partials=True)
            raise
        _remove_all(disk, keep=self.folder, partials=True)
        return whole

    def _write(self, disk: Disk, live: Sequence[tuple[PartitionKey, PartitionRows]]) -> Base:
        partial = f"{BASES}/.{self.record:016d}.partial"
        disk.make_folder(partial)
        disk.make_folder(f"{partial}/tables")
        saved = []
        for key, part in live:
            state = self.states[key]
            saved.append(
                save_snapshot(
                    part, disk, partial, key, step=state.step, attempt=state.attempt, watermarks=state.watermarks
                )
            )
        whole = replace(self, saved=saved)
        _write_file(disk, f"{partial}/held", whole.held_bytes())
        _write_file(disk, f"{partial}/base.json", whole.to_bytes())
        disk.sync_folder(partial)  # the files under tables are durable, their names too (PartitionWriter.finish)
        disk.rename(partial, self.folder)
        disk.sync_folder(BASES)
        return whole

    def restore(self, disk: Disk, shard: str) -> tuple[ShardCore, ShardRows]:
        """State machine and rows as they were. Raises CheckpointDamagedError."""
        core, rows = ShardCore(shard, self.placement), ShardRows()
        if self.placement is None:
            return core, rows
        core.partitions = dict(self.states)
        made: dict[PartitionKey, AnyPartition] = {}
        by_key = {(saved.table, saved.index): saved for saved in self.saved}
        for key, state in self.states.items():
            spec = self.placement.tables[key[0]]
            if state.empty and not spec.version:
                continue
            made |= rows.allocate(self.placement, [key])
            part = made[key]
            if isinstance(part, SealedPartition):
                state.empty = True
                continue
            partition.restore(disk, self.folder, by_key[key], part.start, part.stop, part.rows.arrays())
            part.rows.measure()
        rows.replace(self.placement, made, [])
        return core, rows

    def held_bytes(self) -> bytes:
        """Every held push as a record of one part, each behind its size."""
        out = bytearray()
        for key, state in self.states.items():
            for worker, held in state.held.items():
                gradients: Gradients = held.gradients
                part = PushPart(
                    table=key[0],
                    partition=key[1],
                    seq=state.watermarks[worker],
                    row_ids=ids_to_bytes(gradients.ids),
                    gradients=floats_to_bytes(gradients.values),
                )
                push = PushRecord(
                    run=state.run,
                    attempt=state.attempt,
                    worker=worker,
                    step=held.step,
                    learning_rate=held.learning_rate,
                    hold=not held.committed,
                    epoch=0,
                    parts=[part],
                )
                payload = b"".join(encode(push))
                out += _SIZE.pack(len(payload)) + payload
        return bytes(out)

    def to_bytes(self) -> bytes:
        """Return what `read_newest_base` reads: JSON."""
        plain = {
            "format": _FORMAT,
            "record": self.record,
            "placement": self.placement.to_json() if self.placement else None,
            "states": [
                {
                    "table": key[0],
                    "partition": key[1],
                    "run": state.run,
                    "attempt": state.attempt,
                    "token": state.token,
                    "workers": state.workers,
                    "step": state.step,
                    "since": state.since,
                    "empty": state.empty,
                    "watermarks": {str(worker): seq for worker, seq in state.watermarks.items()},
                }
                for key, state in self.states.items()
            ],
            "saved": [each.to_json() for each in self.saved],
            "held": hashlib.sha256(self.held_bytes()).hexdigest(),
        }
        return json.dumps(plain | {"digest": _digest(plain)}).encode()


def read_newest_base(disk: Disk) -> Base | None:
    """None where there is none. Raises CheckpointDamagedError where the newest is not what was written.

    An older one would not do: the log in between is gone.
    """
    if BASES not in disk.names(""):
        return None
    whole = [name for name in disk.names(BASES) if not name.startswith(".")]
    if not whole:
        return None
    folder = f"{BASES}/{whole[-1]}"
    path = f"{folder}/base.json"
    try:
        values = json.loads(disk.read(path))
        digest = values.pop("digest")
        if digest != _digest(values) or values["format"] != _FORMAT:
            raise _damaged(path, "does not match its digest")
        base = _from_json(values)
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
        raise _damaged(path, f"cannot be read: {error}") from error
    _add_held(base, disk.read(f"{folder}/held"), values["held"], f"{folder}/held")
    return base


def _from_json(values: Mapping[str, Any]) -> Base:
    states = {}
    for each in values["states"]:
        watermarks = {int(worker): seq for worker, seq in each["watermarks"].items()}
        states[each["table"], each["partition"]] = PartitionState(
            run=each["run"],
            attempt=each["attempt"],
            token=each["token"],
            workers=each["workers"],
            step=each["step"],
            since=each["since"],
            empty=each["empty"],
            watermarks=watermarks,
        )
    return Base(
        record=values["record"],
        placement=Placement.from_json(values["placement"]) if values["placement"] else None,
        states=states,
        saved=[SavedPartition.from_json(each) for each in values["saved"]],
    )


def _add_held(base: Base, raw: bytes, sha256: str, path: str) -> None:
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise _damaged(path, "does not match its checksum")
    at = 0
    while at < len(raw):
        (size,) = _SIZE.unpack_from(raw, at)
        push = decode(memoryview(raw)[at + _SIZE.size : at + _SIZE.size + size])
        at += _SIZE.size + size
        if not isinstance(push, PushRecord) or base.placement is None:
            raise _damaged(path, "holds something else than pushes of its placement")
        (part,) = push.parts
        ids = np.frombuffer(part.row_ids, "<i8")
        values = np.frombuffer(part.gradients, "<f4").reshape(len(ids), base.placement.tables[part.table].width)
        base.states[part.table, part.partition].held[push.worker] = Held(
            push.step, push.learning_rate, Gradients.of(ids, values), not push.hold
        )


def begin_snapshots(live: Sequence[tuple[PartitionKey, PartitionRows]], memory: ImageMemory) -> None:
    """Of each partition, at one moment: the caller lets nothing be applied meanwhile. None is left where one fails."""
    begun = []
    try:
        for _, part in live:
            part.begin_snapshot(memory)
            begun.append(part)
    except BaseException:
        for part in begun:
            part.settle_snapshot()
        raise


def _write_file(disk: Disk, path: str, content: bytes) -> None:
    file = disk.create(path)
    try:
        file.write([content])
        file.sync()
    finally:
        file.close()


def _remove_all(disk: Disk, *, keep: str | None, partials: bool) -> None:
    """Older bases where one is kept, and what crashes left. Not synced: what comes back is older than the newest, or a
    partial, and is removed with the next base."""
    for name in disk.names(BASES):
        folder = f"{BASES}/{name}"
        if (name.startswith(".") and partials) or (keep is not None and folder < keep):
            _remove(disk, folder)


def _remove(disk: Disk, folder: str) -> None:
    for name in disk.names(folder):
        path = f"{folder}/{name}"
        if name == "tables":
            _remove(disk, path)
        else:
            disk.remove(path)
    disk.remove(folder)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _damaged(path: str, what: str) -> CheckpointDamagedError:
    return CheckpointDamagedError(
        f"{path} {what}. Put an intact copy back, or move the shard's state away and restore a checkpoint", [path]
    )
