"""What every call goes through before and after its handler, on whatever server of ours it arrives.

    message as bytes -> small enough? -> parsed -> does the caller still want it? -> handler -> reply, or a typed error

gRPC would parse first and would call the handler of a request that waited for a thread until its caller had given up; and
what a handler raises by mistake it reports as UNKNOWN. Each handler is registered as one of a stream of bytes, which is the
same on the wire, so that a client which opens a call and sends nothing is seen here and not by gRPC alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from .errors import (
    BadRequestError,
    CancelledError,
    DeadlineExceededError,
    EngridError,
    InternalError,
    OutOfMemoryError,
    RequestTooLargeError,
    abort,
    bounded,
)
from .stalls import Flow, StallWatch

Check = Callable[[bytes], None]
"""Raises EngridError where a message as it came should not even be parsed."""

SMALL_REQUEST_BYTES = 1 << 20
"""A request of any method that carries no rows, gradients or placement."""

MOST_SECONDS = 86_400.0
"""Of a call without a deadline."""

_log = logging.getLogger(__name__)


def at_most(size: int, what: str = "the request") -> Check:
    """Refuses messages of more bytes."""

    def check(raw: bytes) -> None:
        if len(raw) > size:
            raise RequestTooLargeError(f"{what} has {len(raw)} bytes, over the limit of {size}; send less at a time")

    return check


def deadline_of(context: grpc.ServicerContext) -> float:
    """When the caller gives up, on time.monotonic()'s clock; where it never does, in a day."""
    remaining = context.time_remaining()
    return time.monotonic() + (MOST_SECONDS if remaining is None else min(remaining, MOST_SECONDS))


def check_wanted(context: grpc.ServicerContext) -> None:
    """Raises where the caller has given up: what it asked for must not be carried out any more."""
    if deadline_of(context) <= time.monotonic():
        raise DeadlineExceededError("the caller's time was over before the request was carried out; nothing was done")
    if not context.is_active():
        raise CancelledError("the caller gave up before the request was carried out; nothing was done")


class _Context:
    """The call's context as handlers see it: a text they end the call with is bounded."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context = context
        self.ended = False
        """The handler has ended the call itself."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        self.ended = True
        self._context.abort(code, bounded(details))


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a server asks of its calls."""

    checks: Mapping[str, Check]
    """Of messages before they are parsed, by method; those of others may have SMALL_REQUEST_BYTES."""
    patient: frozenset[str]
    """Methods whose clients may be silent between messages for as long as they like."""
    watch: StallWatch
    failed: Callable[[], object]
    """Called for each call that ends with an error."""


class Handled:
    """One method: makes of its registered handler one that takes and gives bytes, watched and checked."""

    def __init__(self, path: str, handler: Any, rules: Rules, *, patience: float) -> None:
        """path: /SERVICE/METHOD. handler: as generated code registers it. patience: seconds to wait for the client."""
        name = path.rpartition("/")[2]
        self._path, self._handler, self._rules, self._patience = path, handler, rules, patience
        self._patient = name in rules.patient
        self._check = rules.checks.get(name) or at_most(SMALL_REQUEST_BYTES)
        self._parse = handler.request_deserializer or bytes
        behaviors = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
        self._behavior: Callable[..., Any] = next(each for each in behaviors if each is not None)

    def over(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
        """The handler to register; `wrap` is applied to its behavior."""
        if self._handler.response_streaming:
            behavior = wrap(self._replies)
            return grpc.stream_stream_rpc_method_handler(behavior, None, self._handler.response_serializer)
        behavior = wrap(self._reply)
        return grpc.stream_unary_rpc_method_handler(behavior, None, self._handler.response_serializer)

    def _reply(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Any:
        with self._guarded(context) as (flow, seen):
            return self._behavior(self._request(messages, context, flow), seen)

    def _replies(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
        with self._guarded(context) as (flow, seen):
            for reply in self._behavior(self._request(messages, context, flow), seen):
                flow.waits()
                yield reply
                flow.goes_on()

    def _request(self, messages: Iterator[bytes], context: grpc.ServicerContext, flow: Flow) -> Any:
        incoming = messages if self._patient else flow.incoming(messages)
        if self._handler.request_streaming:
            check_wanted(context)
            return map(self._parsed, incoming)
        raw = next(incoming, None)
        if raw is None:
            raise BadRequestError(f"{self._path}: the call ended before its request came")
        request = self._parsed(raw)
        check_wanted(context)
        return request

    def _parsed(self, raw: bytes) -> Any:
        self._check(raw)
        try:
            return self._parse(raw)
        except DecodeError as error:
            raise BadRequestError(f"{self._path}: the request is damaged: {error}") from error

    @contextmanager
    def _guarded(self, context: grpc.ServicerContext) -> Iterator[tuple[Flow, _Context]]:
        seen = _Context(context)
        with self._rules.watch.over(context.cancel, self._patience) as flow:
            try:
                yield flow, seen
            except Exception as error:
                # There is nobody, or nothing left, to tell; a method left out says so itself.
                if seen.ended or not context.is_active() or isinstance(error, NotImplementedError):
                    raise
                self._rules.failed()
                abort(context, self._typed(error))

    def _typed(self, error: Exception) -> EngridError:
        if isinstance(error, EngridError):
            return error
        if isinstance(error, MemoryError):
            return OutOfMemoryError(f"{self._path}: no memory is left for it ({error or 'MemoryError'})")
        _log.error("%s failed", self._path, exc_info=error)
        return InternalError(f"{self._path} failed: {type(error).__name__}: {error}")
