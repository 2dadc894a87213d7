"""Every error Engrid raises across a process boundary, and its one place in gRPC.

    EngridError
    ├── RequestError              the request is wrong; the same request fails again
    │   ├── BadRequestError
    │   ├── UnknownTableError
    │   ├── RowOutOfRangeError
    │   ├── RowWidthMismatchError
    │   ├── RequestTooLargeError
    │   ├── NotFiniteError
    │   └── ReadOnlyTableError
    ├── StaleError                the sender's view of the store is old or ahead; refresh, then decide
    │   ├── WrongEpochError
    │   ├── StepNotReachedError
    │   ├── ExpectedError
    │   ├── FencedError
    │   ├── RunMismatchError
    │   └── PinnedError
    └── UnavailableError          the request may be right; the store did not answer it
        ├── ShardUnavailableError
        ├── DeadlineExceededError
        ├── CancelledError
        ├── OutOfMemoryError
        ├── DiskFullError
        └── InternalError

`TABLE` maps each class to the code that travels in `engrid.v1.Error` and to the gRPC status of a unary call.
On a stream an error is a frame. Of a unary call the status holds the text, and an `Error` without text rides in the trailing
metadata: that is small, so the class arrives whatever the text. gRPC drops metadata over 8 KiB, the percent-encoded text
included, and shows another error in its place; so a text is cut to `MOST_TEXT` bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn, cast

import grpc
from google.protobuf.message import DecodeError

from engrid.v1 import memory_pb2 as pb

TRAILER = "engrid-error-bin"
MOST_TEXT = 2048
"""Bytes of an error's text that travel; each may take three as gRPC encodes it."""


class EngridError(Exception):
    """Base of every error of the service. The message names the thing and what to do."""


class RequestError(EngridError):
    """The request itself is wrong; sending it again gives the same answer."""


class BadRequestError(RequestError):
    """A field has the wrong type, shape or value. Correct the call."""


class UnknownTableError(RequestError):
    """No such table in the newest placement. Create it, or correct the name."""


class RowOutOfRangeError(RequestError):
    """A row id lies outside its table. Check the EngramSpec the ids were hashed with."""


class RowWidthMismatchError(RequestError):
    """Rows or gradients are not as wide as the table's. Check the row format and width."""


class RequestTooLargeError(RequestError):
    """The message or its reply would pass the limit. Send smaller batches."""


class NotFiniteError(RequestError):
    """A gradient holds NaN or Inf; the step was applied nowhere. Skip the batch or lower the learning rate."""


class ReadOnlyTableError(RequestError):
    """The table's row format or optimizer takes no pushes."""


class StaleError(EngridError):
    """The sender and the shard do not agree on where the store is."""


class WrongEpochError(StaleError):
    """The shard does not own what was asked at the sender's epoch. Refresh the placement and route again."""

    def __init__(self, message: str, *, epoch: int = 0) -> None:
        super().__init__(message)
        self.epoch = epoch


class StepNotReachedError(StaleError):
    """The step a lookup needs was not applied within its deadline. Some worker has not pushed it."""

    def __init__(self, message: str, *, expected: int = 0) -> None:
        super().__init__(message)
        self.expected = expected


class ExpectedError(StaleError):
    """A push skipped a sequence number or step; `expected` is the one the partition waits for."""

    def __init__(self, message: str, *, expected: int = 0) -> None:
        super().__init__(message)
        self.expected = expected


class FencedError(StaleError):
    """A newer attempt of the run has begun, or another process holds this one. This process must stop training."""

    def __init__(self, message: str, *, attempt: int = 0) -> None:
        super().__init__(message)
        self.attempt = attempt


class RunMismatchError(StaleError):
    """The partition takes pushes of another run, or of none yet. Begin the run first."""


class PinnedError(StaleError):
    """A sealed table that would be dropped is being read. Try again once its readers have let go."""


class UnavailableError(EngridError):
    """No answer could be had."""


class ShardUnavailableError(UnavailableError):
    """The shard cannot be reached or cannot serve these rows now. The message names shard and address."""


class DeadlineExceededError(UnavailableError):
    """The time given ran out. Give more, or look at the shard named."""


class CancelledError(UnavailableError):
    """The caller cancelled the request."""


class OutOfMemoryError(UnavailableError):
    """The shards do not have the bytes asked for. Nothing was allocated."""


class DiskFullError(UnavailableError):
    """The shard's disk has no room for what would have to be kept; nothing was taken, and reads go on. Make room
    there, then send it again."""


class InternalError(UnavailableError):
    """The peer failed in a way that it has no name for: a fault of ours. Its log says how."""


@dataclass(frozen=True)
class Row:
    """One line of the table: an exception, its code in frames, its status in unary calls."""

    error: type[EngridError]
    code: pb.ErrorCode
    status: grpc.StatusCode


TABLE: tuple[Row, ...] = (
    Row(BadRequestError, pb.BAD_REQUEST, grpc.StatusCode.INVALID_ARGUMENT),
    Row(UnknownTableError, pb.UNKNOWN_TABLE, grpc.StatusCode.NOT_FOUND),
    Row(RowOutOfRangeError, pb.ROW_OUT_OF_RANGE, grpc.StatusCode.OUT_OF_RANGE),
    Row(RowWidthMismatchError, pb.ROW_WIDTH_MISMATCH, grpc.StatusCode.INVALID_ARGUMENT),
    Row(RequestTooLargeError, pb.REQUEST_TOO_LARGE, grpc.StatusCode.RESOURCE_EXHAUSTED),
    Row(NotFiniteError, pb.NOT_FINITE, grpc.StatusCode.INVALID_ARGUMENT),
    Row(ReadOnlyTableError, pb.READ_ONLY_TABLE, grpc.StatusCode.FAILED_PRECONDITION),
    Row(WrongEpochError, pb.WRONG_EPOCH, grpc.StatusCode.FAILED_PRECONDITION),
    Row(StepNotReachedError, pb.STEP_NOT_REACHED, grpc.StatusCode.FAILED_PRECONDITION),
    Row(ExpectedError, pb.EXPECTED, grpc.StatusCode.FAILED_PRECONDITION),
    Row(FencedError, pb.FENCED, grpc.StatusCode.ABORTED),
    Row(RunMismatchError, pb.RUN_MISMATCH, grpc.StatusCode.FAILED_PRECONDITION),
    Row(PinnedError, pb.PINNED, grpc.StatusCode.FAILED_PRECONDITION),
    Row(ShardUnavailableError, pb.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE),
    Row(DeadlineExceededError, pb.DEADLINE_EXCEEDED, grpc.StatusCode.DEADLINE_EXCEEDED),
    Row(CancelledError, pb.CANCELLED, grpc.StatusCode.CANCELLED),
    Row(OutOfMemoryError, pb.OUT_OF_MEMORY, grpc.StatusCode.RESOURCE_EXHAUSTED),
    Row(DiskFullError, pb.DISK_FULL, grpc.StatusCode.RESOURCE_EXHAUSTED),
    Row(InternalError, pb.INTERNAL, grpc.StatusCode.INTERNAL),
)

_BY_ERROR = {row.error: row for row in TABLE}
_BY_CODE = {row.code: row for row in TABLE}
# What a bare status means when a peer (or gRPC itself) sent no Error message with it.
_BY_STATUS: dict[grpc.StatusCode, type[EngridError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: BadRequestError,
    grpc.StatusCode.NOT_FOUND: UnknownTableError,
    grpc.StatusCode.OUT_OF_RANGE: RowOutOfRangeError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: RequestTooLargeError,
    grpc.StatusCode.UNAVAILABLE: ShardUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.ABORTED: FencedError,
    grpc.StatusCode.INTERNAL: InternalError,
    grpc.StatusCode.UNKNOWN: InternalError,
}


def _row(error: EngridError) -> Row:
    """The row of the error's class, or of the nearest class above it that has one."""
    return next(_BY_ERROR[kind] for kind in type(error).__mro__ if kind in _BY_ERROR)


def bounded(text: str) -> str:
    """The text as it travels: what UTF-8 cannot say is escaped, and a long one has a count in place of its middle."""
    raw = text.encode("utf-8", "backslashreplace")
    if len(raw) <= MOST_TEXT:
        return raw.decode()
    half = (MOST_TEXT - len(f" ... {len(raw)} more bytes ... ")) // 2
    left, right = raw[:half].decode(errors="ignore"), raw[-half:].decode(errors="ignore")
    cut = len(raw) - len(left.encode()) - len(right.encode())
    return f"{left} ... {cut} more bytes ... {right}"


def to_message(error: EngridError) -> pb.Error:
    """The error as it travels, with the numbers its class carries."""
    message = pb.Error(code=_row(error).code, message=bounded(str(error)))
    if isinstance(error, WrongEpochError):
        message.epoch = _number(error.epoch)
    elif isinstance(error, StepNotReachedError | ExpectedError):
        message.expected = _number(error.expected)
    elif isinstance(error, FencedError):
        message.attempt = _number(error.attempt)
    return message


def _number(value: int) -> int:
    """As it fits the wire: an error about a number that does not is an error still."""
    return max(0, min(value, (1 << 64) - 1))


def from_message(message: pb.Error) -> EngridError:
    """The exception of a received error; a code of a newer peer becomes a bare EngridError."""
    row = _BY_CODE.get(message.code)
    if row is None:
        return EngridError(f"error code {message.code} of a newer peer: {message.message}")
    if row.error is WrongEpochError:
        return WrongEpochError(message.message, epoch=message.epoch)
    if row.error is StepNotReachedError:
        return StepNotReachedError(message.message, expected=message.expected)
    if row.error is ExpectedError:
        return ExpectedError(message.message, expected=message.expected)
    if row.error is FencedError:
        return FencedError(message.message, attempt=message.attempt)
    return row.error(message.message)


def abort(context: grpc.ServicerContext, error: EngridError) -> NoReturn:
    """Ends a call with the error's status and text, its class and numbers in the trailer."""
    message = to_message(error)
    text, message.message = message.message, ""
    context.set_trailing_metadata(((TRAILER, message.SerializeToString()),))
    context.abort(_row(error).status, text)


def from_rpc(error: grpc.RpcError, peer: str) -> EngridError:
    """The exception of a failed call to `peer` (shard name and address, for the message)."""
    for key, value in cast("Iterable[tuple[str, bytes]]", error.trailing_metadata() or ()):
        if key == TRAILER:
            try:
                message = pb.Error.FromString(value)
            except DecodeError:
                break  # whoever sent it is none of ours: the status is all there is
            message.message = message.message or error.details() or ""
            return from_message(message)
    kind = _BY_STATUS.get(error.code())
    text = f"{peer}: {error.details()}"
    return kind(text) if kind else EngridError(f"{text} ({error.code().name})")
