"""The bound: a raw TCP socket, Python at both ends, fixed for comparison.

The server takes rows into a reused buffer and sends it whole; the client receives into a reused buffer, several
requests in flight. No frame but a count, no checks, no errors: what remains is copying and the kernel.

    request   count of ids (int64) | ids (int64 each)
    reply     rows end to end

    python benchmarks/baselines/raw_socket.py --rows 1000000 --row-bytes 128 --seed 0
"""

from __future__ import annotations

import argparse
import socket
import threading
from collections.abc import Iterator

import numpy as np

RECEIVE_BUFFER = 4 << 20
"""Room for the requests in flight, so that neither end waits for the other to read."""


def content(rows: int, row_bytes: int, seed: int) -> np.ndarray:
    """Rows of known content: uint8 [rows, row_bytes]."""
    return np.random.default_rng(seed).integers(0, 256, (rows, row_bytes), np.uint8)


def receive(connection: socket.socket, into: memoryview) -> bool:
    """Fills `into`; False at the end of the stream."""
    at = 0
    while at < len(into):
        got = connection.recv_into(into[at:])
        if not got:
            return False
        at += got
    return True


def serve(connection: socket.socket, rows: np.ndarray) -> None:
    opaque = rows.view(f"V{rows.shape[1]}").reshape(-1)
    head = np.empty(1, np.int64)
    ids = np.empty(0, np.int64)
    out = np.empty(0, opaque.dtype)
    while receive(connection, head.data.cast("B")):
        count = int(head[0])
        if count > len(ids):
            ids, out = np.empty(count, np.int64), np.empty(count, opaque.dtype)
        receive(connection, ids[:count].data.cast("B"))
        np.take(opaque, ids[:count], out=out[:count], mode="clip")
        connection.sendall(out[:count].view(np.uint8).data)


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class RawSocketClient:
    """Rows by id from one server."""

    def __init__(self, address: str, row_bytes: int) -> None:
        self._connection = connect(address)
        self._row_bytes = row_bytes
        self._buffer = np.empty(0, np.uint8)

    def send(self, ids: np.ndarray) -> None:
        self._connection.sendall(np.array([len(ids)], np.int64).tobytes() + ids.tobytes())

    def receive(self, count: int) -> np.ndarray:
        """uint8 [count, row_bytes] in a buffer that the next call reuses."""
        size = count * self._row_bytes
        if size > len(self._buffer):
            self._buffer = np.empty(size, np.uint8)
        assert receive(self._connection, self._buffer[:size].data)
        return self._buffer[:size].reshape(count, self._row_bytes)

    def lookup(self, batches: list[np.ndarray], in_flight: int) -> Iterator[np.ndarray]:
        """The rows of each batch, `in_flight` requests ahead."""
        for ids in batches[:in_flight]:
            self.send(ids)
        for index, ids in enumerate(batches):
            yield self.receive(len(ids))
            if index + in_flight < len(batches):
                self.send(batches[index + in_flight])

    def close(self) -> None:
        self._connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--row-bytes", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rows = content(given.rows, given.row_bytes, given.seed)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=serve, args=(connection, rows), daemon=True).start()


if __name__ == "__main__":
    main()
