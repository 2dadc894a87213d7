"""MemoryService over gRPC: each method one call of ShardService, its errors given a status."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc

from engrid.directory import Placement
from engrid.rpc.calls import SMALL_REQUEST_BYTES, Check, at_most, deadline_of
from engrid.rpc.channel import MAX_MESSAGE_BYTES
from engrid.rpc.errors import BadRequestError, ShardUnavailableError
from engrid.rpc.pools import Pool
from engrid.rpc.server import CONTROL
from engrid.rpc.wire import check_fields
from engrid.shard.config import ShardConfig
from engrid.shard.core.machine import MAX_NAME_BYTES
from engrid.shard.core.messages import PartitionKey
from engrid.shard.handover import Handover
from engrid.shard.service import ShardService
from engrid.v1 import memory_pb2 as pb
from engrid.v1 import memory_pb2_grpc

from .stream import LookupStream

MAX_PARTS = 16_384
"""Partitions in one push, or tables in one request: each is an object before it is looked at."""
MAX_PLACEMENT_BYTES = 8 << 20
MOST_WAIT_SECONDS = 3600.0
CONTROL_SECONDS = 2.0
"""A client has to send what belongs to a control call, which is small and travels with its opening."""
IDLE_SECONDS = 1.0
"""A stream that has had nothing to answer for so long may be ended for a client that comes anew."""


def _fields(method: str, field: int, size: int = SMALL_REQUEST_BYTES) -> Check:
    """Refuses requests of more bytes, or more than MAX_PARTS of this field."""
    small_enough = at_most(size)

    def check(raw: bytes) -> None:
        small_enough(raw)
        check_fields(raw, method, {field: MAX_PARTS})

    return check


CHECKS: Mapping[str, Check] = {
    "Lookup": at_most(MAX_MESSAGE_BYTES),  # each is judged on its own, so that one refusal ends no stream
    "Push": _fields("push", pb.PushRequest.PARTITIONS_FIELD_NUMBER, MAX_MESSAGE_BYTES),
    "Load": at_most(MAX_MESSAGE_BYTES),
    "Adopt": at_most(MAX_PLACEMENT_BYTES, "the placement"),
    "BeginRun": _fields("begin of a run", pb.BeginRunRequest.TABLES_FIELD_NUMBER),
    "Pin": _fields("pin", pb.PinRequest.TABLES_FIELD_NUMBER),
    "Checkpoint": _fields("checkpoint", pb.CheckpointRequest.TABLES_FIELD_NUMBER),
    "Restore": _fields("restore", pb.RestoreRequest.TABLES_FIELD_NUMBER),
}
"""Of messages before they are parsed."""
PATIENT = frozenset({"Lookup"})
"""Methods whose clients may be silent between messages."""


def pools(config: ShardConfig, end_idle_stream: Callable[[], bool]) -> list[Pool]:
    """Which calls share threads. What may wait for long is apart from what others wait for: a push must not stand behind a
    load, nor the answer that a shard lives behind anything."""

    def pool(name: str, methods: str, threads: int, waiting: int, patience: float = config.reply_timeout) -> Pool:
        return Pool(name=name, methods=frozenset(methods.split()), threads=threads, waiting=waiting, patience=patience)

    lookups = pool("lookup streams", "Lookup", config.max_streams, 0)
    return [
        replace(lookups, make_room=end_idle_stream),
        pool("pushes", "Push Commit", config.unary_threads, 256),
        pool("changes of runs and placements", "BeginRun Adopt", config.unary_threads, 64),
        pool("loads and exports", "Load Export", config.unary_threads, 32),
        pool("checkpoints and restores", "Checkpoint Restore CheckFolder", config.unary_threads, 32),
        pool(CONTROL, "Describe Pin Stats SettleCheckpoint", 2 * config.unary_threads, 256, CONTROL_SECONDS),
    ]


MAX_TOKEN = 1024
"""Characters of what tells an attempt's beginner from others."""


def add_to_server(servicer: MemoryServicer, server: grpc.Server) -> None:
    """The generated registration, but for Lookup, whose messages are read and written by hand (rpc/wire.py)."""
    memory_pb2_grpc.add_MemoryServiceServicer_to_server(servicer, _RawLookup(server))  # type: ignore[no-untyped-call]


class _RawLookup:
    """Stands for a server while the generated code registers with it: takes the serializers off Lookup."""

    def __init__(self, server: grpc.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, _handlers: object) -> None:
        """Those are what is registered below, in another form."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        raw: Any = grpc.stream_stream_rpc_method_handler(handlers["Lookup"].stream_stream)
        self._server.add_registered_method_handlers(service, {**handlers, "Lookup": raw})


class MemoryServicer(memory_pb2_grpc.MemoryServiceServicer):
    """Adapts ShardService to the generated service. What its methods raise is given a status by rpc/calls.py."""

    def __init__(self, service: ShardService, handover: Handover | None = None) -> None:
        self._service = service
        self._handover = handover
        self._started = time.monotonic()
        self._streams: dict[LookupStream, Callable[[], object]] = {}
        self._loads: list[PartitionKey] = []
        """Partitions that rows are coming for."""
        self._loads_lock = threading.Lock()

    def count_error(self) -> None:
        """A call ended with an error."""
        self._service.counters.errors += 1

    def end_idle_stream(self) -> bool:
        """Ends the lookup stream that has had nothing to do for longest; False where all have."""
        latest = time.monotonic() - IDLE_SECONDS
        idle = [(since, stream) for stream in list(self._streams) if (since := stream.idle_since) is not None]
        since, stream = min(idle, key=lambda each: each[0], default=(math.inf, None))
        if stream is None or since > latest:
            return False
        cancel = self._streams.get(stream)
        stream.idle_since = None
        stream.close()
        if cancel is not None:
            cancel()
        return True

    def Lookup(self, request_iterator: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Takes and gives messages as bytes; see `add_to_server`."""
        stream = LookupStream(self._service, request_iterator)
        context.add_callback(stream.close)
        self._streams[stream] = context.cancel
        try:
            yield from stream.replies()
        finally:
            del self._streams[stream]

    def Push(self, request: pb.PushRequest, context: grpc.ServicerContext) -> pb.PushReply:
        new = self._service.push(request, deadline=deadline_of(context))
        return pb.PushReply(outcomes=[pb.ACCEPTED if is_new else pb.DUPLICATE for is_new in new])

    def Commit(self, request: pb.CommitRequest, context: grpc.ServicerContext) -> pb.CommitReply:
        self._service.commit(request, deadline=deadline_of(context))
        return pb.CommitReply()

    def BeginRun(self, request: pb.BeginRunRequest, context: grpc.ServicerContext) -> pb.BeginRunReply:
        if not 0 < len(request.token) <= MAX_TOKEN:
            raise BadRequestError(f"a run is begun with a token of 1 to {MAX_TOKEN} characters that nobody else has")
        tables, deadline = list(request.tables), deadline_of(context)
        step = self._service.begin_run(
            request.run, request.attempt, request.workers, tables, request.token, deadline=deadline
        )
        return pb.BeginRunReply(step=step)

    def Adopt(self, request: pb.AdoptRequest, context: grpc.ServicerContext) -> pb.AdoptReply:
        try:
            placement = Placement.from_json(json.loads(request.placement))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise BadRequestError(f"not a placement: {error}") from error
        held = self._service.adopt(placement, check_only=request.check_only, deadline=deadline_of(context))
        return pb.AdoptReply(bytes=held)

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        reply = self._service.describe()
        if self._handover is not None and self._handover.serves:
            reply.local_socket, reply.instance = str(self._handover.path), self._handover.instance
        return reply

    def Pin(self, request: pb.PinRequest, context: grpc.ServicerContext) -> pb.PinReply:
        self._service.pin(request)
        return pb.PinReply()

    def Load(self, request_iterator: Iterator[pb.LoadChunk], context: grpc.ServicerContext) -> pb.LoadReply:
        first = next(request_iterator, None)
        if first is None:
            raise BadRequestError("load: the stream held no chunk")
        if len(first.run.encode()) > MAX_NAME_BYTES:
            raise BadRequestError(f"a run's name of {len(first.run.encode())} bytes: give at most {MAX_NAME_BYTES}")
        with self._only_load(first):
            chunks = itertools.chain([first], request_iterator)
            return pb.LoadReply(rows=self._service.transfers.load(chunks, deadline=deadline_of(context)))

    @contextmanager
    def _only_load(self, first: pb.LoadChunk) -> Iterator[None]:
        """A live partition's rows are kept until all have come: those of one load at a time. A sealed one's go to their place."""
        key = (first.table, first.partition)
        with self._loads_lock:
            if key in self._loads and "@" not in first.table:
                raise ShardUnavailableError(
                    f"rows of {key[0]}[{key[1]}] are being loaded by another; wait for that to end"
                )
            self._loads.append(key)
        try:
            yield
        finally:
            with self._loads_lock:
                self._loads.remove(key)

    def Export(self, request: pb.ExportRequest, context: grpc.ServicerContext) -> Iterator[pb.ExportChunk]:
        return self._service.transfers.export(request)

    def Checkpoint(
        self, request: pb.CheckpointRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.CheckpointProgress]:
        request.wait = _wait(request.wait, context)
        return self._service.checkpointing.save(request, context.add_callback)

    def SettleCheckpoint(
        self, request: pb.SettleCheckpointRequest, context: grpc.ServicerContext
    ) -> pb.SettleCheckpointReply:
        self._service.checkpointing.settle(request.partial, request.published)
        return pb.SettleCheckpointReply()

    def Restore(self, request: pb.RestoreRequest, context: grpc.ServicerContext) -> pb.RestoreReply:
        request.wait = _wait(request.wait, context)
        return pb.RestoreReply(rows=self._service.checkpointing.restore(request, deadline=deadline_of(context)))

    def CheckFolder(self, request: pb.CheckFolderRequest, context: grpc.ServicerContext) -> pb.CheckFolderReply:
        return pb.CheckFolderReply(content=self._service.checkpointing.check_folder(request.folder, request.file))

    def Stats(self, request: pb.StatsRequest, context: grpc.ServicerContext) -> pb.StatsReply:
        counters = self._service.counters
        return pb.StatsReply(
            lookups=counters.lookups,
            rows=counters.rows,
            bytes=counters.bytes,
            pushes=counters.pushes,
            pushed_rows=counters.pushed_rows,
            steps_applied=counters.steps_applied,
            errors=counters.errors,
            streams=len(self._streams),
            streams_limit=self._service.config.max_streams,
            uptime=time.monotonic() - self._started,
        )


def _wait(asked: float, context: grpc.ServicerContext) -> float:
    """Seconds that a request says it may wait, and no more than its caller has."""
    if not 0 <= asked <= MOST_WAIT_SECONDS:
        raise BadRequestError(f"wait is {asked} seconds; give 0 to {MOST_WAIT_SECONDS:g}")
    return min(asked, max(0.0, deadline_of(context) - time.monotonic()))
