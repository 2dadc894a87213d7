"""Calls to several shards at once: all are waited for, and those that are away are asked again.

Only for requests that may come twice. A shard that is started again is found within about 100 ms: gRPC waits no longer
between two tries to connect (rpc/channel.py), and neither do we.
"""

from __future__ import annotations

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

from .apart import Calls, apart
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

    Ctrl-C ends the wait, and then no call goes on.
    """
    if deadline is None:
        deadline = time.monotonic() + client.config.push_timeout
    asking = _Asking(client, method, requests, deadline)
    answers = apart(asking.ask)
    answers.errors = {shard: client.connections.advised(error) for shard, error in answers.errors.items()}
    return answers


class _Asking:
    """One `ask_all`."""

    def __init__(self, client: MemoryClient, method: Method, requests: Mapping[str, Message], deadline: float) -> None:
        self._answers = Answers()
        self._client, self._method, self._requests, self._deadline = client, method, requests, deadline

    def ask(self, calls: Calls) -> Answers:
        connections, answers, deadline = self._client.connections, self._answers, self._deadline
        asked, pause, looked = list(self._requests), SHORTEST_PAUSE, 0.0
        while asked and not calls.stopped:
            before, answers.errors = answers.errors, {}
            addresses = self._ask_once(asked, calls)
            for shard, error in answers.errors.items():
                if isinstance(error, DeadlineExceededError):  # why it was away says more
                    answers.errors[shard] = before.get(shard, error)
            if not answers.errors or time.monotonic() >= deadline:
                break
            if time.monotonic() - looked > LOOK_SECONDS:
                connections.refresh(deadline)
                looked = time.monotonic()
            moved = {shard for shard in answers.errors if connections.address(shard) != addresses[shard]}
            if not all(_is_away(error, moved=shard in moved) for shard, error in answers.errors.items()):
                break
            asked = list(answers.errors)
            answers.again.update(asked)
            # One that is there and cannot serve (a disk that failed) answers at once, every time.
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(2 * pause, LONGEST_PAUSE)
        return answers

    def _ask_once(self, asked: Sequence[str], calls: Calls) -> dict[str, str]:
        """Returns the addresses that were asked."""
        transports = {shard: self._client.connections.transport(shard) for shard in asked}
        timeout = max(0.0, self._deadline - time.monotonic())
        begun = {}
        for shard, transport in transports.items():
            try:
                begun[shard] = calls.add(transport.future(self._method, self._requests[shard], timeout))
            except ShardUnavailableError as error:  # the connection was closed: asked again, it is another or none
                self._answers.errors[shard] = error
        for shard, call in begun.items():
            try:
                self._answers.replies[shard] = call.result()
            except (grpc.RpcError, grpc.FutureCancelledError) as error:
                self._answers.errors[shard] = _error_of(error, transports[shard].peer)
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
