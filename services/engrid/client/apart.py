"""Calls of gRPC made by another thread than the one that waits for them.

Ctrl-C in the middle of one leaves gRPC's locks held or its call half made: the next one hangs, and a shard goes on with
what nobody waits for. Here Ctrl-C ends the wait alone, and then every call that was begun is cancelled, by a thread too.
"""

from __future__ import annotations

import _thread
import queue
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from engrid.rpc.errors import CancelledError
from engrid.rpc.forks import check_not_forked, is_forked

T = TypeVar("T")


class Calls:
    """Those that one piece of work has begun."""

    def __init__(self) -> None:
        self.stopped = False
        """The work is given up."""
        self._begun: list[Any] = []

    def add(self, call: Any) -> Any:
        """The same call, which ends where the work is given up."""
        self._begun = [*(each for each in self._begun if not each.done()), call]
        if self.stopped:
            self._cancel()
        return call

    def stop(self) -> None:
        """Ends every call, and each to come; returns at once."""
        self.stopped = True
        if not is_forked():
            _thread.start_new_thread(self._cancel, ())

    def _cancel(self) -> None:
        for call in list(self._begun):
            call.cancel()


def apart(work: Callable[[Calls], T], calls: Calls | None = None) -> T:
    """What `work` returns or raises, done by a thread of its own; it names to `calls` each call that it begins.

    Raises CancelledError where a call of it ended because the connection was closed, ForkedError in a forked child.
    """
    check_not_forked()
    calls = calls or Calls()
    done: queue.SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(calls), None))
        except grpc.FutureCancelledError:
            done.put((None, CancelledError("the connection was closed")))
        except BaseException as error:  # noqa: BLE001 - raised to whoever waits
            done.put((None, error))

    try:
        _thread.start_new_thread(run, ())  # in one piece, as threading's start is not; Ctrl-C may come right after it
        result, error = done.get()
    except BaseException:
        calls.stop()
        raise
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
