"""The naive path, fixed for later comparison: one unary call per shard and table, no dedup, one in flight.

Self-contained on purpose: it shares nothing with the product, so the product's changes leave it as it is. A
request is a google.protobuf.BytesValue of int64 local row ids, the reply one of rows; the method names the table.

    python benchmarks/baselines/naive.py --rows 1000000 --row-bytes 128 --seed 0

serves one shard and prints its address.
"""

from __future__ import annotations

import argparse
import signal
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
from google.protobuf.wrappers_pb2 import BytesValue

SERVICE = "naive.Memory"
OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.so_reuseport", 0),
]


class NaiveShard:
    """Rows of one table in one array."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows
        handler = grpc.unary_unary_rpc_method_handler(
            self._lookup, request_deserializer=BytesValue.FromString, response_serializer=BytesValue.SerializeToString
        )
        self._server = grpc.server(ThreadPoolExecutor(4), options=OPTIONS)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Lookup": handler}),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _lookup(self, request: BytesValue, _context: grpc.ServicerContext) -> BytesValue:
        ids = np.frombuffer(request.value, np.int64)
        return BytesValue(value=self._rows[ids].tobytes())

    def stop(self) -> None:
        self._server.stop(0).wait()


class NaiveClient:
    """Rows [0, n) on the first shard, [n, 2n) on the second, and so on."""

    def __init__(self, addresses: list[str], rows_per_shard: int, row_bytes: int) -> None:
        self._channels = [grpc.insecure_channel(address, options=OPTIONS) for address in addresses]
        self._calls = [
            channel.unary_unary(
                f"/{SERVICE}/Lookup",
                request_serializer=BytesValue.SerializeToString,
                response_deserializer=BytesValue.FromString,
            )
            for channel in self._channels
        ]
        self._rows_per_shard = rows_per_shard
        self._row_bytes = row_bytes

    def lookup(self, ids: np.ndarray) -> np.ndarray:
        """uint8 [n, row_bytes] of int64 ids [n]."""
        out = np.empty((len(ids), self._row_bytes), np.uint8)
        for shard, call in enumerate(self._calls):
            where = np.flatnonzero(ids // self._rows_per_shard == shard)
            local = ids[where] - shard * self._rows_per_shard
            reply = call(BytesValue(value=local.tobytes()), timeout=30)
            out[where] = np.frombuffer(reply.value, np.uint8).reshape(-1, self._row_bytes)
        return out

    def close(self) -> None:
        for channel in self._channels:
            channel.close()


def content(rows: int, row_bytes: int, seed: int) -> np.ndarray:
    """Rows of known content: uint8 [rows, row_bytes]."""
    return np.random.default_rng(seed).integers(0, 256, (rows, row_bytes), np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--row-bytes", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    shard = NaiveShard(content(given.rows, given.row_bytes, given.seed))
    print(shard.address, flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    shard.stop()


if __name__ == "__main__":
    main()
