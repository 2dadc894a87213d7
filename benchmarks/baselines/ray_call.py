"""Ray: the rows lie in an actor, a lookup is a call of its method. Fixed for comparison.

A Ray of its own on this machine, stopped afterwards. The actor is given a CPU: without one it would run at nice 15 and
with one thread. Several calls in flight are as many references awaited in order.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.baselines.peer import EXTRA, Bytes, Ids, PeerUnavailableError
from engrid.cluster.environment import child_environment

OBJECT_STORE_BYTES = 256 << 20
"""Replies of a few in flight are far below it."""


class RayPeer:
    """A local Ray with one actor."""

    def __init__(self, rows: int, row_bytes: int, seed: int) -> None:
        # Read when ray is imported, and by the processes it starts.
        os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        try:
            import ray
        except ImportError as error:
            raise PeerUnavailableError(f"{error}; {EXTRA}") from error
        self._ray = ray
        self._temp = tempfile.mkdtemp(prefix="engrid-ray-", dir="/tmp")  # Ray's sockets need a short path
        try:
            with _apart_from_the_shell(self._temp):
                ray.init(
                    address="local",
                    num_cpus=2,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=f"{self._temp}/ray",  # which it lets everybody write to
                )
            self._actor = ray.remote(num_cpus=1)(_rows_class()).remote(rows, row_bytes, seed)
            ray.get(self._actor.ready.remote())
        except BaseException:
            self.close()
            raise

    def lookup(self, batches: list[Ids], in_flight: int) -> Iterator[Bytes]:
        """The rows of each batch, `in_flight` calls ahead."""
        calls = [self._actor.lookup.remote(ids) for ids in batches[:in_flight]]
        for index in range(len(batches)):
            yield self._ray.get(calls.pop(0))
            if index + in_flight < len(batches):
                calls.append(self._actor.lookup.remote(batches[index + in_flight]))

    def close(self) -> None:
        self._ray.shutdown()
        shutil.rmtree(self._temp, ignore_errors=True)


@contextmanager
def _apart_from_the_shell(temp: str) -> Iterator[None]:
    """For Ray's start: what it starts gets the environment and the working folder of now, and runs modules found there."""
    before = dict(os.environ)
    empty = Path(temp, "empty")
    empty.mkdir()
    try:
        os.environ.clear()
        os.environ.update(
            child_environment(before, keep_ray=False), RAY_worker_niceness="0", RAY_USAGE_STATS_ENABLED="0"
        )
        with chdir(empty):
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _rows_class() -> Any:
    """Made here so that Ray sends the class itself: its workers cannot import this file."""

    class Rows:
        def __init__(self, rows: int, row_bytes: int, seed: int) -> None:
            values = np.random.default_rng(seed).random((rows, row_bytes // 4), np.float32)
            self._row_bytes = row_bytes
            self._opaque = values.view(f"V{row_bytes}").reshape(-1)

        def ready(self) -> bool:
            return True

        def lookup(self, ids: Ids) -> Bytes:
            taken = np.take(self._opaque, ids, mode="clip")
            return taken.view(np.uint8).reshape(-1, self._row_bytes)

    return Rows
