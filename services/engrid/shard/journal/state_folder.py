"""The folder a shard keeps its log and bases in: one shard's, and of one process at a time.

    lock      flock'ed while the process lives, by whatever way it ends; holds the shard's name and a newline

Two processes that append to one log would each leave the other a gap, so the second is refused before it reads anything.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from engrid.rpc.errors import BadRequestError
from engrid.storage.disk import LocalDisk

LOCK_FILE = "lock"
LOCK_PATIENCE_S = 5.0
"""For the process before us, which may still be ending."""
_POLL_S = 0.05
_MOST_NAME_BYTES = 4096


class StateFolder:
    """Held from construction until `close`."""

    def __init__(self, path: Path, shard: str, patience_s: float = LOCK_PATIENCE_S) -> None:
        """Raises BadRequestError, naming who holds it, where it is in use or another shard's; OSError."""
        self.disk = LocalDisk(path)
        self._path, self._shard = path, shard
        self._file = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._claim(patience_s)
        except BaseException:
            self.close()
            raise

    def _claim(self, patience_s: float) -> None:
        locked = _locked(self._file, patience_s)
        owner = _owner(self._file)
        if not locked:
            raise BadRequestError(
                f"state folder {self._path} is in use by a running shard ({owner or 'just starting'}); stop that one, or "
                "give every shard a folder of its own"
            )
        if owner and owner != self._shard:
            raise BadRequestError(
                f"state folder {self._path} is of shard {owner}, not of {self._shard}; start it under that name, or give this "
                "one a folder of its own"
            )
        if not owner:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{self._shard}\n".encode(), 0)
            os.fsync(self._file)

    def close(self) -> None:
        """Lets the next process have it."""
        os.close(self._file)


def owner_of(path: Path) -> str:
    """The shard whose state is in the folder; "" where it is nobody's yet."""
    try:
        file = os.open(path / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return ""
    try:
        return _owner(file)
    finally:
        os.close(file)


def _locked(file: int, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        else:
            return True


def _owner(file: int) -> str:
    """Name in the file; none where it was never written whole."""
    name, newline, _ = os.pread(file, _MOST_NAME_BYTES, 0).decode(errors="replace").partition("\n")
    return name if newline else ""
