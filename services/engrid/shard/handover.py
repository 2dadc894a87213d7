"""Sealed rows handed to processes of this host: a descriptor over a Unix socket, and no request ever again.

    client                                        shard
      Describe (gRPC) ------------------------->  local_socket, instance
      connect to local_socket ----------------->  peer's user id, as the kernel tells it: ours or root's
      {"instance", "table", "partition"} \n  -->
      <------------ {"start", "stop"} \n and the descriptor (SCM_RIGHTS)    or   {"code", "message"} \n

The socket lies in a folder that only this user may enter. Another container's socket of the same path is told apart by
`instance`, which a shard draws anew at each start. One request a connection, one connection at a time: each takes
microseconds, and there is one per client and partition. Live rows are never handed over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import struct
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engrid.host.handover import read_line
from engrid.rpc.errors import BadRequestError, EngridError, InternalError, to_message

from .core.messages import PartitionKey
from .rows.sealed import SealedRows

REQUEST_SECONDS = 1.0
"""A client has to ask, and once more to take the answer."""
MAX_MESSAGE = 300
"""Characters of an error's text: escaped as JSON, they fit a line."""

_log = logging.getLogger(__name__)

Find = Callable[[PartitionKey], SealedRows]
"""The loaded rows of a sealed partition; raises EngridError where they are not here."""


class Handover:
    """Serves from construction until `close`."""

    def __init__(self, find: Find) -> None:
        """Raises OSError where this host gives no place for a socket."""
        self.instance = secrets.token_hex(8)
        self.handed = 0
        """Descriptors given out."""
        folder = Path(tempfile.gettempdir(), f"engrid-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
            raise PermissionError(f"{folder} belongs to others or lets them in; remove it")
        self.path = folder / f"{self.instance}.sock"
        self._find = find
        self._closing = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(self.path))
        self._socket.listen(16)
        self._thread = threading.Thread(target=self._serve, name="engrid handover", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hands nothing over any more; what was handed over stays readable."""
        self._closing.set()
        with contextlib.suppress(OSError):  # not connected: what shutdown is for here is to wake accept()
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(3 * REQUEST_SECONDS)
        self.path.unlink(missing_ok=True)

    @property
    def serves(self) -> bool:
        """Whether it still answers; if not, rows are read over gRPC."""
        return self._thread.is_alive()

    def _serve(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._socket.accept()
            except OSError as error:
                if self._closing.wait(REQUEST_SECONDS / 10):
                    return
                _log.warning("cannot accept a client of sealed rows: %s", error)  # no descriptor is left, say
                continue
            with client, contextlib.suppress(OSError):  # a client that goes away or is slow is its own loss
                client.settimeout(REQUEST_SECONDS)
                self._answer(client)

    def _answer(self, client: socket.socket) -> None:
        try:
            asked = self._asked(client)  # read first, also of those who may not ask: else they never see the answer
            _check_peer(client)
            rows = self._find(asked)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - one request that fails must not be the last
            if not isinstance(error, EngridError):
                _log.error("a request for sealed rows failed", exc_info=error)
                error = InternalError(f"the shard could not look for them: {type(error).__name__}: {error}")
            message = to_message(error)
            client.settimeout(REQUEST_SECONDS)
            client.sendall(_line({"code": message.code, "message": message.message[:MAX_MESSAGE]}))
            return
        client.settimeout(REQUEST_SECONDS)
        socket.send_fds(client, [_line({"start": rows.start, "stop": rows.stop})], [rows.descriptor])
        self.handed += 1

    def _asked(self, client: socket.socket) -> PartitionKey:
        try:
            asked = json.loads(read_line(client))
            instance, table, partition = asked["instance"], asked["table"], asked["partition"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadRequestError(f"not a request for sealed rows: {error}") from error
        if instance != self.instance:
            raise BadRequestError("this is another shard than the one asked for; read its address anew")
        if not isinstance(table, str) or not isinstance(partition, int):
            raise BadRequestError("not a request for sealed rows: give the table as text and the partition as a number")
        return table, partition


def _check_peer(client: socket.socket) -> None:
    credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    if user not in (os.getuid(), 0):
        raise BadRequestError(f"user {user} may not read the memory of user {os.getuid()}; read over gRPC")


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"
