"""Waiting for what another thread or process does, without a guess at how long it takes."""

from __future__ import annotations

import time


def until(condition, seconds=20.0):
    """Returns once the condition holds; fails where it does not within a time that only a fault reaches."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.01)
