"""What a command asks of a Ray, each call with its end: the driver is a process of its own, `ray_driver.py`."""

from __future__ import annotations

import json
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .config import ClusterError
from .extras import with_extra

CONNECT_SECONDS = 30.0
"""From when Ray is imported until it has connected; ours takes 2 to 5 on two busy cores."""
LISTEN_SECONDS = 5.0
"""For the other side to take a connection."""
CURRENT_RAY = Path("/tmp/ray/ray_current_cluster")  # noqa: S108 - where Ray notes the address of the last that started
START_SECONDS = 60.0
"""For the driver to import Ray: 2 on an idle machine."""


class RayCalls:
    """A driver that is connected."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._log = log
        self._requests: Any = process.stdin
        self._answers: Any = process.stdout

    def call(self, do: str, seconds: float, what: str, **request: Any) -> Any:
        """The answer to a request; raises ClusterError, saying `what` hangs, where none comes in time."""
        try:
            self._requests.write(json.dumps({"do": do, **request}) + "\n")
            self._requests.flush()
        except BrokenPipeError as error:
            raise ClusterError(f"{what}: {self._last_words()}") from error
        line = self._line(time.monotonic() + seconds, what, seconds)
        answer = json.loads(line)
        if "error" in answer:
            raise ClusterError(with_extra(answer["error"]))
        return answer["done"]

    def close(self) -> None:
        """Closes what the driver, which has ended, was spoken to through."""
        self._answers.close()
        with suppress(BrokenPipeError):  # what was not sent yet is for nobody now
            self._requests.close()

    def _line(self, deadline: float, what: str, seconds: float) -> str:
        with selectors.DefaultSelector() as ready:
            ready.register(self._answers, selectors.EVENT_READ)
            if not ready.select(max(0.0, deadline - time.monotonic())):
                raise ClusterError(f"{what}: no answer within {seconds:.0f} s")
        line = str(self._answers.readline())
        if not line:
            raise ClusterError(f"{what}: {self._last_words()}")
        return line

    def _last_words(self) -> str:
        """The end of what the driver printed."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n") if self._log.exists() else []
        said = [line.strip() for line in lines if line.strip()]
        return f"Ray's driver ended: {with_extra(said[-1][-500:])}" if said else "Ray's driver ended without a word"


@contextmanager
def connected(address: str, namespace: str, environment: Mapping[str, str], *, seconds: float) -> Iterator[RayCalls]:
    """A driver's connection to the Ray at `address` (host:port, or auto), ended with the block, whatever it is doing.

    Raises ClusterError where nothing there answers as a Ray within `seconds`.
    """
    check_listens(address, environment)
    with tempfile.TemporaryDirectory(prefix="engrid-driver-", ignore_cleanup_errors=True) as folder:
        log = Path(folder, "log")
        empty = Path(folder, "empty")  # Ray puts the driver's working folder on its workers' path
        empty.mkdir()
        with log.open("w", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "engrid.cluster.ray_driver"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                cwd=empty,
                env=dict(environment),
                start_new_session=True,
            )
        calls = RayCalls(process, log)
        try:
            _connect(calls, address, namespace, seconds)
            yield calls
        finally:
            process.kill()
            process.wait()
            calls.close()


def check_listens(address: str, environment: Mapping[str, str]) -> None:
    """Raises ClusterError at once where nothing listens; Ray would try for minutes. auto: at the Ray that it names."""
    found = environment.get("RAY_ADDRESS", "") if address == "auto" else address
    if not found and CURRENT_RAY.is_file():
        found = CURRENT_RAY.read_text(encoding="utf-8").strip()
    host, _, port = found.rpartition(":")
    if not port.isdigit():
        return  # a form that Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=LISTEN_SECONDS).close()
    except OSError as error:
        named = f"auto, which means {found}" if address == "auto" else address
        raise ClusterError(f"no Ray cluster answers at {named}: {error}") from error


def _connect(calls: RayCalls, address: str, namespace: str, seconds: float) -> None:
    try:
        calls.call("imported", min(seconds, START_SECONDS), "importing Ray")
        calls.call("connect", min(seconds, CONNECT_SECONDS), "connecting", address=address, namespace=namespace)
    except ClusterError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address}: {error}. Start one with: ray start --head, or leave out --address; if it "
            "takes a token, set RAY_AUTH_MODE=token"
        ) from error
