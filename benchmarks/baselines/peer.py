"""What the other systems have in common: they may be missing."""

from __future__ import annotations

import socket

import numpy as np
import numpy.typing as npt

EXTRA = "pip install -e '.[peers]'"

Ids = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


class PeerUnavailableError(Exception):
    """Cannot run here; says what is missing."""


def content(rows: int, row_bytes: int, seed: int) -> Bytes:
    """Rows of known content: finite float32 values, seen as uint8 [rows, row_bytes]."""
    return np.random.default_rng(seed).random((rows, row_bytes // 4), np.float32).view(np.uint8)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
