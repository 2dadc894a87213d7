"""A process that is Ray's driver for a command: it connects, asks for what it is told on stdin, and answers on stdout.

Ray reads its environment when it is imported, puts the working folder on its workers' path, prints what it likes, takes
over SIGTERM, and tries for minutes to reach a Ray that is not there. In a process of its own none of that is the
command's: `ray_calls.py` starts it in an empty folder, keeps its words, and ends it at its deadline.

    request   {"do": NAME, ...}             one line of JSON each way, the next only after the answer
    answer    {"done": ...} or {"error": TEXT}
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from .config import COMPUTE_RESOURCE, MEMORY_RESOURCE

MIB = 1 << 20


def main() -> None:
    """Serves requests until stdin is closed, at whatever point that is."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what Ray's libraries print is no answer
    requests = _Requests()
    import ray

    calls: dict[str, Callable[..., Any]] = {
        "imported": lambda _: None,
        "connect": _connect,
        "offers": _offers,
        "start": _start,
        "stop": _stop,
    }
    for request in requests:
        try:
            answer = {"done": calls[request.pop("do")](ray, **request)}
        except Exception as error:  # noqa: BLE001 - the command raises it
            answer = {"error": _plain(error)}
        _say(answers, answer)


class _Requests:
    """Lines of stdin, read in a thread so that its end is seen while Ray hangs."""

    def __init__(self) -> None:
        self._ready = threading.Semaphore(0)
        self._lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            self._lines.append(line)
            self._ready.release()
        os._exit(0)  # the command has ended, or has done with us

    def __iter__(self) -> _Requests:
        return self

    def __next__(self) -> dict[str, Any]:
        self._ready.acquire()
        return dict(json.loads(self._lines.pop(0)))


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _plain(error: Exception) -> str:
    """The last line: before it Ray puts a stack of the actor's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _connect(ray: Any, address: str, namespace: str) -> None:
    ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level=logging.ERROR)


def _offers(ray: Any) -> dict[str, Any]:
    """What the nodes have, and what of it nobody has taken."""
    keys = ("Alive", "NodeManagerAddress", "NodeID", "Resources")
    return {
        "nodes": [{key: node[key] for key in keys} for node in ray.nodes()],
        "available": dict(ray.available_resources()),
    }


def _start(
    ray: Any,
    shards: list[str],
    workers: list[str],
    directory: str,
    state: str,
    memory_mib: int,
    checkpoints: list[str],
    host: str | None,
    timeout: float,
) -> dict[str, str]:
    """Asks for all actors, then waits for each; returns their addresses by name."""
    from .actors import ComputeActor, ShardActor

    actors = {
        name: _options(ray, ShardActor, name, {MEMORY_RESOURCE: memory_mib}).remote(
            name, directory, state, memory_mib * MIB, host, checkpoints
        )
        for name in shards
    }
    gpu = 1 if ray.available_resources().get("GPU", 0) >= len(workers) else 0
    for name in workers:
        options = _options(ray, ComputeActor, name, {COMPUTE_RESOURCE: 1}, gpus=gpu)
        actors[name] = options.remote(name, directory, host)
    asked = {name: actor.address.remote() for name, actor in actors.items()}
    deadline, found = time.monotonic() + timeout, {}
    for name, reply in asked.items():
        try:
            found[name] = str(ray.get(reply, timeout=max(0.1, deadline - time.monotonic())))
        except ray.exceptions.GetTimeoutError as error:
            raise RuntimeError(
                f"{name} did not start within {timeout:.0f} s; is there a node with room for it?"
            ) from error
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"{name} did not start: {_plain(error)}") from error
    return found


def _options(ray: Any, kind: type, name: str, resources: dict[str, float], gpus: int = 0) -> Any:
    return ray.remote(kind).options(
        name=name,
        lifetime="detached",
        max_restarts=0,
        num_cpus=0,
        num_gpus=gpus,
        resources=resources,
        max_concurrency=4,
    )


def _stop(ray: Any, actors: list[str], keep_rows: bool, timeout: float) -> None:  # noqa: FBT001 - by name, from JSON
    """Lets each actor close, as far as it does in time, and ends it."""
    stopping = []
    for name in actors:
        try:
            actor = ray.get_actor(name)
        except ValueError:
            continue
        stopping.append((actor, actor.stop.remote(keep_rows)))
    if stopping:
        ray.wait([stop for _, stop in stopping], num_returns=len(stopping), timeout=timeout)
    for actor, _ in stopping:
        ray.kill(actor)


if __name__ == "__main__":
    main()
