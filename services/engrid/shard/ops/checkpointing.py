"""A shard's part in checkpoints: its partitions saved at one step while pushes go on, and overwritten by a saved state.

    Checkpoint   wait until all partitions stand at step s | begin their snapshots | "begun" | sweep | files | wait to be settled
                 `----- under the shard's lock, with nothing being applied -----'
    Settle       published: rows touched are counted from this checkpoint on; or not: what it took counts as touched still

All snapshots begin under one hold of the lock that pushes are decided under, so no partition has a row of step s + 1. That
all shards save the same step is the caller's part: it pushes nothing of s + 1 before every shard has begun.

A save lives as long as its stream: `saving` is held from before the snapshots begin until they are settled, and a stream
that ends without a word, its caller having died, settles them as not published. So nobody waits for the dead.

A restore takes the rows out of service first and reads into new ones: a lookup gathers from the old rows or none, and
where reading fails the partitions are as empty as after a restart. No second copy is held meanwhile.
"""

from __future__ import annotations

import errno
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engrid.rpc.errors import (
    BadRequestError,
    DeadlineExceededError,
    DiskFullError,
    ShardUnavailableError,
    StepNotReachedError,
)
from engrid.shard.core.messages import PartitionKey, PartitionState
from engrid.shard.gate import LONGEST_WAIT
from engrid.shard.rows.partitions import PartitionRows, refuse_empty
from engrid.shard.rows.saving import save_snapshot
from engrid.shard.rows.snapshot import ImageMemory, SnapshotGivenUpError
from engrid.storage.checkpoint import Checkpoints
from engrid.storage.disk import Disk
from engrid.storage.errors import CheckpointError
from engrid.storage.manifest import Manifest
from engrid.storage.partition import SavedPartition
from engrid.tables import RowTable
from engrid.v1 import memory_pb2 as pb

from .folders import CheckpointFolders, check_name
from .requests import check_count, check_tables, check_wait

if TYPE_CHECKING:
    from engrid.shard.service import ShardService

PROOF = re.compile(r"\.shared-[0-9a-f]{32}")
"""Name of a file that proves a folder to be shared: the only kind whose content is given to whoever asks."""
MAX_PROOF_BYTES = 1024
"""Of such a file."""


@dataclass
class _Save:
    """One checkpoint of this shard, from its snapshots until it is settled."""

    request: pb.CheckpointRequest
    memory: ImageMemory
    watermarks: Mapping[PartitionKey, Mapping[int, int]]
    parts: dict[PartitionKey, PartitionRows] = field(default_factory=dict)
    settled: threading.Event = field(default_factory=threading.Event)

    def settle(self, published: str) -> None:
        for part in self.parts.values():
            part.settle_snapshot(published)
        self.settled.set()

    def give_up(self, reason: str) -> None:
        """Ends the sweep, or the wait for being settled."""
        self.memory.give_up(reason)
        self.settled.set()

    def write(self, disk: Disk, key: PartitionKey) -> SavedPartition:
        request, part = self.request, self.parts[key]
        if part.snapshot is None:  # a restore ended it
            raise SnapshotGivenUpError(f"the checkpoint was given up: {self.memory.given_up}")
        return save_snapshot(
            part,
            disk,
            request.partial,
            key,
            step=request.step,
            attempt=request.attempt,
            watermarks=self.watermarks[key],
        )


class Checkpointing:
    """Saves and restores the partitions of one shard."""

    def __init__(self, service: ShardService) -> None:
        self._service, self._gate, self._stepped = service, service.gate, service.gate.stepped
        self._name = service.config.name
        self._core, self._rows = service.journal.core, service.journal.rows
        self._folders = CheckpointFolders(service.config)
        self._save: _Save | None = None

    # -- saving

    def save(
        self, request: pb.CheckpointRequest, on_end: Callable[[Callable[[], None]], bool]
    ) -> Iterator[pb.CheckpointProgress]:
        """See MemoryService.Checkpoint. on_end: takes what is to be called once the caller has gone away; False: it has."""
        deadline = time.monotonic() + min(check_wait(request.wait), LONGEST_WAIT)
        check_count("step", request.step)
        check_tables(request.tables)
        if request.base:
            check_name("base", request.base)
        partial = check_name("partial", request.partial)
        disk = self._folders.disk(request.folder, f"{partial}/tables")
        if not disk.exists(f"{partial}/tables"):
            raise BadRequestError(
                f"shard {self._name} finds no {request.folder}/{request.partial}/tables; checkpoints need a directory that "
                "all shards share"
            )
        with self._gate.hold(self._service.saving, deadline, "another checkpoint to be written"):
            save = self._begin(request, deadline)
            try:
                if not on_end(lambda: save.give_up("its caller went away")):
                    save.give_up("its caller went away")
                yield pb.CheckpointProgress(begun=True)
                saved = []
                for key in save.parts:
                    with self._disk_errors(f"could not save {key[0]}[{key[1]}]"):
                        saved.append(save.write(disk, key))
                yield pb.CheckpointProgress(partitions=[json.dumps(each.to_json()) for each in saved])
                if not save.settled.wait(LONGEST_WAIT):
                    raise DeadlineExceededError(
                        f"shard {self._name}: nobody settled {request.partial} in {LONGEST_WAIT:g} s"
                    )
            finally:
                with self._stepped:
                    save.settle("")
                    self._save = None

    def _begin(self, request: pb.CheckpointRequest, deadline: float) -> _Save:
        """Begins the snapshots of all partitions at the step asked for, once they stand there."""
        with self._stepped:
            states = self._at_step(request)
            while states is None:
                if not self._stepped.wait(deadline - time.monotonic()):
                    reached = min(self._core.reached(table) for table in request.tables)
                    raise StepNotReachedError(
                        f"shard {self._name} is at step {reached}, the checkpoint is of {request.step}; some worker has not "
                        "pushed it",
                        expected=reached,
                    )
                states = self._at_step(request)
            memory = ImageMemory(self._service.config.image_bytes)
            save = _Save(request, memory, {key: dict(state.watermarks) for key, state in states.items()})
            try:
                for key in sorted(states):
                    part = self._rows.live(key)
                    part.begin_snapshot(memory, request.base if request.base == part.touched.base else "")
                    save.parts[key] = part
            except BaseException:
                save.settle("")
                raise
            self._save = save
            return save

    def _at_step(self, request: pb.CheckpointRequest) -> Mapping[PartitionKey, PartitionState] | None:
        self._gate.refuse_failed()
        for table in request.tables:
            if self._core.empty(table):
                refuse_empty(self._name, table)
        return self._core.to_save(request.run, request.attempt, request.step, list(request.tables))

    def settle(self, partial: str, published: str) -> None:
        """See MemoryService.SettleCheckpoint."""
        with self._stepped:
            if self._save is not None and self._save.request.partial == partial:
                self._save.settle(published)

    # -- restoring

    def restore(self, request: pb.RestoreRequest, *, deadline: float) -> int:
        """See MemoryService.Restore; returns the rows of all partitions."""
        rest = min(time.monotonic() + check_wait(request.wait), deadline)
        check_count("attempt", request.attempt, 1)
        check_tables(request.tables)
        checkpoints = Checkpoints(self._folders.disk(request.folder, check_name("checkpoint", request.name)))
        with self._disk_errors(f"could not read checkpoint {request.name}"):
            chain = checkpoints.chain(request.name)
            tables = list(request.tables)
            with self._gate.hold(self._service.loading, deadline, "rows that are being loaded"):
                keys = self._take_out(chain[-1], tables, request, rest)
                with self._service.keeping_rows(deadline):
                    rows = sum(self._read(checkpoints, chain, key, request.attempt) for key in keys)
        return rows

    def _check_tables(self, manifest: Manifest, tables: list[str]) -> None:
        placement = self._core.placement
        for table in tables:
            spec = placement.tables.get(table) if placement else None
            if spec is not None and spec.version:
                raise BadRequestError(f"table {table} is sealed; a checkpoint is restored into live tables")
            if spec is not None and spec != manifest.tables.get(table):
                raise CheckpointError(
                    f"checkpoint {manifest.name} is not of table {table} as it is: their specs differ"
                )

    def _take_out(
        self, manifest: Manifest, tables: list[str], request: pb.RestoreRequest, deadline: float
    ) -> list[PartitionKey]:
        """Closes the partitions to pushes and lookups, and lets go of their rows."""
        with self._service.at_rest(deadline):
            self._check_tables(manifest, tables)
            keys = self._core.to_restore(manifest.run, request.attempt, tables, request.token)
            assert keys is not None, "nothing is being applied"
            if self._save is not None:
                self._save.give_up(f"checkpoint {manifest.name} is being restored")
            assert self._core.placement is not None
            held = [key for key in keys if self._rows.holds(key)]
            for key in held:
                self._rows.live(key).restored()
            self._rows.replace(self._core.placement, {}, held)
            return keys

    def _read(self, checkpoints: Checkpoints, chain: list[Manifest], key: PartitionKey, attempt: int) -> int:
        placement = self._core.placement
        assert placement is not None
        where = placement.partitions[key[0]][key[1]]
        table = RowTable(placement.tables[key[0]], where.start, where.stop, filled=False)
        checkpoints.restore(chain, table)
        part = PartitionRows(where.start, where.stop, table)
        part.restored(chain[-1].name)
        with self._stepped:
            if self._core.placement is not placement:
                raise ShardUnavailableError(
                    f"shard {self._name} got another placement while {key[0]}[{key[1]}] was restored; restore again"
                )
            self._rows.replace(placement, {key: part}, [])
            self._service.journal.loaded(key, chain[-1].step, chain[-1].run, attempt, rows_kept=True)
            self._stepped.notify_all()
        return len(table)

    # -- the directory

    def check_folder(self, folder: str, file: str) -> bytes:
        """See MemoryService.CheckFolder."""
        shared = "checkpoints need one directory that the workers and all shards read and write"
        if not PROOF.fullmatch(file):
            raise BadRequestError(f"file {file!r}: give one named .shared- and 32 hex digits, which was made for this")
        try:
            disk = self._folders.disk(folder, file)
            content = disk.read(file, 0, MAX_PROOF_BYTES)
            answer = disk.create(check_name("file", f"{file}.{self._name}"))
        except (OSError, BadRequestError) as error:
            raise BadRequestError(f"shard {self._name} cannot use {folder}: {error}; {shared}") from error
        answer.close()
        return content

    @contextmanager
    def _disk_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else ShardUnavailableError
            raise kind(f"shard {self._name} {what}: {error}") from error
