"""Ends the lookup streams of clients that do not read.

gRPC's flow control stops such a stream in the middle of a reply, and with it the handler's thread: for ever, as the
connection is fine. So many of them would leave no stream for anyone else. gRPC has no bound for this (a deadline is the
call's, which here lives as long as the client; keepalive is answered by the client's library, whether or not the client
reads), so one thread looks at all streams and cancels the late ones. A client that takes one reply in the time given is
slow and is served.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .service import Counters
from .stream import LookupStream

LOOKS = 4
"""How often a stream is looked at within its time; it is ended at most a quarter late."""


class StallWatch:
    """Watches from the first stream until `close`."""

    def __init__(self, seconds: float, counters: Counters) -> None:
        """seconds: how long a reply may lie untaken. counters: where a stream ended counts as an error."""
        self._seconds = seconds
        self._counters = counters
        self._streams: dict[LookupStream, Callable[[], object]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def over(self, stream: LookupStream, cancel: Callable[[], object]) -> Iterator[None]:
        """Watches the stream meanwhile; `cancel` ends its call and is called from another thread."""
        with self._lock:
            self._streams[stream] = cancel
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="stalled-streams", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                del self._streams[stream]

    def close(self) -> None:
        """Watches no longer."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self._seconds / LOOKS):
            late = time.monotonic() - self._seconds
            with self._lock:
                watched = list(self._streams.items())
            for stream, cancel in watched:
                since = stream.untaken_since
                if since is not None and since < late:
                    stream.untaken_since = None
                    self._counters.errors += 1
                    cancel()
