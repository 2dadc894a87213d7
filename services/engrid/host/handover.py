"""What the two ends of a handover of sealed rows share (services/engrid/shard/handover.py draws the exchange)."""

from __future__ import annotations

import socket
import time

MAX_LINE = 4096
"""Bytes of a request or an answer."""


def read_line(peer: socket.socket) -> bytes:
    """Up to the first newline, in the socket's timeout altogether. Raises ValueError if the other end stops before it or sends
    more than MAX_LINE, TimeoutError if it takes longer."""
    line = b""
    seconds = peer.gettimeout()
    deadline = None if seconds is None else time.monotonic() + seconds
    while not line.endswith(b"\n"):
        if deadline is not None:
            peer.settimeout(max(1e-3, deadline - time.monotonic()))
        piece = peer.recv(MAX_LINE - len(line) + 1)
        if not piece:
            raise ValueError("the connection ended before the line did")
        line += piece
        if len(line) > MAX_LINE:
            raise ValueError(f"more than {MAX_LINE} bytes without an end")
    return line
