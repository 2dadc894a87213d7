"""How a lookup reaches a shard: one method, so that a faster way can take gRPC's place.

A GrpcTransport keeps two streams to its shard, one for small and one for bulk requests, so that a token does
not wait behind a prefill. Each stream has one thread that reads replies and puts rows where they belong; the
caller's thread only waits. A stream that breaks fails what is in flight on it, and the next request opens
another: nothing is sent twice behind the caller's back, but for what crossed the end of a stream that the shard took
back because it had been idle.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from engrid.rpc.channel import open_channel
from engrid.rpc.errors import (
    BadRequestError,
    CancelledError,
    DeadlineExceededError,
    EngridError,
    RowWidthMismatchError,
    ShardUnavailableError,
    from_message,
    from_rpc,
)
from engrid.rpc.frames import Ids
from engrid.rpc.wire import Reply, decode_reply, encode_cancel, encode_request
from engrid.v1 import memory_pb2_grpc

BULK_BYTES = 64 << 10
"""Replies above this go over the bulk stream."""

TableRows = tuple[str, Ids, int]
"""(table, row ids, bytes of a row)."""


@dataclass(frozen=True)
class Wanted:
    """What the rows of a batch must be, and by when."""

    step: int
    """Training step that must have been applied; 0: whatever is there."""
    run: str
    """Identity of the run whose result they must be; empty: any."""
    deadline: float
    """On time.monotonic()'s clock."""


Deliver = Callable[[Sequence[memoryview]], None]
"""Takes the rows of each table wanted; called on the transport's thread."""

LOOKUP = "/engrid.v1.MemoryService/Lookup"


class Call(Protocol):
    """A request under way."""

    step: int
    """Once waited for: the step that the live rows are of, or older than they are; 0 where none are."""

    def wait(self) -> None:
        """Returns once the rows are delivered; raises EngridError, by the request's deadline at the latest."""

    def cancel(self) -> None:
        """Gives the request up; `wait` then raises CancelledError."""


class Transport(Protocol):
    """A way to one shard."""

    def lookup(self, tables: Sequence[TableRows], wanted: Wanted, *, epoch: int, deliver: Deliver) -> Call:
        """Sends one request, routed by the placement of that epoch."""

    def close(self) -> None:
        """Fails what is under way."""


class GrpcTransport:
    """Bidirectional streams over one channel."""

    def __init__(self, shard: str, address: str, *, max_in_flight: int) -> None:
        self.address = address
        self.peer = f"shard {shard} at {address}"
        self._channel = open_channel(address)
        self.stub = memory_pb2_grpc.MemoryServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._max_in_flight = max_in_flight
        self._streams: dict[bool, _Stream] = {}
        self._lock = threading.Lock()

    def lookup(self, tables: Sequence[TableRows], wanted: Wanted, *, epoch: int, deliver: Deliver) -> Call:
        call = _GrpcCall(self.peer, tables, wanted.deadline, deliver)

        def encode(number: int) -> bytes:
            timeout_us = _microseconds_for_the_shard(wanted.deadline - time.monotonic())
            return encode_request(
                tables, number=number, epoch=epoch, timeout_us=timeout_us, step=wanted.step, run=wanted.run
            )

        bulk = sum(call.sizes) > BULK_BYTES
        call.send_again = lambda: self._stream(bulk=bulk).send(encode, call)
        self._stream(bulk=bulk).send(encode, call)
        return call

    def _stream(self, *, bulk: bool) -> _Stream:
        with self._lock:
            stream = self._streams.get(bulk)
            if stream is None or stream.broken:
                stream = self._streams[bulk] = _Stream(self._channel, self.peer, self._max_in_flight)
            return stream

    def close(self) -> None:
        with self._lock:
            for stream in self._streams.values():
                stream.close()
            self._streams = {}
        self._channel.close()


class _GrpcCall:
    """Settled once, by whoever takes it from its stream, and waited for by the caller's thread."""

    def __init__(self, peer: str, tables: Sequence[TableRows], deadline: float, deliver: Deliver) -> None:
        self.peer = peer
        self.deadline = deadline
        self.sizes = [len(ids) * row_bytes for _, ids, row_bytes in tables]
        self.number = 0
        self.step = 0
        self.stream: _Stream | None = None
        """Where it is under way."""
        self.send_again: Callable[[], None] | None = None
        """Sends it over another stream; None: it was sent again already."""
        self._deliver = deliver
        self._delivered = False
        self._error: EngridError | None = None
        self._started = time.monotonic()
        # Held until the call is settled. An Event would be three locks and a Condition in Python for each call.
        self._unsettled = threading.Lock()
        self._unsettled.acquire()

    def finish(self, reply: Reply) -> None:
        if reply.error is not None:
            self.fail(from_message(reply.error))
        elif [len(rows) for rows in reply.rows] != self.sizes:
            got = [len(rows) for rows in reply.rows]
            self.fail(RowWidthMismatchError(f"{self.peer} sent {got} bytes of rows where {self.sizes} were asked for"))
        else:
            self.step = reply.step
            try:
                self._deliver(reply.rows)
                self._delivered = True
            finally:
                self._unsettled.release()

    def fail(self, error: EngridError) -> None:
        self._error = error
        self._unsettled.release()

    def wait(self) -> None:
        if not self._unsettled.acquire(timeout=max(0.0, self.deadline - time.monotonic())):
            if self._taken_back():
                self.fail(
                    DeadlineExceededError(f"{self.peer} did not answer within {self.deadline - self._started:.3g} s")
                )
            self._unsettled.acquire()
        self._unsettled.release()
        if self._error is not None:
            raise self._error
        assert self._delivered, "the rows could not be placed; the reader's thread said why"

    def cancel(self) -> None:
        if self._taken_back():
            self.fail(CancelledError(f"the lookup from {self.peer} was cancelled"))

    def _taken_back(self) -> bool:
        """False where the reader has taken it before, and settles it at once."""
        return self.stream is not None and self.stream.give_up(self)


def _microseconds_for_the_shard(remaining: float) -> int:
    """A little less than what is left, so that the shard's own word on a spent deadline still arrives in time."""
    return max(0, int((remaining - min(0.1 * remaining, 0.05)) * 1e6))


class _Stream:
    """One Lookup call of gRPC and the requests in flight on it."""

    def __init__(self, channel: grpc.Channel, peer: str, max_in_flight: int) -> None:
        self.broken = False
        self._error: EngridError = ShardUnavailableError(f"{peer}: the connection was lost before the request was sent")
        """Why it is broken."""
        self._taken_back = False
        """The shard ended it, as it needed the room and saw nothing to answer on it."""
        self._peer = peer
        self._closing = False
        self._numbers = itertools.count(1)
        self._calls: dict[int, _GrpcCall] = {}
        self._max_in_flight = max_in_flight
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # Without serializers gRPC hands bytes on as they are; they are read and written by hand (rpc/wire.py).
        lookup: Any = channel.stream_stream(LOOKUP)
        self._replies = lookup(iter(self._outgoing.get, None))
        threading.Thread(target=self._read, name=f"engrid {peer}", daemon=True).start()

    def send(self, encode: Callable[[int], bytes], call: _GrpcCall) -> None:
        """Sends what `encode` makes of the request's number. Raises DeadlineExceededError where there is no room."""
        number = call.number = next(self._numbers)
        with self._lock:
            if len(self._calls) >= self._max_in_flight:
                self._wait_for_room(call.deadline)
            broken = self.broken
            if not broken:
                self._calls[number] = call
                call.stream = self
        if broken:
            self._fail(call)
        else:
            self._outgoing.put(encode(number))

    def _wait_for_room(self, deadline: float) -> None:
        def room() -> bool:
            return len(self._calls) < self._max_in_flight

        if not self._room.wait_for(room, max(0.0, deadline - time.monotonic())):
            raise DeadlineExceededError(f"{self._peer} has its most requests in flight and answered none in time")

    def give_up(self, call: _GrpcCall) -> bool:
        """Tells the shard; False where the call is not under way any more."""
        if self._take(call.number) is None:
            return False
        self._outgoing.put(encode_cancel(call.number))
        return True

    def _take(self, number: int) -> _GrpcCall | None:
        with self._lock:
            call = self._calls.pop(number, None)
            if len(self._calls) + 1 == self._max_in_flight:
                self._room.notify()
        return call

    def _read(self) -> None:
        try:
            self._deliver_all(self._replies)
            error: EngridError = ShardUnavailableError(f"{self._peer} closed the stream")
        except grpc.RpcError as rpc_error:
            error = from_rpc(rpc_error, self._peer)
            if isinstance(error, CancelledError):
                error = ShardUnavailableError(f"{self._peer}: the connection was closed")
                self._taken_back = not self._closing
        except BadRequestError as damage:
            self._replies.cancel()
            error = ShardUnavailableError(f"{self._peer}: {damage}; the connection was closed")
        with self._lock:
            self.broken, self._error = True, error
            left, self._calls = list(self._calls.values()), {}
            self._room.notify_all()
        for call in left:
            self._fail(call)
        self._outgoing.put(None)

    def _fail(self, call: _GrpcCall) -> None:
        """Lets the call know why, or sends it again where it only crossed the end of a stream that was idle."""
        send_again, call.send_again = call.send_again, None
        if not self._taken_back or send_again is None:
            call.fail(self._error)
            return
        try:
            send_again()
        except EngridError as error:
            call.fail(error)

    def _deliver_all(self, replies: Iterator[bytes]) -> None:
        for raw in replies:
            reply = decode_reply(raw)
            call = self._take(reply.number)
            if call is not None:
                call.finish(reply)

    def close(self) -> None:
        self._closing = True
        self._outgoing.put(None)
        self._replies.cancel()
