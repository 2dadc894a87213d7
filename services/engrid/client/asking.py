"""Calls to several shards at once: all are waited for, and those that are away are asked again.

Only for requests that may come twice. A shard that is started again is found within about 100 ms: gRPC waits no longer
between two tries to connect (rpc/channel.py), and neither do we.
"""

from __future__ import annotations

import _thread
import queue
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message

from engrid.rpc.errors import (
    CancelledError,
    DeadlineExceededError,
    EngridError,
    RequestError,
    ShardUnavailableError,
    WrongEpochError,
    from_rpc,
)
from engrid.rpc.forks import check_not_forked

from .client import MemoryClient
from .connections import Method

SHORTEST_PAUSE, LONGEST_PAUSE = 0.01, 0.05
"""Seconds before a shard that is away is asked again: twice as long each time."""
LOOK_SECONDS = 0.5
"""How often the directory is asked meanwhile whether the shard is back under another address."""


@dataclass
class Answers:
    """What came of asking."""

    replies: dict[str, Any] = field(default_factory=dict)
    """By shard."""
    errors: dict[str, EngridError] = field(default_factory=dict)
    """Of the shards that have not answered."""
    again: set[str] = field(default_factory=set)
    """Shards that were asked more than once: they may have taken what they had not answered."""


def ask_all(
    client: MemoryClient, method: Method, requests: Mapping[str, Message], deadline: float | None = None
) -> Answers:
    """Asks all shards at once and waits for all; those that are away again until the deadline, on time.monotonic()'s clock.

    deadline: None: `push_timeout` from now. Raises CancelledError once the client is closed.

    A thread of its own calls gRPC: Ctrl-C in the middle of that leaves gRPC's locks held, and the next call hangs. Here
    it ends the wait, and then no call goes on.
    """
    check_not_forked()
    if deadline is None:
        deadline = time.monotonic() + client.config.push_timeout
    asking = _Asking(client, method, requests, deadline)
    try:
        _thread.start_new_thread(
            asking.run, ()
        )  # in one piece, as threading's start is not; Ctrl-C may come right after it
        error = asking.done.get()
    except BaseException:
        asking.stopped = True
        _thread.start_new_thread(asking.stop, ())
        raise
    if error is not None:
        raise error
    answers = asking.answers
    answers.errors = {shard: client.connections.advised(error) for shard, error in answers.errors.items()}
    return answers


class _Asking:
    """One `ask_all`, in its thread."""

    def __init__(self, client: MemoryClient, method: Method, requests: Mapping[str, Message], deadline: float) -> None:
        self.answers = Answers()
        self.done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self.stopped = False
        self._client, self._method, self._requests, self._deadline = client, method, requests, deadline
        self._calls: dict[str, Any] = {}

    def run(self) -> None:
        try:
            self._ask()
        except BaseException as error:  # noqa: BLE001 - raised to whoever waits
            self.done.put(error)
        else:
            self.done.put(None)

    def stop(self) -> None:
        for call in list(self._calls.values()):
            call.cancel()

    def _ask(self) -> None:
        connections, answers, deadline = self._client.connections, self.answers, self._deadline
        asked, pause, looked = list(self._requests), SHORTEST_PAUSE, 0.0
        while asked and not self.stopped:
            before, answers.errors = answers.errors, {}
            addresses = self._ask_once(asked)
            for shard, error in answers.errors.items():
                if isinstance(error, DeadlineExceededError):  # why it was away says more
                    answers.errors[shard] = before.get(shard, error)
            if not answers.errors or time.monotonic() >= deadline:
                return
            if time.monotonic() - looked > LOOK_SECONDS:
                connections.refresh(deadline)
                looked = time.monotonic()
            moved = {shard for shard in answers.errors if connections.address(shard) != addresses[shard]}
            if not all(_is_away(error, moved=shard in moved) for shard, error in answers.errors.items()):
                return
            asked = list(answers.errors)
            answers.again.update(asked)
            # One that is there and cannot serve (a disk that failed) answers at once, every time.
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _ask_once(self, asked: Sequence[str]) -> dict[str, str]:
        """Returns the addresses that were asked."""
        transports = {shard: self._client.connections.transport(shard) for shard in asked}
        timeout = max(0.0, self._deadline - time.monotonic())
        self._calls = {}
        for shard, transport in transports.items():
            self._calls[shard] = transport.future(self._method, self._requests[shard], timeout)
            if self.stopped:
                self.stop()
        for shard, call in self._calls.items():
            try:
                self.answers.replies[shard] = call.result()
            except (grpc.RpcError, grpc.FutureCancelledError) as error:
                self.answers.errors[shard] = _error_of(error, transports[shard].peer)
        return {shard: transport.address for shard, transport in transports.items()}


def _is_away(error: EngridError, *, moved: bool) -> bool:
    """moved: it has another address now; who answered at the old one may be another shard."""
    return isinstance(error, ShardUnavailableError) or (moved and isinstance(error, WrongEpochError))


def _error_of(error: grpc.RpcError | grpc.FutureCancelledError, peer: str) -> EngridError:
    """Nobody cancels such a call but a connection that is closed, as one to a shard that is now elsewhere."""
    if isinstance(error, grpc.FutureCancelledError):
        return ShardUnavailableError(f"{peer}: the connection was closed")
    found = from_rpc(error, peer)
    return ShardUnavailableError(str(found)) if isinstance(found, CancelledError) else found


def worst(errors: Sequence[EngridError]) -> EngridError:
    """The error to raise of several: a refusal says more than an outage."""
    refusals: list[EngridError] = [error for error in errors if isinstance(error, RequestError)]
    return (refusals or list(errors))[0]
