"""How a run of training is told to end: at once, or after the step under way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engrid.rpc.errors import CancelledError


class Stopping:
    """One run's. Any thread may ask for the end; the run looks between its steps, and what it waits for is cut off."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()
        self._finishing = threading.Event()
        self._lock = threading.Lock()
        self._cuts: list[Callable[[], None]] = []

    def cancel(self) -> None:
        """Ends the run now: nothing is saved, and whatever it waits for fails."""
        self._cancelled.set()
        with self._lock:
            cuts = list(self._cuts)
        for cut in cuts:
            cut()

    def finish(self) -> None:
        """Ends the run after the step under way, and saves it."""
        self._finishing.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def finishing(self) -> bool:
        return self._finishing.is_set()

    def check(self) -> None:
        """Raises CancelledError once the run is to end now."""
        if self._cancelled.is_set():
            raise CancelledError("training was cancelled")

    def wait(self, seconds: float) -> None:
        """Sleeps, and raises CancelledError as soon as the run is to end now."""
        self._cancelled.wait(seconds)
        self.check()

    @contextmanager
    def cutting(self, cut: Callable[[], None]) -> Iterator[None]:
        """Within, `cancel` calls `cut`, from its own thread, to end what the run waits for; perhaps at once."""
        with self._lock:
            self._cuts.append(cut)
        try:
            self.check()
            yield
        finally:
            with self._lock:
                self._cuts.remove(cut)
