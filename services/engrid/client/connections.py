"""Which shard holds what, at the newest epoch known, and the open connection to each.

The placement is read once and kept. It is read again when a shard answers that it does not own what was asked, or does
not answer: from the directory or, where that is gone, from the shards themselves. The directory also says where each
shard is today, which the placement may not know yet: one that was started again may listen elsewhere.

No call to the directory has a deadline of its own (a Redis that hangs takes seconds to say so), so each is made by a
thread, and whoever has no more time goes on without it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message

from engrid.directory import Directory, Placement, ShardSource, open_directory, read_source
from engrid.rpc.channel import open_channel
from engrid.rpc.errors import (
    CancelledError,
    DeadlineExceededError,
    EngridError,
    ShardUnavailableError,
    UnknownTableError,
    from_rpc,
)
from engrid.rpc.forks import check_not_forked
from engrid.tables import TableSpec
from engrid.v1 import memory_pb2 as pb
from engrid.v1 import memory_pb2_grpc

from .apart import Calls, apart
from .config import ClientConfig
from .routing import TableRoute, routes
from .transport import GrpcTransport

DIRECTORY_SHARE = 0.5
"""Of the time there is, the most that is waited for the directory; the rest is for the shards."""
DESCRIBE_SECONDS = 1.0
"""Longest wait for a shard that is asked for its placement."""
MAX_READS = 4
"""Reads of the directory under way at a time; where so many hang, it is taken for gone."""


ELSEWHERE = (
    "A shard that was started again may be elsewhere, and this client, opened by a shard's address, cannot look it up: open it "
    "by the run directory or the redis:// URL"
)

Method = Callable[[memory_pb2_grpc.MemoryServiceStub], Any]


@dataclass(frozen=True)
class Known:
    """What the directory says."""

    placement: Placement | None
    addresses: Mapping[str, str]
    """host:port of every shard registered."""


class Connections:
    """Shared by the threads of one client."""

    def __init__(self, source: str | os.PathLike[str], config: ClientConfig) -> None:
        """source: a directory (a path object, file:PATH, /PATH or redis://...), or host:port of any shard."""
        check_not_forked()
        self.config = config
        self.directory: Directory | None = None
        self._transports: dict[str, GrpcTransport] = {}
        self._addresses: dict[str, str] = {}
        """Of shards that the directory knows under another address than the placement."""
        self._lock = threading.Lock()
        self._unary: set[grpc.Channel] = set()
        """Channels of calls under way to shards that may not be in the placement."""
        self._reads = threading.BoundedSemaphore(MAX_READS)
        self._closed = False
        found = read_source(source)
        if isinstance(found, ShardSource):
            self._placement = placement_of_shard(found.address, timeout=config.timeout)
        else:
            self.directory = open_directory(source)
            known = read_directory(self.directory)
            self._placement, self._addresses = known.placement, dict(known.addresses)
        self._routes = routes(self._placement) if self._placement else {}

    @property
    def epoch(self) -> int:
        """Epoch of the placement known; 0 where there is none."""
        return self._placement.epoch if self._placement else 0

    def placement(self, deadline: float | None = None) -> Placement:
        """The newest placement known; raises UnknownTableError before the first table is created."""
        check_not_forked()
        if self._placement is None:
            self.refresh(deadline)
        if self._placement is None:
            raise UnknownTableError("the store has no tables yet; create them first")
        return self._placement

    def table(self, name: str, deadline: float | None = None) -> tuple[TableSpec, TableRoute]:
        """A table and how its rows are routed, asking for a newer placement where the table is unknown.

        Raises UnknownTableError; DeadlineExceededError where the time was over before all were asked.
        """
        check_not_forked()
        complete = True
        if self._placement is None or name not in self._placement.tables:
            complete = self.refresh(deadline)
        placement = self.placement(deadline)
        if name not in placement.tables:
            known = ", ".join(placement.tables) or "none"
            if not complete:
                raise DeadlineExceededError(
                    f"no table {name!r} at epoch {placement.epoch} (known: {known}), and no newer placement could be read "
                    "in the time given: the directory does not answer"
                )
            raise UnknownTableError(f"no table {name!r} at epoch {placement.epoch}; known: {known}")
        return placement.tables[name], self._routes[name]

    def refresh(self, deadline: float | None = None) -> bool:
        """Takes over a newer placement, if the directory or any shard knows one, and the addresses of today.

        deadline: on time.monotonic()'s clock; None: `timeout` seconds from now. False where the directory did not answer
        by then.
        """
        check_not_forked()
        if deadline is None:
            deadline = time.monotonic() + self.config.timeout
        known = self._from_directory(deadline)
        newest = known.placement if known else None
        if newest is None or newest.epoch <= self.epoch:
            newest = max([newest, *self._from_shards(deadline)], key=lambda found: found.epoch if found else 0)
        with self._lock:
            if known is not None:
                self._addresses = dict(known.addresses)
            elif newest is not None and newest.epoch > self.epoch:
                self._addresses = {}  # it knows better than what the directory said once
            if newest is not None and newest.epoch > self.epoch:
                self._placement, self._routes = newest, routes(newest)
        return known is not None or self.directory is None

    def _from_directory(self, deadline: float) -> Known | None:
        """None where it is gone, or does not answer in time."""
        directory = self.directory
        if directory is None:
            return None
        found: list[Known] = []
        done = threading.Event()

        def read() -> None:
            if self._reads.acquire(blocking=False):  # here, where no Ctrl-C comes between this and giving it back
                try:
                    found.append(read_directory(directory))
                except Exception:  # noqa: BLE001 - one closed meanwhile raises anything
                    """As if it were gone; the shards are asked."""
                finally:
                    self._reads.release()
            done.set()

        threading.Thread(target=read, name="engrid directory", daemon=True).start()
        done.wait(max(0.0, DIRECTORY_SHARE * (deadline - time.monotonic())))
        return found[0] if found else None

    def _from_shards(self, deadline: float) -> list[Placement | None]:
        """Of all at once."""
        timeout = min(DESCRIBE_SECONDS, deadline - time.monotonic())
        if self._placement is None or timeout <= 0:
            return []
        transports = [self.transport(shard) for shard in self._placement.shards]

        def ask(calls: Calls) -> list[Placement | None]:
            begun = [
                calls.add(each.future(lambda stub: stub.Describe, pb.DescribeRequest(), timeout)) for each in transports
            ]
            found: list[Placement | None] = []
            for call in begun:
                with suppress(grpc.RpcError, grpc.FutureCancelledError, ValueError):
                    found.append(_placement_in(call.result()))
            return found

        return apart(ask)

    def shards(self) -> list[str]:
        """Names of all shards of the placement."""
        return list(self.placement().shards)

    def address(self, shard: str) -> str:
        """Where a shard of the placement is: as the directory said last, else as the placement says."""
        return self._addresses.get(shard) or self.placement().shards[shard]

    def transport(self, shard: str) -> GrpcTransport:
        """The connection to a shard of the placement, opened on first use and anew where its address changed.

        Raises CancelledError once the client was closed.
        """
        check_not_forked()
        address = self.address(shard)
        with self._lock:
            self._check_open()
            transport = self._transports.get(shard)
            if transport is None or transport.address != address:
                if transport is not None:
                    _close_all([transport])
                transport = apart(lambda _: GrpcTransport(shard, address, max_in_flight=self.config.max_in_flight))
                self._transports[shard] = transport
            return transport

    def serves(self, table: str) -> bool:
        """Whether all partitions of the table have rows to serve, as their primaries answer now."""
        parts = self.placement().partitions[table]
        ready = set()
        for shard in {part.primary for part in parts}:
            reply = self.describe(shard)
            ready |= {state.partition for state in reply.partitions if state.table == table and not state.empty}
        return ready == {part.index for part in parts}

    def describe(self, shard: str, timeout: float | None = None) -> pb.DescribeReply:
        """What a shard of the placement says of itself. timeout: seconds; None: the client's."""
        transport = self.transport(shard)
        seconds = self.config.timeout if timeout is None else timeout
        try:
            reply: pb.DescribeReply = apart(
                lambda calls: calls.add(
                    transport.future(lambda stub: stub.Describe, pb.DescribeRequest(), seconds)
                ).result()
            )
        except grpc.RpcError as error:
            raise self.advised(from_rpc(error, transport.peer)) from error
        return reply

    def unary(self, method: Method, address: str, request: Message, *, timeout: float, peer: str) -> Any:
        """The reply of one call to a shard that may not be in the placement yet. Raises EngridError naming the peer,
        CancelledError once the client was closed."""

        def ask(calls: Calls) -> Any:
            with open_channel(address) as channel:
                with self._lock:
                    self._check_open()
                    self._unary.add(channel)
                try:
                    stub = memory_pb2_grpc.MemoryServiceStub(channel)  # type: ignore[no-untyped-call]
                    return calls.add(method(stub).future(request, timeout=timeout)).result()
                finally:
                    with self._lock:
                        self._unary.discard(channel)

        try:
            return apart(ask)
        except grpc.RpcError as error:
            raise from_rpc(error, peer) from error

    def advised(self, error: EngridError) -> EngridError:
        """The error, with what to do where a shard may have moved and this client has no directory to look in."""
        if self.directory is not None or type(error) is not ShardUnavailableError or ELSEWHERE in str(error):
            return error
        return ShardUnavailableError(f"{error}. {ELSEWHERE}")

    def _check_open(self) -> None:
        if self._closed:
            raise CancelledError("the client was closed")

    def close(self) -> None:
        """Closes every connection; what is under way fails."""
        apart(lambda _: self._close())

    def _close(self) -> None:
        with self._lock:
            self._closed = True
            transports, self._transports = list(self._transports.values()), {}
            unary = list(self._unary)
        _close_all(transports)
        for channel in unary:
            channel.close()
        if self.directory is not None:
            self.directory.close()


def _close_all(transports: Iterable[GrpcTransport]) -> None:
    def close(_: Calls) -> None:
        for transport in transports:
            transport.close()

    apart(close)


def read_directory(directory: Directory) -> Known:
    """Raises DirectoryError."""
    return Known(directory.placement(), {name: record.address for name, record in directory.shards().items()})


def placement_of_shard(address: str, *, timeout: float) -> Placement | None:
    """The newest placement the shard at host:port knows; None where it has none yet."""

    def ask(calls: Calls) -> pb.DescribeReply:
        with open_channel(address) as channel:
            stub = memory_pb2_grpc.MemoryServiceStub(channel)  # type: ignore[no-untyped-call]
            reply: pb.DescribeReply = calls.add(stub.Describe.future(pb.DescribeRequest(), timeout=timeout)).result()
            return reply

    try:
        reply = apart(ask)
    except grpc.RpcError as error:
        raise from_rpc(error, f"shard at {address}") from error
    if not reply.shard:
        raise ShardUnavailableError(f"{address} answers, but is no shard")
    return _placement_in(reply)


def _placement_in(reply: pb.DescribeReply) -> Placement | None:
    return Placement.from_json(json.loads(reply.placement)) if reply.placement else None
