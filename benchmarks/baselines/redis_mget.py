"""Redis: a row is a value, its key the eight bytes of its id; MGET, read by hiredis.

A real redis-server on a free port, without persistence. Several requests in flight are one pipeline: redis-py sends all of
them and then reads all replies. Fixed for comparison.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.baselines.peer import EXTRA, Bytes, Ids, PeerUnavailableError, content, free_port

READY = "Ready to accept connections"
LOADED = 8192
"""Rows in one MSET."""


class RedisPeer:
    """A server of our own and one connection to it."""

    def __init__(self, rows: int, row_bytes: int, seed: int) -> None:
        try:
            import hiredis  # noqa: F401 - redis-py takes its parser where it is there
            import redis
        except ImportError as error:
            raise PeerUnavailableError(f"{error}; {EXTRA}") from error
        binary = shutil.which("redis-server")
        if binary is None:
            raise PeerUnavailableError("no redis-server; apt-get install redis-server")
        self._row_bytes = row_bytes
        self._folder = TemporaryDirectory(prefix="engrid-redis-")
        port = free_port()
        command = [binary, "--bind", "127.0.0.1", "--port", str(port), "--dir", self._folder.name]
        self._server = subprocess.Popen(
            [*command, "--save", "", "--appendonly", "no"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        try:
            self._wait()
            self._client = redis.Redis(host="127.0.0.1", port=port)
            self._fill(content(rows, row_bytes, seed))
        except BaseException:
            self._stop()
            raise

    def _wait(self) -> None:
        assert self._server.stdout is not None
        said = ""
        for said in self._server.stdout:
            if READY in said:
                return
        raise PeerUnavailableError(f"redis-server ended while starting: {said.strip()}")

    def _fill(self, rows: Bytes) -> None:
        for first in range(0, len(rows), LOADED):
            some = rows[first : first + LOADED]
            keys = _keys(np.arange(first, first + len(some)))
            self._client.mset(dict(zip(keys, (row.tobytes() for row in some), strict=True)))

    def lookup(self, batches: list[Ids], in_flight: int) -> Iterator[Bytes]:
        """The rows of each batch, `in_flight` of them in one pipeline."""
        for first in range(0, len(batches), in_flight):
            together = batches[first : first + in_flight]
            if len(together) == 1:
                replies = [self._client.mget(_keys(together[0]))]
            else:
                pipeline = self._client.pipeline(transaction=False)
                for ids in together:
                    pipeline.mget(_keys(ids))
                replies = pipeline.execute()
            for reply in replies:
                yield np.frombuffer(b"".join(reply), np.uint8).reshape(-1, self._row_bytes)

    def close(self) -> None:
        self._client.close()
        self._stop()

    def _stop(self) -> None:
        self._server.terminate()
        self._server.wait()
        assert self._server.stdout is not None
        self._server.stdout.close()
        self._folder.cleanup()


def _keys(ids: Ids) -> list[bytes]:
    """The eight bytes of each."""
    return ids.view("V8").tolist()  # type: ignore[no-any-return]
