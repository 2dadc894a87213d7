"""What the two ends of a handover of sealed rows share (services/engrid/shard/handover.py draws the exchange)."""

from __future__ import annotations

import socket

MAX_LINE = 4096
"""Bytes of a request or an answer."""


def read_line(peer: socket.socket) -> bytes:
    """Up to the first newline. Raises ValueError where the other end stops before it or sends more than MAX_LINE."""
    line = b""
    while not line.endswith(b"\n"):
        piece = peer.recv(MAX_LINE - len(line) + 1)
        if not piece:
            raise ValueError("the connection ended before the line did")
        line += piece
        if len(line) > MAX_LINE:
            raise ValueError(f"more than {MAX_LINE} bytes without an end")
    return line
