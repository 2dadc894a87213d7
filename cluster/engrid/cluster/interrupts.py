"""Ctrl-C and SIGTERM: a command stops what it started and ends with code 130, wherever it was cut off.

Python raises KeyboardInterrupt in the main thread wherever that is, also inside libraries, which may make another error of
it or lose it: an import may end in a TypeError, and what a destructor or a callback from C raises is only printed. So
that it was pressed is kept here, and one that has not arrived after a while is raised again.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM, as shells have it."""

AGAIN_SECONDS = 5.0
"""After which an interrupt that nobody has acted on is raised again."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_pressed: list[int] = []
"""Numbers of the signals that came. A list, as a handler must take no lock: it may run while the lock is held."""


def handle() -> None:
    """From here on both signals, and the timer behind them, raise KeyboardInterrupt. For a process of our own."""
    for number in (*SIGNALS, signal.SIGALRM):
        signal.signal(number, _interrupt)


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    _pressed.append(number)
    signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
    raise KeyboardInterrupt


def pressed() -> bool:
    """Whether the command was told to stop, whatever became of the exception."""
    return bool(_pressed)


@contextmanager
def first_asks() -> Iterator[Callable[[], bool]]:
    """Within, the first interrupt raises nothing: what is yielded says that it came. The second raises, as outside."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked: list[int] = []

    def ask(number: int, _frame: FrameType | None) -> None:
        _pressed.append(number)
        asked.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        restore()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Interrupts are passed over until the block ends, so that stopping is not itself cut off."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, 0)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if _pressed:
            signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)


def leave() -> NoReturn:
    """Ends the process at once. Ray's native library, interrupted while it connects, may crash when unwound."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)
