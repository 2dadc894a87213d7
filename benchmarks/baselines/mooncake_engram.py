"""Mooncake's EngramStore over TCP: an object per head, float32 rows by range reads. Fixed for comparison.

A mooncake_master of our own, a process that holds the rows (this file run as a script), and a client without memory of its
own, so that every row comes over TCP. Ids are [tokens, 16 heads], each head an equal range of the rows. A lookup is
synchronous: there is one in flight.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.baselines.peer import EXTRA, Bytes, Ids, PeerUnavailableError, content, free_port

HEADS = 16
BUFFER_BYTES = 64 << 20
START_SECONDS = 30.0
PACKAGES = "apt-get install libibverbs1 libnuma1 libcurl4"


def library() -> Any:
    """mooncake.store; raises PeerUnavailableError."""
    try:
        return importlib.import_module("mooncake.store")
    except ImportError as error:
        raise PeerUnavailableError(f"{error}; {EXTRA}, {PACKAGES}") from error


def connect(master: str, segment_bytes: int) -> Any:
    """A store client that holds so many bytes itself; raises PeerUnavailableError."""
    store = library().MooncakeDistributedStore()
    with quiet():
        code = store.setup("127.0.0.1", "P2PHANDSHAKE", segment_bytes, BUFFER_BYTES, "tcp", "", master)
    if code:
        raise PeerUnavailableError(f"Mooncake's setup failed with {code}")
    return store


def close(store: Any) -> None:
    with quiet():
        store.close()


@contextmanager
def quiet() -> Iterator[None]:
    """Its library logs to descriptor 2, which is also our terminal."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def engram_store(store: Any, rows: int, row_bytes: int) -> Any:
    """The table of `rows` in equal heads."""
    config = library().EngramStoreConfig()
    config.embedding_dim = row_bytes // 4
    config.table_vocab_sizes = [rows // HEADS] * HEADS
    return library().EngramStore(0, config, store)


class MooncakePeer:
    """A master, a process that holds the rows, and a client."""

    def __init__(self, rows: int, row_bytes: int, seed: int) -> None:
        library()
        binary = shutil.which("mooncake_master", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if binary is None:
            raise PeerUnavailableError(f"no mooncake_master; {EXTRA}")
        self._row_bytes = row_bytes
        self._starts = np.arange(HEADS) * (rows // HEADS)
        with ExitStack() as stack:
            port = free_port()
            address = f"127.0.0.1:{port}"
            self._start(stack, [binary, "-rpc_port", str(port), "-metrics_port", str(free_port())])
            _wait_for(port)
            options = ("--master", address, "--rows", rows, "--row-bytes", row_bytes, "--seed", seed)
            holder = self._start(stack, [sys.executable, __file__, *map(str, options)])
            assert holder.stdout is not None
            said = ""
            for said in holder.stdout:  # its library prints there too
                if said.startswith(("ready", "unavailable")):
                    break
            if not said.startswith("ready"):
                raise PeerUnavailableError(said.strip() or "the process that holds the rows ended")
            store = connect(address, 0)
            stack.callback(close, store)
            self._table = engram_store(store, rows, row_bytes)
            self._stack = stack.pop_all()

    @staticmethod
    def _start(stack: ExitStack, command: list[str]) -> subprocess.Popen[str]:
        child = stack.enter_context(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8")
        )
        stack.callback(child.terminate)
        return child

    def lookup(self, batches: list[Ids], _in_flight: int) -> Iterator[Bytes]:
        """The rows of each batch of whole tokens, one after another."""
        for ids in batches:
            found = self._table.lookup(ids.reshape(1, -1, HEADS) - self._starts)
            yield found.view(np.uint8).reshape(-1, self._row_bytes)

    def close(self) -> None:
        self._stack.close()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise PeerUnavailableError(f"mooncake_master does not answer on port {port}") from error
            time.sleep(0.05)
        else:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--master", required=True)
    for name in ("--rows", "--row-bytes", "--seed"):
        parser.add_argument(name, type=int, required=True)
    given = parser.parse_args()
    rows = content(given.rows, given.row_bytes, given.seed)
    try:
        # Each head is allocated in one piece: leave room between them.
        store = connect(given.master, max(2 * rows.nbytes, BUFFER_BYTES))
        values = rows.view(np.float32).reshape(HEADS, -1, given.row_bytes // 4)
        engram_store(store, given.rows, given.row_bytes).populate(list(values))
    except (PeerUnavailableError, RuntimeError) as error:
        print(f"unavailable: {error}", flush=True)
        return
    print("ready", flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    close(store)


if __name__ == "__main__":
    main()
