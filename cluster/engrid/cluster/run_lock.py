"""One command at a time changes what runs in a run directory.

cluster.lock    flock'ed by `engrid up` and `engrid down` while they work, by whatever way they end; says which
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .config import ClusterError, make_run_dir

LOCK_FILE = "cluster.lock"


@contextmanager
def changing(run_dir: Path, command: str) -> Iterator[None]:
    """Held with the block; raises ClusterError, naming the process, while another holds it."""
    make_run_dir(run_dir)
    try:
        file = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ClusterError(
            f"run directory {run_dir} cannot be written: {error.strerror}; give another --run-dir"
        ) from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another command"
            raise ClusterError(
                f"{holder} is at work in {run_dir}; wait until it is done, or stop it with Ctrl-C or kill"
            ) from error
        os.ftruncate(file, 0)
        os.pwrite(file, f"{command} (process {os.getpid()})".encode(), 0)
        yield
        os.ftruncate(file, 0)
    finally:
        os.close(file)
