"""Changes to the store: tables made and dropped, partitions loaded and exported.

A new placement is checked on every shard, claimed in the directory by compare-and-set, then adopted by every
shard. Where a shard fails between claim and adoption, the tables are taken back under the next epoch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import grpc

from engrid.client.apart import Calls, apart
from engrid.client.arrays import as_integer, check_number, check_text
from engrid.client.client import MemoryClient
from engrid.directory import (
    EMPTY_PLACEMENT,
    Directory,
    EpochConflictError,
    Placement,
    with_shards,
    with_tables,
    without_tables,
)
from engrid.rpc.errors import BadRequestError, EngridError, ShardUnavailableError, WrongEpochError, from_rpc
from engrid.rpc.forks import check_not_forked
from engrid.tables import TableSpec
from engrid.v1 import memory_pb2 as pb


def create_tables(
    client: MemoryClient,
    specs: Sequence[TableSpec],
    *,
    partitions_per_shard: int = 1,
    replace: bool = False,
    exist_ok: bool = False,
) -> Placement:
    """Makes tables over all shards registered and returns the placement that holds them.

    replace: drop tables of the same names first. exist_ok: keep those that are there with the same spec, rows and all.
    Otherwise an existing table is refused. Raises BadRequestError, OutOfMemoryError before anything is allocated,
    EpochConflictError where someone else changed the placement.
    """
    if replace and exist_ok:
        raise BadRequestError("replace drops the tables that are there, exist_ok keeps them; give one of the two")
    if partitions_per_shard < 1:
        raise BadRequestError(f"partitions_per_shard is {partitions_per_shard}; give at least 1")
    names = [spec.name for spec in specs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadRequestError(f"table {', '.join(twice)} is given twice")
    directory = directory_of(client)
    published = directory.placement() or EMPTY_PLACEMENT
    existing = sorted(set(names) & published.tables.keys())
    before = over_registered(directory, without_tables(published, existing) if replace else published)
    if exist_ok:
        for spec in specs:
            _check_same(spec, before.tables.get(spec.name))
        specs, existing = [spec for spec in specs if spec.name not in existing], []
        if not specs:
            client.connections.refresh()
            return client.placement
    if existing and not replace:
        raise BadRequestError(
            f"table {', '.join(existing)} exists; keep it (exist_ok=True), replace it (replace=True), or drop it first"
        )
    after = with_tables(before, specs, partitions_per_shard=partitions_per_shard)
    _check(client, after)
    # Dropped in an epoch of its own: a table of the same spec in the next would be taken for the one that is there.
    drop_tables(client, existing)
    return change(client, current(directory), after)


def _check_same(wanted: TableSpec, there: TableSpec | None) -> None:
    if there is None or there == wanted:
        return
    ours, theirs = wanted.to_json(), there.to_json()
    different = [f"{name} {theirs[name]!r}, not {ours[name]!r}" for name in ours if ours[name] != theirs[name]]
    raise BadRequestError(
        f"table {wanted.name} exists with {'; '.join(different)}; use that, replace the table (replace=True), or give "
        "another name"
    )


def drop_tables(client: MemoryClient, names: Iterable[str]) -> None:
    """Frees tables on all shards; names that do not exist are passed over. Raises BadRequestError for no list of names."""
    if isinstance(names, str):
        raise BadRequestError(f"names is {names!r}; give a list of names")
    directory = directory_of(client)
    before = directory.placement() or EMPTY_PLACEMENT
    known = [name for name in names if name in before.tables]
    if known:
        change(client, before, over_registered(directory, without_tables(before, known)))


def spread_placement(client: MemoryClient) -> None:
    """Returns once every shard has the placement this client knows, or a newer one, under its address of today.

    Who finds tables in the directory that someone else is just making may ask shards that have not heard of them yet.
    Raises EpochConflictError where someone else changes the placement.
    """
    directory = client.connections.directory
    if directory is not None:
        newest = current(directory)
        if newest != directory.placement():
            change(client, newest, newest)
            return
    for shard in client.placement.shards:
        with suppress(WrongEpochError):  # it is ahead of us
            _adopt(client, client.placement, shard)


def directory_of(client: MemoryClient) -> Directory:
    """Where placements are published; raises BadRequestError where the client was opened without it."""
    if client.connections.directory is None:
        raise BadRequestError("a client opened by a shard's address cannot change tables; open it by the directory")
    check_not_forked()
    return client.connections.directory


def current(directory: Directory) -> Placement:
    """The placement as it stands, over the shards registered now; raises as over_registered."""
    return over_registered(directory, directory.placement() or EMPTY_PLACEMENT)


def over_registered(directory: Directory, placement: Placement) -> Placement:
    """The placement over the shards registered now. Raises ShardUnavailableError where one is not that holds rows of it."""
    addresses = {record.name: record.address for record in directory.shards().values()}
    if not addresses:
        raise ShardUnavailableError("no shard is registered; start some first (engrid up)")
    for name, parts in placement.partitions.items():
        if gone := sorted({shard for part in parts for shard in part.shards} - addresses.keys()):
            raise ShardUnavailableError(
                f"table {name} has rows on {', '.join(gone)}, which is not registered (there are {', '.join(sorted(addresses))}); "
                f"start it again by that name and with the --state folder it had, or give the table up: "
                "create_tables(..., replace=True), or drop_tables"
            )
    return placement if placement.shards == addresses else with_shards(placement, addresses)


def change(client: MemoryClient, before: Placement, after: Placement) -> Placement:
    """Brings `after` into force one epoch after what is published; returns it as published."""
    directory = directory_of(client)
    published = directory.placement()
    claimed = published.epoch if published else None
    after = replace(after, epoch=(claimed or 0) + 1)
    _check(client, after)
    try:
        directory.publish(after, expected_epoch=claimed)
        for shard in after.shards:
            _adopt(client, after, shard)
    except EpochConflictError:  # nothing was published, though what somebody else did may look the same
        raise
    except BaseException:  # Ctrl-C too: some shards have it, and the directory says that all have
        if directory.placement() == after:
            _take_back(client, directory, replace(before, epoch=after.epoch + 1))
        raise
    client.connections.refresh()
    return after


def _check(client: MemoryClient, after: Placement) -> None:
    """Raises what any shard would raise on adopting; changes nothing."""
    for shard in after.shards:
        _adopt(client, after, shard, check_only=True)


def _take_back(client: MemoryClient, directory: Directory, undone: Placement) -> None:
    """Publishes the placement from before the change; a shard that is down reads it when it is back."""
    directory.publish(undone, expected_epoch=undone.epoch - 1)
    for shard in undone.shards:
        with suppress(EngridError):
            _adopt(client, undone, shard)


def _adopt(client: MemoryClient, placement: Placement, shard: str, *, check_only: bool = False) -> None:
    request = pb.AdoptRequest(placement=json.dumps(placement.to_json()), check_only=check_only)
    address, timeout = placement.shards[shard], client.config.admin_timeout
    client.connections.unary(
        lambda stub: stub.Adopt, address, request, timeout=timeout, peer=f"shard {shard} at {address}"
    )


def load_partition(
    client: MemoryClient,
    table: str,
    index: int,
    chunks: Iterable[bytes],
    *,
    step: int,
    run: str = "",
    attempt: int = 0,
) -> int:
    """Overwrites one partition with its rows in order, in byte chunks; returns their number.

    step, run, attempt: the training step the rows are the result of, and whose. Nothing is changed unless all rows
    come. Raises BadRequestError for what is none of these, and whatever `chunks` raises.
    """
    transport = client.connections.transport(_primary(client, table, index))
    sending = _Sending(_first_chunk(table, index, step, run, attempt), chunks)
    try:
        timeout = client.config.admin_timeout
        reply = apart(lambda calls: calls.add(transport.stub.Load.future(iter(sending), timeout=timeout)).result())
    except grpc.RpcError as error:
        if sending.error is not None:
            raise sending.error from None
        raise from_rpc(error, transport.peer) from error
    return int(reply.rows)


def _first_chunk(table: str, index: int, step: int, run: str, attempt: int) -> pb.LoadChunk:
    check_text("run", run)
    step, attempt = check_number("step", step), check_number("attempt", attempt)
    return pb.LoadChunk(table=table, partition=index, step=step, run=run, attempt=attempt)


class _Sending:
    """The messages of a load. gRPC keeps to itself what stops them, and tells it as a failure of the shard."""

    def __init__(self, first: pb.LoadChunk, chunks: Iterable[bytes]) -> None:
        self.error: BaseException | None = None
        self._first, self._chunks = first, chunks

    def __iter__(self) -> Iterator[pb.LoadChunk]:
        yield self._first
        try:
            for rows in self._chunks:
                yield self._chunk(rows)
        except GeneratorExit:
            raise
        except BaseException as error:
            self.error = error
            raise

    def _chunk(self, rows: bytes) -> pb.LoadChunk:
        if not isinstance(rows, bytes):
            raise BadRequestError(
                f"load of {self._first.table}[{self._first.partition}]: a chunk is {type(rows).__name__}; give bytes"
            )
        return pb.LoadChunk(rows=rows)


def export_partition(client: MemoryClient, table: str, index: int) -> Iterator[tuple[int, bytes]]:
    """Rows of one partition in order: (step applied when read, bytes) about a MiB at a time."""
    transport = client.connections.transport(_primary(client, table, index))
    request, timeout, calls = pb.ExportRequest(table=table, partition=index), client.config.admin_timeout, Calls()
    try:
        stream = apart(lambda calls: calls.add(transport.stub.Export(request, timeout=timeout)), calls)
        while (chunk := apart(lambda _: next(stream, None), calls)) is not None:
            yield chunk.step, chunk.rows
    except grpc.RpcError as error:
        raise from_rpc(error, transport.peer) from error
    finally:
        calls.stop()


def _primary(client: MemoryClient, table: str, index: int) -> str:
    client.connections.table(table)
    partitions = client.placement.partitions[table]
    if as_integer(index) is None:
        raise BadRequestError(f"partition {index!r} of table {table}: give its number")
    if not 0 <= index < len(partitions):
        raise BadRequestError(f"table {table} has partitions 0..{len(partitions) - 1}, not {index}")
    return partitions[index].shards[0]
