"""A TCP proxy that cuts its connections after so many bytes."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import contextmanager, suppress

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: close by a reset, whatever is unsent."""


class Proxy:
    """Forwards to `target` what comes to `address`."""

    def __init__(self, target):
        self.left = None
        """Bytes from the target still to let through before every connection is reset; None: any number."""
        self._target = target
        self._sockets = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                host, _, port = self._target.rpartition(":")
                server = socket.create_connection((host, int(port)))
                with self._lock:
                    self._sockets += [client, server]
                threading.Thread(target=self._pump, args=(client, server), daemon=True).start()
                threading.Thread(target=self._pump_until_cut, args=(server, client), daemon=True).start()

    def _pump(self, source, sink):
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)

    def _pump_until_cut(self, source, sink):
        with suppress(OSError):
            while data := source.recv(1 << 16):
                left = self.left
                sink.sendall(data if left is None else data[:left])
                if left is not None:
                    self.left = left - len(data)
                    if self.left <= 0:
                        self.left = None
                        self.cut()

    def cut(self):
        """Resets every connection."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for each in sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            # Wakes whoever is blocked in recv, which close alone does not.
            with suppress(OSError):
                each.shutdown(socket.SHUT_RD)
            each.close()

    def close(self):
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()


@contextmanager
def proxy(target):
    """A Proxy in front of host:port."""
    running = Proxy(target)
    try:
        yield running
    finally:
        running.close()
