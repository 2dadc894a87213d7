"""What a shard is started with."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from engrid.host.memory import gib, memory

MEMORY_SHARE = 0.8
"""Of what is free, for rows; the rest is for replies, pushes and the log."""


MAX_NAME = 100
"""Letters of a shard's name."""
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}")
"""A line of the state folder's lock, a file of the run directory, the end of another file's name."""


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """Who a shard is, where it listens and how much it may hold."""

    name: str
    """Name in the placement; unique in the directory."""
    listen: str = "127.0.0.1:0"
    """host:port; port 0 for any free one."""
    advertise_host: str | None = None
    """Host that clients reach us by; None: that of `listen`, or this host's address where that is 0.0.0.0 or [::]."""
    directory: str | os.PathLike[str] = field(repr=False)
    """A run directory (a path object or file:PATH), or redis://[USER:PASSWORD@]HOST:PORT[/DB][?prefix=NAME]."""
    state: Path | None = None
    """Folder of the shard's log and base, from which it goes on when it is started again; None: nothing is kept."""
    checkpoints: tuple[Path, ...] = ()
    """Folders in which clients may have checkpoints written and read; none: the working directory. Besides them, where the
    directory is a file, its folder and what its owner allows (folders.py)."""
    log_bytes: int = 2 << 30
    """A start replays about this much at most: then the shard writes its rows to disk and lets the log go."""
    image_bytes: int = 256 << 20
    """Memory for rows that are pushed to while they are being written to disk; pushes wait where it is full."""
    memory_bytes: int | None = None
    """Most bytes of rows and optimizer state to hold, no more than the machine has or our control groups allow; None: 80 % of
    what is free at the start."""
    max_streams: int = 64
    """Lookup streams open at a time. For one more the longest idle is ended, and where all are busy it is refused. Each
    holds a thread."""
    unary_threads: int = 8
    """Threads for pushes, as many for loads and exports, for checkpoints, and for what changes runs and placements; twice as
    many for health and what is answered at once."""
    max_reply_bytes: int = 8 << 20
    """Largest rows in one lookup reply, in bytes; a request for more is refused."""
    reply_timeout: float = 30.0
    """Seconds a client may leave a reply untaken, or a message unsent that the shard waits for; then its call is ended, and
    the call's thread free again."""
    keepalive: float = 30.0
    """Seconds after which a silent client's machine is asked whether it lives, and again. It has two thirds of that to
    answer, or its connection is closed."""
    shared_memory: bool = True
    """Hand sealed rows to processes of this host and user, to be mapped and read without asking."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"shard name {self.name[: MAX_NAME + 1]!r}: give letters, digits, '.', '_' and '-', not starting with a sign, {MAX_NAME} at most"
            )
        host, colon, port = self.listen.rpartition(":")
        if not colon or not host or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"listen {self.listen!r}: give HOST:PORT, for example 127.0.0.1:7400 or 127.0.0.1:0")
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise ValueError(f"memory_bytes {self.memory_bytes}: give a positive number of bytes")
        if self.memory_bytes is not None and self.memory_bytes > (total := memory().total):
            raise ValueError(
                f"{gib(self.memory_bytes)} of memory for rows: this machine has {gib(total)}; give less, for example "
                f"{gib(int(MEMORY_SHARE * total))}"
            )
        if self.log_bytes < 1 or self.image_bytes < 1:
            raise ValueError("log_bytes and image_bytes must be at least 1")
        if self.max_streams < 1 or self.unary_threads < 1 or self.max_reply_bytes < 1:
            raise ValueError("max_streams, unary_threads and max_reply_bytes must be at least 1")
        for name in ("reply_timeout", "keepalive"):
            if not 0 < getattr(self, name) <= 3600:
                raise ValueError(f"{name} {getattr(self, name)}: give a positive number of seconds, at most 3600")
