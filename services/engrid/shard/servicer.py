"""MemoryService over gRPC: each method one call of ShardService, its errors given a status."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc

from engrid.directory import Placement
from engrid.rpc.errors import BadRequestError, EngridError, ShardUnavailableError, abort
from engrid.v1 import memory_pb2 as pb
from engrid.v1 import memory_pb2_grpc

from .handover import Handover
from .service import ShardService
from .stalls import StallWatch
from .stream import LookupStream

T = TypeVar("T")

MAX_TOKEN = 1024
"""Characters of what tells an attempt's beginner from others."""


def add_to_server(servicer: MemoryServicer, server: grpc.Server) -> None:
    """The generated registration, but for Lookup, whose messages are read and written by hand (rpc/wire.py)."""
    memory_pb2_grpc.add_MemoryServiceServicer_to_server(servicer, _RawLookup(server))  # type: ignore[no-untyped-call]


class _RawLookup:
    """Stands for a server while the generated code registers with it."""

    def __init__(self, server: grpc.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, _handlers: object) -> None:
        """Those are made anew from what is registered below."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Takes the serializers off Lookup, for gRPC's older and newer way of finding handlers."""
        raw: Any = grpc.stream_stream_rpc_method_handler(handlers["Lookup"].stream_stream)
        handlers = {**handlers, "Lookup": raw}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        self._server.add_registered_method_handlers(service, handlers)


class MemoryServicer(memory_pb2_grpc.MemoryServiceServicer):
    """Adapts ShardService to the generated service."""

    def __init__(self, service: ShardService, handover: Handover | None = None) -> None:
        self._service = service
        self._handover = handover
        self._started = time.monotonic()
        self._streams = threading.BoundedSemaphore(service.config.max_streams)
        self._open = 0
        self._stalls = StallWatch(service.config.reply_timeout, service.counters)

    def close(self) -> None:
        """Once no more calls are served."""
        self._stalls.close()

    def Lookup(self, request_iterator: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Takes and gives messages as bytes; see `add_to_server`."""
        if not self._streams.acquire(blocking=False):
            limit = self._service.config.max_streams
            abort(context, ShardUnavailableError(f"shard {self._service.config.name} has its {limit} streams open"))
        self._open += 1
        try:
            stream = LookupStream(self._service, request_iterator)
            context.add_callback(stream.close)
            with self._stalls.over(stream, context.cancel):
                yield from stream.replies()
        except EngridError as error:
            self._service.counters.errors += 1
            abort(context, error)
        finally:
            self._open -= 1
            self._streams.release()

    def Push(self, request: pb.PushRequest, context: grpc.ServicerContext) -> pb.PushReply:
        new = self._run(context, lambda: self._service.push(request))
        return pb.PushReply(outcomes=[pb.ACCEPTED if is_new else pb.DUPLICATE for is_new in new])

    def Commit(self, request: pb.CommitRequest, context: grpc.ServicerContext) -> pb.CommitReply:
        self._run(context, lambda: self._service.commit(request))
        return pb.CommitReply()

    def BeginRun(self, request: pb.BeginRunRequest, context: grpc.ServicerContext) -> pb.BeginRunReply:
        def begin() -> int:
            if not 0 < len(request.token) <= MAX_TOKEN:
                raise BadRequestError(
                    f"a run is begun with a token of 1 to {MAX_TOKEN} characters that nobody else has"
                )
            tables = list(request.tables)
            return self._service.begin_run(request.run, request.attempt, request.workers, tables, request.token)

        return pb.BeginRunReply(step=self._run(context, begin))

    def Adopt(self, request: pb.AdoptRequest, context: grpc.ServicerContext) -> pb.AdoptReply:
        def adopt() -> int:
            try:
                placement = Placement.from_json(json.loads(request.placement))
            except (ValueError, TypeError, KeyError) as error:
                raise BadRequestError(f"not a placement: {error}") from error
            return self._service.adopt(placement, check_only=request.check_only)

        return pb.AdoptReply(bytes=self._run(context, adopt))

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        reply = self._service.describe()
        if self._handover is not None:
            reply.local_socket, reply.instance = str(self._handover.path), self._handover.instance
        return reply

    def Pin(self, request: pb.PinRequest, context: grpc.ServicerContext) -> pb.PinReply:
        self._run(context, lambda: self._service.pin(request))
        return pb.PinReply()

    def Load(self, request_iterator: Iterator[pb.LoadChunk], context: grpc.ServicerContext) -> pb.LoadReply:
        return pb.LoadReply(rows=self._run(context, lambda: self._service.load(request_iterator)))

    def Export(self, request: pb.ExportRequest, context: grpc.ServicerContext) -> Iterator[pb.ExportChunk]:
        try:
            yield from self._service.export(request)
        except EngridError as error:
            self._service.counters.errors += 1
            abort(context, error)

    def Checkpoint(
        self, request: pb.CheckpointRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.CheckpointProgress]:
        try:
            yield from self._service.checkpointing.save(request, context.add_callback)
        except EngridError as error:
            self._service.counters.errors += 1
            abort(context, error)

    def SettleCheckpoint(
        self, request: pb.SettleCheckpointRequest, context: grpc.ServicerContext
    ) -> pb.SettleCheckpointReply:
        self._service.checkpointing.settle(request.partial, request.published)
        return pb.SettleCheckpointReply()

    def Restore(self, request: pb.RestoreRequest, context: grpc.ServicerContext) -> pb.RestoreReply:
        return pb.RestoreReply(rows=self._run(context, lambda: self._service.checkpointing.restore(request)))

    def CheckFolder(self, request: pb.CheckFolderRequest, context: grpc.ServicerContext) -> pb.CheckFolderReply:
        checkpointing = self._service.checkpointing
        return pb.CheckFolderReply(
            content=self._run(context, lambda: checkpointing.check_folder(request.folder, request.file))
        )

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
            streams=self._open,
            streams_limit=self._service.config.max_streams,
            uptime=time.monotonic() - self._started,
        )

    def _run(self, context: grpc.ServicerContext, call: Callable[[], T]) -> T:
        try:
            return call()
        except EngridError as error:
            self._service.counters.errors += 1
            abort(context, error)
