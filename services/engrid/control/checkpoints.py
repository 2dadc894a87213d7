"""Checkpoints of live tables, written and read by the shards themselves in one directory that all of them share.

A save has two halves, so that training stands still for the first alone:

    begin     every shard holds its partitions as they are after the step       milliseconds; then the next step is pushed
    finish    every shard has written its files; the manifest; one rename       as long as the disk takes
              every shard hears what it was published as

Whatever fails in between publishes nothing: the shards count what they had saved as changed still, and what was written
lies in a folder with a dot, which `Checkpoints.clean` removes.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc

from engrid.client.apart import Calls, apart
from engrid.client.arrays import check_number, check_text
from engrid.client.attempts import Attempt, check_tables
from engrid.client.client import MemoryClient
from engrid.client.transport import GrpcTransport
from engrid.directory import DirectoryError, FileDirectory
from engrid.rpc.errors import BadRequestError, EngridError, UnavailableError, from_rpc
from engrid.storage.checkpoint import Checkpoints
from engrid.storage.disk import LocalDisk
from engrid.storage.errors import CheckpointError
from engrid.storage.manifest import Manifest, WorkerFile, checkpoint_name
from engrid.storage.partition import SavedPartition
from engrid.tables import TableSpec
from engrid.v1 import memory_pb2 as pb

from .tables import create_tables, current, directory_of, spread_placement

T = TypeVar("T")


class CheckpointSave:
    """A checkpoint that all shards have begun. `finish` it, or `abandon` it."""

    def __init__(
        self,
        client: MemoryClient,
        folder: Path,
        *,
        run: str,
        attempt: Attempt | int,
        step: int,
        tables: Sequence[str],
        base: str = "",
    ) -> None:
        """Returns once every shard holds `tables` as they are after `step`: until then nobody may push step + 1.

        folder: of the checkpoints of this run. base: name of a published one; what has not changed since is left out.
        Raises OSError where the folder cannot be written, and what any shard answers: then none saves.
        """
        check_text("run", run)
        attempt = check_number("attempt", attempt.number if isinstance(attempt, Attempt) else attempt)
        step, tables = check_number("step", step), check_tables(client, tables)
        self.folder, self.name = folder.resolve(), checkpoint_name(step, attempt)
        self._client = client
        self._about: dict[str, Any] = {"run": run, "attempt": attempt, "step": step, "base": base}
        self._specs = {table: client.connections.table(table)[0] for table in tables}
        _allow(client, self.folder)
        self._checkpoints = Checkpoints(LocalDisk(self.folder))
        self.partial = self._checkpoints.begin(self.name, uuid.uuid4().hex[:12])
        request = pb.CheckpointRequest(
            run=run,
            attempt=attempt,
            step=step,
            tables=tables,
            folder=str(self.folder),
            partial=self.partial,
            base=base,
            wait=client.config.begin_timeout,
        )
        self._transports = _holders(client, tables)
        timeout = client.config.checkpoint_timeout
        self._calls, self._begun = [], Calls()
        try:
            for transport in self._transports:
                self._calls.append(self._begin(transport, request, timeout))
            for transport, call in zip(self._transports, self._calls, strict=True):
                self._next(transport, call)
        except BaseException:
            self.abandon()
            raise

    def _begin(self, transport: GrpcTransport, request: pb.CheckpointRequest, timeout: float) -> Any:
        return apart(lambda calls: calls.add(transport.stub.Checkpoint(request, timeout=timeout)), self._begun)

    def write_file(self, name: str, content: bytes) -> WorkerFile:
        """A file of the worker's that goes with the rows, to be named in `finish`. Raises OSError."""
        return self._checkpoints.write_file(self.partial, name, content)

    def finish(self, files: Mapping[str, WorkerFile], about: Mapping[str, Any]) -> Manifest:
        """Publishes once every shard has written its part. about: JSON of the worker's own.

        Raises what any shard answers, OSError or CheckpointError; then nothing is published.
        """
        published = ""
        try:
            partitions = []
            for transport, call in zip(self._transports, self._calls, strict=True):
                found = self._next(transport, call).partitions
                partitions += [SavedPartition.from_json(json.loads(each)) for each in found]
            manifest = Manifest(tables=self._specs, partitions=partitions, files=files, about=about, **self._about)
            self._checkpoints.publish(self.partial, manifest)
            published = manifest.name
        finally:
            self._settle(published)
        return manifest

    def abandon(self) -> None:
        """Ends it; nothing is published."""
        self._settle("")

    def _next(self, transport: GrpcTransport, call: Any) -> pb.CheckpointProgress:
        try:
            progress: pb.CheckpointProgress | None = apart(lambda _: next(call, None), self._begun)
        except grpc.RpcError as error:
            raise from_rpc(error, transport.peer) from error
        if progress is None:
            raise CheckpointError(f"{transport.peer} ended checkpoint {self.name} without saying what it saved")
        return progress

    def _settle(self, published: str) -> None:
        if not published:
            self._begun.stop()
        request = pb.SettleCheckpointRequest(partial=self.partial, published=published)
        timeout = self._client.config.timeout
        for transport in self._transports:
            self._settle_at(transport, request, timeout)

    @staticmethod
    def _settle_at(transport: GrpcTransport, request: pb.SettleCheckpointRequest, timeout: float) -> None:
        # Who does not hear of it saves more the next time.
        with suppress(grpc.RpcError, EngridError, ValueError):  # ValueError: the client was closed
            apart(lambda calls: calls.add(transport.stub.SettleCheckpoint.future(request, timeout=timeout)).result())


def restore_tables(client: MemoryClient, folder: Path, manifest: Manifest, *, attempt: Attempt | int) -> None:
    """Makes the live tables of a checkpoint what they were, rows and optimizer state, over all shards there are now.

    Tables that are not there, or lie on other shards than those registered now, are made anew; live ones of another spec
    are replaced. attempt: the one that goes on from here, a bare number being for whoever begins it first; older ones
    are fenced. Raises what any shard answers: its partitions serve nothing then.
    """
    _allow(client, folder)
    number, token = (attempt.number, attempt.token) if isinstance(attempt, Attempt) else (attempt, "")
    number = check_number("attempt", number)
    _make(client, manifest.tables)
    tables = list(manifest.tables)
    request = pb.RestoreRequest(
        folder=str(folder.resolve()),
        name=manifest.name,
        tables=tables,
        attempt=number,
        token=token,
        wait=client.config.push_timeout,
    )
    timeout = client.config.checkpoint_timeout
    _all(_holders(client, tables), lambda each: each.stub.Restore.future(request, timeout=timeout))


def _make(client: MemoryClient, specs: Mapping[str, TableSpec]) -> None:
    """Tables of these specs over the shards registered now; those that are there already stay."""
    now = current(directory_of(client))
    client.connections.refresh()
    known = client.placement if client.connections.epoch else None
    there = known is not None and all(
        known.tables.get(name) == spec and {part.primary for part in known.partitions[name]} == set(now.shards)
        for name, spec in specs.items()
    )
    if there:
        spread_placement(client)
    else:
        create_tables(client, list(specs.values()), replace=True)


def _descriptions(client: MemoryClient) -> list[pb.DescribeReply]:
    """What the shards registered now say of themselves; those that are away say nothing."""
    replies = []
    for address in current(directory_of(client)).shards.values():
        with suppress(UnavailableError):
            replies.append(
                client.connections.unary(
                    lambda stub: stub.Describe,
                    address,
                    pb.DescribeRequest(),
                    timeout=client.config.timeout,
                    peer=f"shard at {address}",
                )
            )
    return replies


def live_states(client: MemoryClient) -> list[pb.PartitionState]:
    """Where the live partitions stand, as all shards say now."""
    client.connections.refresh()
    if not client.connections.epoch:
        return []
    transports = [client.connections.transport(shard) for shard in client.placement.shards]
    timeout = client.config.timeout
    replies = _all(transports, lambda each: each.stub.Describe.future(pb.DescribeRequest(), timeout=timeout))
    return [state for reply in replies for state in reply.partitions if "@" not in state.table]


def check_replaces(client: MemoryClient, names: Collection[str], run: str) -> None:
    """Raises BadRequestError where live tables of these names hold steps of another run than `run`: they would be lost.

    Shards that are away hold none.
    """
    found = [state for reply in _descriptions(client) for state in reply.partitions]
    states = [each for each in found if each.table in names and each.step and each.run != run]
    others = {state.run: state.step for state in states}
    if others:
        theirs = ", ".join(f"{other or 'another'} (step {step})" for other, step in sorted(others.items()))
        raise BadRequestError(
            f"the live tables {', '.join(sorted({state.table for state in states}))} hold rows of run {theirs}, which would be "
            "lost. Save them first (engrid checkpoint save), go on with that run (engrid train --resume with its --out), give "
            "this run another name (--run), or give them up with --replace"
        )


def check_folder(client: MemoryClient, folder: Path) -> None:
    """Raises BadRequestError, naming the shard, where one does not read and write the very directory that we do.

    Raises OSError where we cannot write it ourselves.
    """
    _allow(client, folder)
    disk = LocalDisk(folder.resolve())
    file, content = f".shared-{uuid.uuid4().hex}", uuid.uuid4().bytes
    written = disk.create(file)
    try:
        written.write([content])
        written.close()
        request = pb.CheckFolderRequest(folder=str(disk.root), file=file)
        for shard, address in current(directory_of(client)).shards.items():
            peer, timeout = f"shard {shard} at {address}", client.config.timeout
            reply = client.connections.unary(
                lambda stub: stub.CheckFolder, address, request, timeout=timeout, peer=peer
            )
            if reply.content != content or not disk.exists(f"{file}.{shard}"):
                raise BadRequestError(
                    f"{disk.root} of shard {shard} at {address} is another directory than ours; checkpoints need one "
                    "that the workers and all shards share"
                )
    finally:
        for name in disk.names(""):
            if name.startswith(file):
                disk.remove(name)


def _allow(client: MemoryClient, folder: Path) -> None:
    """Tells shards of this host and user that they may use the folder. Others have to be started with it."""
    directory = client.connections.directory
    if isinstance(directory, FileDirectory):
        with suppress(DirectoryError, OSError):  # whether a shard may use it is the shard's to say
            directory.allow_folder(folder)


def _holders(client: MemoryClient, tables: Sequence[str]) -> list[GrpcTransport]:
    placement = client.placement
    shards = dict.fromkeys(part.primary for table in tables for part in placement.partitions[table])
    return [client.connections.transport(shard) for shard in shards]


def _all(transports: Sequence[GrpcTransport], call: Callable[[GrpcTransport], grpc.Future[T]]) -> list[T]:
    """Calls all at once and waits for all; raises the first error after every call has ended."""

    def ask(calls: Calls) -> list[T]:
        futures = [(transport, calls.add(call(transport))) for transport in transports]
        replies: list[T] = []
        errors: list[EngridError] = []
        for transport, future in futures:
            try:
                replies.append(future.result())
            except grpc.RpcError as error:
                errors.append(from_rpc(error, transport.peer))
        if errors:
            raise errors[0]
        return replies

    return apart(ask)
