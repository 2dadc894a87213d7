"""Threads by kind of call, so that no kind can keep another from being answered.

gRPC gives each call a thread for as long as it lasts, and has one pool for all: enough streams that nobody reads would leave
none for a health check. Here each method belongs to a pool with threads and a bound on the calls that wait for one; a call
beyond both is refused at once, by the thread that hands calls out, so that a refusal needs no thread either.

    a call arrives -> its pool has room?  yes -> a thread of the pool, or its queue
                                          no  -> ShardUnavailableError, in place
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import grpc

from .errors import ShardUnavailableError, abort

STALL_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Threads for some methods, which no other method takes."""

    name: str
    """What the calls are, for messages: "pushes"."""
    methods: frozenset[str]
    """Names of the methods, without their service's."""
    threads: int
    waiting: int
    """Calls that may wait for a thread; one more is refused."""
    patience: float = STALL_SECONDS
    """Seconds a call may wait for its client to send or to take a message; then it is ended."""
    make_room: Callable[[], bool] | None = None
    """Asked before a call is refused; True: one that is under way was told to end, and the new one may wait for its thread.
    Called from the thread that hands calls out: it must not wait."""


class PoolThreads(ThreadPoolExecutor):
    """The threads of a pool, and the calls they have."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool.threads, f"rpc {pool.name}")
        self._pool = pool
        self._count = threading.Lock()
        self.taken = 0
        """Calls under way or waiting."""

    def admits(self) -> bool:
        """Whether one more call may come."""
        if self.taken < self._pool.threads + self._pool.waiting:
            return True
        return self._pool.make_room is not None and self._pool.make_room()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        with self._count:
            self.taken += 1
        try:
            future = super().submit(fn, *args, **kwargs)
        except BaseException:
            self._done()
            raise
        future.add_done_callback(self._done)
        return future

    def _done(self, _: object = None) -> None:
        with self._count:
            self.taken -= 1


class InPlace(ThreadPoolExecutor):
    """Runs what it is given on the caller's thread: for what never waits."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def on_threads(behavior: Callable[..., Any], threads: ThreadPoolExecutor) -> Callable[..., Any]:
    """The handler, with the threads that gRPC shall run it on."""
    on = partial(behavior)
    # gRPC reads this attribute of a handler (grpc/_server.py); a test notices where a version of it does not.
    on.experimental_thread_pool = threads  # type: ignore[attr-defined]
    return on


def refusal(pool: Pool, server: str) -> Any:
    """A handler, for any kind of method, that refuses the call in place."""

    def refuse(_: Iterator[bytes], context: grpc.ServicerContext) -> NoReturn:
        waiting = f" and {pool.waiting} more waiting" if pool.waiting else ""
        error = ShardUnavailableError(
            f"{server} has its {pool.threads} {pool.name} under way{waiting}; try again later, or on another"
        )
        abort(context, error)

    return grpc.stream_stream_rpc_method_handler(on_threads(refuse, InPlace(1)))
