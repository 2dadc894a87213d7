"""How a lookup reaches a shard: one method, so that a faster way can take gRPC's place.

A GrpcTransport keeps two streams to its shard, one for small and one for bulk requests, so that a token does
not wait behind a prefill. Each stream has one thread that reads replies and puts rows where they belong; the
caller's thread only waits. Whatever that thread meets, also what nobody thought of, fails the calls in flight. A stream
that breaks fails what is in flight on it, and the next request opens another: nothing is sent twice behind the caller's
back, but for what crossed the end of a stream that the shard took back because it had been idle.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.protobuf.message import Message

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

ROOM_SECONDS = 0.05
"""Who waits for room looks again after so long, though nobody told it that there is some."""
SETTLING_SECONDS = 0.05
"""Beyond its deadline a call is waited for only while its reply is being placed; looked at so often."""

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
    owner: weakref.ref[Any] | None
    """Who waits for it: once that is gone, it may be given up. None: somebody does."""

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
        self._closed = False
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

    def future(
        self, method: Callable[[memory_pb2_grpc.MemoryServiceStub], Any], request: Message, timeout: float
    ) -> Any:
        """A unary call under way; raises ShardUnavailableError where the connection was closed meanwhile."""
        try:
            return method(self.stub).future(request, timeout=timeout)
        except ValueError as closed:  # so gRPC says it
            raise ShardUnavailableError(f"{self.peer}: the connection was closed") from closed

    def _stream(self, *, bulk: bool) -> _Stream:
        with self._lock:
            if self._closed:
                raise ShardUnavailableError(f"{self.peer}: the connection was closed")
            stream = self._streams.get(bulk)
            if stream is None or stream.broken:
                stream = self._streams[bulk] = _Stream(self._channel, self.peer, self._max_in_flight)
            return stream

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for stream in self._streams.values():
                stream.close()
            self._streams = {}
        self._channel.close()


class _GrpcCall:
    """Settled once, and waited for by the caller's thread. Ctrl-C may come between any two lines that the caller's thread
    runs: each can be done again, as the stream says whose the call is."""

    def __init__(self, peer: str, tables: Sequence[TableRows], deadline: float, deliver: Deliver) -> None:
        self.peer = peer
        self.deadline = deadline
        self.sizes = [len(ids) * row_bytes for _, ids, row_bytes in tables]
        self.number = 0
        self.step = 0
        self.owner: weakref.ref[Any] | None = None
        self.stream: _Stream | None = None
        """Where it is under way."""
        self.read = False
        """The stream's reader has it and settles it; set under the stream's lock."""
        self.send_again: Callable[[], None] | None = None
        """Sends it over another stream; None: it was sent again already."""
        self._deliver = deliver
        self._error: EngridError | None = None
        self._settled = False
        self._started = time.monotonic()
        # Held until the call is settled. An Event would be three locks and a Condition in Python for each call.
        self._unsettled = threading.Lock()
        self._unsettled.acquire()

    def finish(self, reply: Reply) -> None:
        """By the reader, which has taken it from the stream."""
        try:
            error = self._place(reply)
        except BaseException as problem:  # noqa: BLE001 - raised to whoever waits
            error = ShardUnavailableError(f"the rows that {self.peer} sent could not be placed: {problem!r}")
        self.settle(error)

    def _place(self, reply: Reply) -> EngridError | None:
        if reply.error is not None:
            return from_message(reply.error)
        got = [len(rows) for rows in reply.rows]
        if got != self.sizes:
            return RowWidthMismatchError(f"{self.peer} sent {got} bytes of rows where {self.sizes} were asked for")
        self.step = reply.step
        self._deliver(reply.rows)
        return None

    def settle(self, error: EngridError | None) -> None:
        self._error = error
        self._settled = True
        with suppress(RuntimeError):  # settled already
            self._unsettled.release()

    def wait(self) -> None:
        while not self._settled:
            left = self.deadline - time.monotonic()
            if left > 0 or self.read:
                self._unsettled.acquire(timeout=max(left, SETTLING_SECONDS))
            else:
                seconds = max(0.0, self.deadline - self._started)
                self._give_up(DeadlineExceededError(f"{self.peer} did not answer within {seconds:.3g} s"))
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        if not self._settled:
            self._give_up(CancelledError(f"the lookup from {self.peer} was cancelled"))

    def _give_up(self, error: EngridError) -> None:
        if self.stream is not None:
            self.stream.give_up(self)
        if not self.read:
            self.settle(error)


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
        self._numbers = itertools.count(1)
        self._calls: dict[int, _GrpcCall] = {}
        self._max_in_flight = max_in_flight
        self._lock = threading.Lock()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        """Something in it: there was room a moment ago. Not a Condition, which Ctrl-C can leave with its lock let go."""
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._replies: Any = None
        self._closing = False
        threading.Thread(target=self._read, args=(channel,), name=f"engrid {peer}", daemon=True).start()

    def send(self, encode: Callable[[int], bytes], call: _GrpcCall) -> None:
        """Sends what `encode` makes of the request's number. Raises DeadlineExceededError if there is no room in time."""
        call.number, call.stream = next(self._numbers), self
        try:
            if self._enter(call):
                self._outgoing.put(encode(call.number))
            else:
                self._fail(call)
        except BaseException:
            self._take(call)
            raise

    def _enter(self, call: _GrpcCall) -> bool:
        """Once there is room; False if the stream is broken."""
        while True:
            with self._lock:
                if self.broken:
                    return False
                if len(self._calls) < self._max_in_flight:
                    self._calls[call.number] = call
                    call.read = False
                    return True
            if self._give_up_abandoned():
                continue
            left = call.deadline - time.monotonic()
            if left <= 0:
                raise DeadlineExceededError(f"{self._peer} has its most requests in flight and answered none in time")
            with suppress(queue.Empty):
                self._room.get(timeout=min(left, ROOM_SECONDS))

    def _give_up_abandoned(self) -> bool:
        """Calls whose owner was dropped before their rows came: no finalizer says so, as Ctrl-C in one would be lost."""
        with self._lock:
            abandoned = [call for call in self._calls.values() if call.owner is not None and call.owner() is None]
        for call in abandoned:
            self.give_up(call)
        return bool(abandoned)

    def give_up(self, call: _GrpcCall) -> None:
        """Tells the shard, if the call is under way still."""
        if self._take(call):
            self._outgoing.put(encode_cancel(call.number))

    def _take(self, call: _GrpcCall) -> bool:
        with self._lock:
            full = len(self._calls) >= self._max_in_flight
            taken = self._calls.pop(call.number, None) is not None
        if full:
            self._ring()
        return taken

    def _ring(self) -> None:
        """Lets one who waits for room look again."""
        if self._room.empty():
            self._room.put(None)

    def _read(self, channel: grpc.Channel) -> None:
        """The reader's thread, which makes gRPC's call too: Ctrl-C in the middle of that would leave it half made."""
        error: EngridError = ShardUnavailableError(f"{self._peer} closed the stream")
        try:
            # Without serializers gRPC hands bytes on as they are; they are read and written by hand (rpc/wire.py).
            lookup: Any = channel.stream_stream(LOOKUP)
            self._replies = lookup(iter(self._outgoing.get, None))
            if not self._closing:
                self._deliver_all(self._replies)
        except grpc.RpcError as rpc_error:
            error = self._lost(rpc_error)
        except BadRequestError as damage:
            error = ShardUnavailableError(f"{self._peer}: {damage}; the connection was closed")
        except BaseException as problem:  # noqa: BLE001 - raised to all who wait
            error = ShardUnavailableError(f"{self._peer}: its replies could not be read: {problem!r}")
        self._break(error)

    def _lost(self, rpc_error: grpc.RpcError) -> EngridError:
        try:
            error = from_rpc(rpc_error, self._peer)
        except Exception as problem:  # noqa: BLE001 - raised to all who wait
            return ShardUnavailableError(f"{self._peer}: the connection was lost, and why cannot be read: {problem!r}")
        if isinstance(error, CancelledError):
            self._taken_back = not self._closing
            return ShardUnavailableError(f"{self._peer}: the connection was closed")
        return error

    def _break(self, error: EngridError) -> None:
        """Whatever ended the reader: all that is in flight fails, and the next request opens another stream."""
        with self._lock:
            self.broken, self._error = True, error
            left, self._calls = list(self._calls.values()), {}
            for call in left:
                call.read = True
        for call in left:
            try:
                self._fail(call)
            except BaseException as problem:  # noqa: BLE001 - raised to whoever waits
                call.settle(ShardUnavailableError(f"{self._peer}: it could not be sent again: {problem!r}"))
        self._ring()
        self.close()

    def _fail(self, call: _GrpcCall) -> None:
        """Lets the call know why, or sends it again where it only crossed the end of a stream that was idle."""
        send_again, call.send_again = call.send_again, None
        if not self._taken_back or send_again is None:
            call.settle(self._error)
            return
        try:
            send_again()
        except EngridError as error:
            call.settle(error)

    def _deliver_all(self, replies: Iterator[bytes]) -> None:
        for raw in replies:
            reply = decode_reply(raw)
            with self._lock:
                full = len(self._calls) >= self._max_in_flight
                call = self._calls.pop(reply.number, None)
                if call is not None:
                    call.read = True
            if full:
                self._ring()
            if call is not None:
                call.finish(reply)

    def close(self) -> None:
        self._closing = True
        self._outgoing.put(None)
        if self._replies is not None:
            self._replies.cancel()
