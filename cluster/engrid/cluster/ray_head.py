"""A Ray of our own on this machine: one head, started as a daemon, stopped with all that it started.

It takes a token of its own: other users of the machine can reach its ports and could otherwise run code as us, and a
token this user made for another Ray would lock us out of ours.

    /tmp/engrid-ray-XXXXXXXX/    for this user alone; Ray lets everybody write to what it makes, so that lies deeper
        token  head.log
        empty/                   where the head and all it starts run, so that no module of the user's is taken for another
        ray/                     Ray's sockets and logs
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from engrid.directory import process_lives

from .config import COMPUTE_RESOURCE, MEMORY_RESOURCE, ClusterError
from .environment import child_environment

OBJECT_STORE_BYTES = 80_000_000
"""Near the least Ray takes: rows never go through the object store."""
TOKEN_FILE = "token"  # noqa: S105 - a file name
STOP_SECONDS = 20.0
RAY_SETTINGS = {
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # a head that is told to stop would wait 30 s for detached actors
    "RAY_worker_niceness": "0",  # actors would run at nice 15, and whatever else the machine does would starve them
}
STARTED = "This command will now block"
"""What the head says once all of it runs."""
MARK = "ENGRID_RAY_TEMP"
"""In the environment of the head and all it starts: how we tell our Ray's processes from another's."""


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def new_temp() -> str:
    """A folder of this user's for all of our Ray's files, its path short enough for a Unix socket's."""
    return tempfile.mkdtemp(prefix="engrid-ray-", dir="/tmp")


def check_temp(temp: str) -> None:
    """Raises ClusterError where others could put a token of theirs in place of ours."""
    about = os.lstat(temp)
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise ClusterError(f"{temp}, the folder of our Ray, is another's or lets others in; remove it and start again")


def use_token(temp: str) -> dict[str, str]:
    """What a process needs in its environment to talk to the Ray of this folder. Older Rays know no tokens."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(Path(temp, TOKEN_FILE))}


def ray_environment(temp: str | None) -> dict[str, str]:
    """For a process that talks to the Ray of this folder; None: to one that we join, which the shell may know how to."""
    if temp is None:
        return child_environment(os.environ, keep_ray=True)
    return {**child_environment(os.environ, keep_ray=False), **use_token(temp)}


def start_head(temp: str, port: int, *, memory_mib: int, workers: int) -> int:
    """Starts the head in a session of its own and returns its pid at once; `wait_for_head` waits."""
    command = [
        *(sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *("--port", str(port), "--node-ip-address", "127.0.0.1", "--temp-dir", str(Path(temp, "ray"))),
        *("--include-dashboard=false", "--disable-usage-stats", "--ray-client-server-port", str(free_port())),
        *("--object-store-memory", str(OBJECT_STORE_BYTES)),
        *("--resources", json.dumps({MEMORY_RESOURCE: memory_mib, COMPUTE_RESOURCE: workers})),
    ]
    token = os.open(Path(temp, TOKEN_FILE), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(token, "w", encoding="utf-8") as file:
        file.write(secrets.token_hex(32))
    Path(temp, "empty").mkdir()
    with Path(temp, "head.log").open("w", encoding="utf-8") as log:
        head = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=Path(temp, "empty"),
            env={**ray_environment(temp), **RAY_SETTINGS, MARK: temp},
        )
    return head.pid


def wait_for_head(temp: str, pid: int, port: int, deadline: float) -> None:
    """Returns once the head takes connections; raises ClusterError where it ends or is late."""
    while time.monotonic() < deadline:
        if not is_alive(pid):
            raise ClusterError(f"Ray ended while starting; its log ends: {log_tail(temp)}")
        with socket.socket() as probe:
            probe.settimeout(0.2)
            if probe.connect_ex(("127.0.0.1", port)) == 0 and STARTED in log_tail(temp):
                check_temp(temp)
                return
        time.sleep(0.1)
    raise ClusterError(f"Ray did not start in time; its log ends: {log_tail(temp)}")


def log_tail(temp: str) -> str:
    """The last lines of the head's log."""
    log = Path(temp, "head.log")
    return " ".join(log.read_text(encoding="utf-8", errors="replace").split()[-60:]) if log.exists() else "(no log)"


def stop_head(pid: int | None, temp: str) -> None:
    """Stops the head, its process group, and whatever else carries its folder in its command line."""
    if pid is not None and pid in processes_with(temp):
        _signal(pid, signal.SIGTERM)
        _wait_until_gone(lambda: is_alive(pid), STOP_SECONDS)
        _signal_group(pid, signal.SIGKILL)
    _wait_until_gone(lambda: bool(processes_with(temp)), 3.0)
    for left in processes_with(temp):
        _signal(left, signal.SIGKILL)
    _wait_until_gone(lambda: bool(processes_with(temp)), 3.0)
    if not processes_with(temp):
        shutil.rmtree(temp, ignore_errors=True)


def processes_with(temp: str) -> set[int]:
    """Pids of the living processes that carry our mark: the head and all it has started, actors too."""
    mark = f"{MARK}={temp}\0".encode()
    return {
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and mark in _read(entry / "environ") + b"\0" and is_alive(int(entry.name))
    }


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that waits to be reaped does not. Reaps our own child."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return process_lives(pid)


def _read(path: Path) -> bytes:
    """Empty for a process that has ended, or that is another user's."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def _wait_until_gone(there: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while there() and time.monotonic() < until:
        time.sleep(0.05)
