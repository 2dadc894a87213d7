"""Ends the calls of peers that do not read, or that stop sending.

gRPC's flow control stops a handler in the middle of a reply that its client does not read, and a client that stops sending
leaves it waiting for the next message: for ever, as the connection is fine. So many of them would leave no thread for
anyone else. gRPC has no bound for this (a deadline is the call's, which may live as long as its client; keepalive is
answered by the client's library, whether or not the client reads), so one thread looks at all calls and cancels the late
ones. A client that takes or sends one message in the time given is slow and is served.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_log = logging.getLogger(__name__)

LOOKS = 4
"""How often a call is looked at within its time; it is ended at most a quarter late."""


class Flow:
    """One call: whether its handler waits for the client, and until when it may."""

    def __init__(self, seconds: float) -> None:
        self.until: float | None = None
        """On time.monotonic()'s clock; None: the handler does not wait."""
        self._seconds = seconds

    def waits(self) -> None:
        """The client has to send or to take a message from now on."""
        self.until = time.monotonic() + self._seconds

    def goes_on(self) -> None:
        """It has."""
        self.until = None

    def incoming(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        """The messages; the client has to send each in time."""
        return _Incoming(self, messages)


class _Incoming:
    def __init__(self, flow: Flow, messages: Iterator[bytes]) -> None:
        self._flow, self._messages = flow, messages

    def __iter__(self) -> _Incoming:
        return self

    def __next__(self) -> bytes:
        self._flow.waits()
        try:
            return next(self._messages)
        finally:
            self._flow.goes_on()


class StallWatch:
    """Watches from the first call until `close`."""

    def __init__(self, seconds: float, ended: Callable[[], object] = bool) -> None:
        """seconds: how often to look at least, `LOOKS` times in it. ended: called for each call that was ended."""
        self._seconds, self._ended = seconds, ended
        self._calls: dict[Flow, Callable[[], object]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def over(self, cancel: Callable[[], object], seconds: float) -> Iterator[Flow]:
        """Watches a call meanwhile. cancel: ends it, from another thread. seconds: how long its handler waits for the client."""
        flow = Flow(seconds)
        with self._lock:
            self._calls[flow] = cancel
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._watch, name="stalled-calls", daemon=True)
                self._thread.start()
        try:
            yield flow
        finally:
            with self._lock:
                del self._calls[flow]

    def close(self) -> None:
        """Watches no longer."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self._seconds / LOOKS):
            now = time.monotonic()
            with self._lock:
                watched = list(self._calls.items())
            for flow, cancel in watched:
                until = flow.until
                if until is not None and until < now:
                    flow.goes_on()
                    try:
                        self._ended()
                        cancel()
                    except Exception:  # noqa: BLE001 - the others must be watched all the same
                        _log.exception("a stalled call could not be ended")
