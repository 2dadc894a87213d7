"""One client's lookup stream: requests in, replies out in order, errors and cancels as frames.

The handler's own thread reads, gathers and answers: no hand-over between threads costs the serving path
anything. A lookup that has to wait for a step would then keep the stream from seeing a CANCEL behind it, so
the first such wait starts a reader thread, which from then on is the only one to read. Streams of training
have one, streams of serving never do.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import grpc

from engrid.rpc.errors import CancelledError, EngridError, InternalError, RequestTooLargeError, to_message
from engrid.rpc.wire import Request, decode_frame, encode_error
from engrid.shard.service import ShardService

MAX_QUEUED = 256
"""Requests a client may have waiting behind one that waits for a step; one more is refused."""
MAX_QUEUED_BYTES = 16 << 20
"""Bytes of them, as they came; a request that would pass this is refused."""
MAX_REQUEST_BYTES = 17 << 20
"""Of one lookup: row ids for more rows than a reply may hold, and names."""
MAX_REFUSED = 1024
"""Refusals a client may leave untaken; one more ends the stream."""
MOST_SECONDS = 86_400.0
"""A lookup waits for a step; one that names more waits so long."""

_Arrived = tuple[Request, float]
"""A request and when it was read, on time.monotonic()'s clock."""


class LookupStream:
    """Iterates over the replies of one stream."""

    def __init__(self, service: ShardService, frames: Iterator[bytes]) -> None:
        """frames: LookupFrame messages as they came."""
        self._service = service
        self._frames = frames
        self.idle_since: float | None = time.monotonic()
        """When it last had nothing to answer, on time.monotonic()'s clock; None: it has."""
        self._queue: queue.Queue[_Arrived | None] = queue.Queue()
        # Each has one thread that writes it, the reader and the handler; so neither needs a lock.
        self._queued_bytes = self._unqueued_bytes = 0
        self._reader: threading.Thread | None = None
        self._unanswered: dict[int, Request] = {}
        """By number, once there is a reader. A cancel of any other number is nothing: it was answered, or never asked for."""
        self._refused: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._closed = False
        self._damage: EngridError | None = None

    def close(self) -> None:
        """The call has ended or must: nothing more is waited for. Called by gRPC from a thread of its own."""
        self._closed = True
        self._service.wake()

    def replies(self) -> Iterator[bytes]:
        """One LookupReply per request, until the client closes its side or goes away.

        Raises BadRequestError at a frame that cannot be read: what follows it on the stream cannot be trusted.
        """
        while (arrived := self._next()) is not None and not self._closed:
            request, at = arrived
            yield self._answer(request, at)
            while not self._refused.empty():
                yield self._refused.get()
        if self._damage is not None:
            raise self._damage

    def _next(self) -> _Arrived | None:
        self.idle_since = time.monotonic()
        if self._reader is None:
            arrived = self._read()
        else:
            arrived = self._queue.get()
            if arrived is not None:
                self._unqueued_bytes += arrived[0].frame_bytes
        self.idle_since = None
        return arrived

    def _read(self) -> _Arrived | None:
        """The next request, cancels noted on the way; None at the end of the stream."""
        try:
            for raw in self._frames:
                request = decode_frame(raw)
                if request.cancel is None:
                    return request, time.monotonic()
                if (unanswered := self._unanswered.get(request.cancel)) is not None:
                    unanswered.given_up = True
                    self._service.wake()
        except EngridError as error:
            self._damage = error
        except grpc.RpcError:
            # gRPC ends a server's request iterator so when the client goes away.
            self.close()
        return None

    def _read_all(self) -> None:
        try:
            while (arrived := self._read()) is not None:
                self._enqueue(arrived)
                if self._damage is not None:
                    self.close()
                    break
        except BaseException as error:
            self._damage = InternalError(f"the thread that reads this stream failed: {type(error).__name__}: {error}")
            self.close()
            raise
        finally:
            self._queue.put(None)

    def _enqueue(self, arrived: _Arrived) -> None:
        request, _ = arrived
        queued = self._queued_bytes - self._unqueued_bytes
        if self._queue.qsize() < MAX_QUEUED and queued + request.frame_bytes <= MAX_QUEUED_BYTES:
            self._queued_bytes += request.frame_bytes
            self._unanswered[request.number] = request
            self._queue.put(arrived)
            return
        full = RequestTooLargeError(
            f"{self._queue.qsize()} requests of {queued} bytes wait on this stream already "
            f"(limits: {MAX_QUEUED} and {MAX_QUEUED_BYTES}); take those replies first"
        )
        if self._refused.qsize() >= MAX_REFUSED:
            self._damage = full
        else:
            self._refused.put(encode_error(request.number, to_message(full)))

    def _answer(self, request: Request, arrived: float) -> bytes:
        def cancelled() -> bool:
            return self._closed or request.given_up

        try:
            if request.step and self._reader is None:
                self._unanswered[request.number] = request
                self._reader = threading.Thread(target=self._read_all, name="lookup-reader", daemon=True)
                self._reader.start()
            if cancelled():
                raise CancelledError("cancelled by the client")
            if request.frame_bytes > MAX_REQUEST_BYTES:
                raise RequestTooLargeError(
                    f"the lookup has {request.frame_bytes} bytes, over the limit of {MAX_REQUEST_BYTES}; split it"
                )
            return self._service.lookup(request, arrived + min(request.timeout_us / 1e6, MOST_SECONDS), cancelled)
        except EngridError as error:
            self._service.counters.errors += 1
            return encode_error(request.number, to_message(error))
        finally:
            self._unanswered.pop(request.number, None)
