"""Which shard holds what, at the newest epoch known, and the open connection to each.

The placement is read once and kept. It is read again when a shard answers that it does not own what was
asked: from the directory or, where that is gone, from the shards themselves.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from engrid.directory import Directory, DirectoryError, Placement, ShardSource, open_directory, read_source
from engrid.rpc.channel import open_channel
from engrid.rpc.errors import CancelledError, EngridError, ShardUnavailableError, UnknownTableError, from_rpc
from engrid.tables import TableSpec
from engrid.v1 import memory_pb2 as pb
from engrid.v1 import memory_pb2_grpc

from .config import ClientConfig
from .routing import TableRoute, routes
from .transport import GrpcTransport


class Connections:
    """Shared by the threads of one client."""

    def __init__(self, source: str | os.PathLike[str], config: ClientConfig) -> None:
        """source: a directory (a path object, file:PATH, /PATH or redis://...), or host:port of any shard."""
        self.config = config
        self.directory: Directory | None = None
        self._transports: dict[str, GrpcTransport] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._unary: set[grpc.Channel] = set()
        """Channels of calls under way to shards that may not be in the placement."""
        found = read_source(source)
        if isinstance(found, ShardSource):
            self._placement = placement_of_shard(found.address, timeout=config.timeout)
        else:
            self.directory = open_directory(source)
            self._placement = self.directory.placement()
        self._routes = routes(self._placement) if self._placement else {}

    @property
    def epoch(self) -> int:
        """Epoch of the placement known; 0 where there is none."""
        return self._placement.epoch if self._placement else 0

    def placement(self) -> Placement:
        """The newest placement known; raises UnknownTableError before the first table is created."""
        if self._placement is None:
            self.refresh()
        if self._placement is None:
            raise UnknownTableError("the store has no tables yet; create them first")
        return self._placement

    def table(self, name: str) -> tuple[TableSpec, TableRoute]:
        """A table and how its rows are routed, asking for a newer placement where the table is unknown."""
        if self._placement is None or name not in self._placement.tables:
            self.refresh()
        placement = self.placement()
        if name not in placement.tables:
            known = ", ".join(placement.tables) or "none"
            raise UnknownTableError(f"no table {name!r} at epoch {placement.epoch}; known: {known}")
        return placement.tables[name], self._routes[name]

    def refresh(self) -> None:
        """Takes over a newer placement, if the directory or any shard knows one."""
        newest = self._from_directory()
        if newest is None or newest.epoch <= self.epoch:
            newest = max([newest, *self._from_shards()], key=lambda found: found.epoch if found else 0)
        with self._lock:
            if newest is not None and newest.epoch > self.epoch:
                self._placement, self._routes = newest, routes(newest)

    def _from_directory(self) -> Placement | None:
        if self.directory is None:
            return None
        try:
            return self.directory.placement()
        except DirectoryError:
            return None

    def _from_shards(self) -> list[Placement | None]:
        found = []
        for address in (self._placement.shards if self._placement else {}).values():
            try:
                found.append(placement_of_shard(address, timeout=min(1.0, self.config.timeout)))
            except EngridError:
                continue
        return found

    def transport(self, shard: str) -> GrpcTransport:
        """The connection to a shard of the placement, opened on first use and anew where its address changed.

        Raises CancelledError once the client was closed.
        """
        address = self.placement().shards[shard]
        with self._lock:
            self._check_open()
            transport = self._transports.get(shard)
            if transport is None or transport.address != address:
                if transport is not None:
                    transport.close()
                transport = GrpcTransport(shard, address, max_in_flight=self.config.max_in_flight)
                self._transports[shard] = transport
            return transport

    def serves(self, table: str) -> bool:
        """Whether all partitions of the table have rows to serve, as their primaries answer now."""
        parts = self.placement().partitions[table]
        ready = set()
        for shard in {part.primary for part in parts}:
            transport = self.transport(shard)
            try:
                reply = transport.stub.Describe(pb.DescribeRequest(), timeout=self.config.timeout)
            except grpc.RpcError as error:
                raise from_rpc(error, transport.peer) from error
            ready |= {state.partition for state in reply.partitions if state.table == table and not state.empty}
        return ready == {part.index for part in parts}

    @contextmanager
    def unary(self, address: str) -> Iterator[memory_pb2_grpc.MemoryServiceStub]:
        """Unary calls to a shard that may not be in the placement yet. Raises CancelledError once the client was closed."""
        with open_channel(address) as channel:
            with self._lock:
                self._check_open()
                self._unary.add(channel)
            try:
                yield memory_pb2_grpc.MemoryServiceStub(channel)  # type: ignore[no-untyped-call]
            finally:
                with self._lock:
                    self._unary.discard(channel)

    def _check_open(self) -> None:
        if self._closed:
            raise CancelledError("the client was closed")

    def close(self) -> None:
        """Closes every connection; what is under way fails."""
        with self._lock:
            self._closed = True
            for transport in self._transports.values():
                transport.close()
            self._transports = {}
            for channel in self._unary:
                channel.close()
        if self.directory is not None:
            self.directory.close()


def placement_of_shard(address: str, *, timeout: float) -> Placement | None:
    """The newest placement the shard at host:port knows; None where it has none yet."""
    with open_channel(address) as channel:
        stub = memory_pb2_grpc.MemoryServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            reply = stub.Describe(pb.DescribeRequest(), timeout=timeout)
        except grpc.RpcError as error:
            raise from_rpc(error, f"shard at {address}") from error
    if not reply.shard:
        raise ShardUnavailableError(f"{address} answers, but is no shard")
    return Placement.from_json(json.loads(reply.placement)) if reply.placement else None
