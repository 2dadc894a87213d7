"""The floor of a call: a bare grpcio stream that echoes bytes, fixed for comparison.

One bidirectional stream, a threaded server, no serializers, nothing done with the message.

    python benchmarks/baselines/stream_echo.py
"""

from __future__ import annotations

import queue
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

SERVICE = "echo.Echo"
OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.so_reuseport", 0),
]


def echo(messages: Iterator[bytes], _context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from messages


class EchoClient:
    """One stream."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._replies = self._channel.stream_stream(f"/{SERVICE}/Echo")(iter(self._outgoing.get, None))

    def call(self, message: bytes) -> bytes:
        self._outgoing.put(message)
        return next(self._replies)

    def close(self) -> None:
        self._outgoing.put(None)
        self._channel.close()


def main() -> None:
    server = grpc.server(ThreadPoolExecutor(4), options=OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Echo": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"127.0.0.1:{port}", flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    server.stop(0).wait()


if __name__ == "__main__":
    main()
