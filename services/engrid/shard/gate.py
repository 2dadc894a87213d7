"""The shard's one lock, and every wait under it: each has an end, and ends at once when the shard cannot go on.

open      the lock, once nobody wants the shard to stand still
at_rest   the lock, with every Apply carried out: rows and state machine are of one moment
fail      the shard cannot go on: whoever waits is told, health says so, and the process ends (server.py)
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engrid.rpc.errors import DeadlineExceededError, ShardUnavailableError

LONGEST_WAIT = 3600.0
"""Seconds; whatever a caller says, nobody waits longer."""

_log = logging.getLogger(__name__)


class Gate:
    """Deadlines are on time.monotonic()'s clock."""

    def __init__(self, shard: str) -> None:
        self.stepped = threading.Condition()
        """The lock. Notified when a step was applied, and whenever something may be looked at again."""
        self.failure = ""
        """Why the shard cannot go on."""
        self._shard = shard
        self._closed = False
        self._pausing = False
        self._on_failure: Callable[[], None] = lambda: None

    def refuse_late(self, deadline: float, what: str) -> None:
        """Raises DeadlineExceededError if the caller has given up, ShardUnavailableError if the shard cannot go on."""
        self.refuse_failed()
        if time.monotonic() >= deadline:
            raise DeadlineExceededError(f"shard {self._shard}: the caller's time was over while it waited for {what}")

    def refuse_failed(self) -> None:
        """Raises ShardUnavailableError if the shard cannot go on."""
        if self.failure:
            raise ShardUnavailableError(
                f"shard {self._shard} cannot go on and ends: {self.failure}. Start it again: it goes on from its log"
            )
        if self._closed:
            raise ShardUnavailableError(f"shard {self._shard} is being stopped")

    def wait_for(self, done: Callable[[], bool], deadline: float, what: str) -> None:
        """Under the lock, which is let go meanwhile. Raises as `refuse_late`."""
        left = min(deadline - time.monotonic(), LONGEST_WAIT)
        self.stepped.wait_for(lambda: self._closed or bool(self.failure) or done(), max(0.0, left))
        self.refuse_failed()
        if not done():
            raise DeadlineExceededError(f"shard {self._shard}: the caller's time was over while it waited for {what}")

    @contextmanager
    def hold(self, lock: threading.Lock, deadline: float, what: str) -> Iterator[None]:
        """Another lock of the shard, not under this one. Raises as `refuse_late`."""
        left = min(deadline - time.monotonic(), LONGEST_WAIT)
        if not lock.acquire(timeout=max(0.0, left)):
            self.refuse_late(0.0, what)
        try:
            self.refuse_late(deadline, what)
            yield
        finally:
            lock.release()

    @contextmanager
    def locked(self, deadline: float) -> Iterator[None]:
        """The lock alone, which a write to a disk that hangs may keep. Raises DeadlineExceededError."""
        left = min(deadline - time.monotonic(), LONGEST_WAIT)
        if not self.stepped.acquire(timeout=max(0.0, left)):
            raise DeadlineExceededError(
                f"shard {self._shard} is held up, as by a disk that hangs: the caller's time was over before its turn came"
            )
        try:
            yield
        finally:
            self.stepped.release()

    @contextmanager
    def open(self, deadline: float) -> Iterator[None]:
        """The lock, once nobody wants the shard to stand still. Raises as `refuse_late`."""
        with self.locked(deadline):
            self.wait_for(lambda: not self._pausing, deadline, "its turn")
            self.refuse_late(deadline, "its turn")
            yield

    @contextmanager
    def at_rest(self, applying: Callable[[], bool], deadline: float) -> Iterator[None]:
        """The lock, once nothing is being applied. Keep it short. Raises as `refuse_late`."""
        with self.open(deadline):
            self._pausing = True
            try:
                self.wait_for(lambda: not applying(), deadline, "steps to be applied")
                self.refuse_late(deadline, "steps to be applied")
                yield
            finally:
                self._pausing = False
                self.stepped.notify_all()

    def close(self) -> None:
        """Ends every wait, and each to come."""
        with self.stepped:
            self._closed = True
            self.stepped.notify_all()

    def wake(self) -> None:
        """Lets all that wait look again."""
        with self.stepped:
            self.stepped.notify_all()

    def fail(self, why: str) -> None:
        """The shard cannot go on. Only the first reason counts."""
        with self.stepped:
            if self.failure:
                return
            self.failure = why
            self.stepped.notify_all()
            on_failure = self._on_failure
        _log.error("shard %s cannot go on and ends: %s", self._shard, why)
        on_failure()

    def on_failure(self, call: Callable[[], None]) -> None:
        """`call` is called once, from any thread, when the shard cannot go on: perhaps at once."""
        with self.stepped:
            self._on_failure = call
            failed = bool(self.failure)
        if failed:
            call()
