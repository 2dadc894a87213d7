"""Requests checked against themselves, before the shard is asked: numbers within bounds, nothing named twice."""

from __future__ import annotations

from collections.abc import Sequence

from engrid.rpc.errors import BadRequestError
from engrid.shard.core.machine import MAX_NAME_BYTES
from engrid.tables import check_learning_rate
from engrid.v1 import memory_pb2 as pb

MOST_WORKERS = 1 << 16
MOST_TABLES = 1 << 14
MOST_COUNT = 1 << 48
"""Of steps, attempts and pushes: each may be counted up from without leaving 64 bits, and JSON keeps it."""


def check_count(what: str, value: int, low: int = 0) -> None:
    """Raises BadRequestError unless it is from `low` to MOST_COUNT."""
    if not low <= value <= MOST_COUNT:
        raise BadRequestError(f"{what} is {value}; give a number from {low} to {MOST_COUNT}")


def check_tables(tables: Sequence[str]) -> None:
    """Raises BadRequestError for none, or for more than a shard has."""
    if not 0 < len(tables) <= MOST_TABLES:
        raise BadRequestError(f"the request names {len(tables)} tables; give 1 to {MOST_TABLES}")


def check_begin_run(attempt: int, workers: int, tables: Sequence[str]) -> None:
    """Raises BadRequestError; what the numbers mean is the state machine's to say."""
    check_tables(tables)
    check_count("attempt", attempt, 1)
    if workers > MOST_WORKERS:
        raise BadRequestError(f"a run of {workers} workers; give {MOST_WORKERS} at most")


def check_push(request: pb.PushRequest) -> None:
    """Raises BadRequestError, naming the part."""
    try:
        check_learning_rate(request.learning_rate)
    except ValueError as error:
        raise BadRequestError(f"push of step {request.step}: {error}; nothing was applied") from error
    check_count("step", request.step, 1)
    if not request.partitions:
        raise BadRequestError(f"push of step {request.step} names no partition")
    seen: set[tuple[str, int]] = set()
    for part in request.partitions:
        where = f"{part.table}[{part.partition}]"
        if (part.table, part.partition) in seen:
            raise BadRequestError(f"push of step {request.step} names {where} twice; send one part for each partition")
        seen.add((part.table, part.partition))
        check_count(f"seq of {where}", part.seq, 1)


def check_chunk(first: pb.LoadChunk, chunk: pb.LoadChunk) -> None:
    """Raises BadRequestError if a later chunk of a load names something else than its first."""
    given = (chunk.table, chunk.partition, chunk.step, chunk.run, chunk.attempt)
    begun = (first.table, first.partition, first.step, first.run, first.attempt)
    if given not in (begun, ("", 0, 0, "", 0)):
        raise BadRequestError(
            f"load of {first.table}[{first.partition}]: a later chunk names {chunk.table}[{chunk.partition}]"
        )


def check_load(first: pb.LoadChunk) -> None:
    """Raises BadRequestError."""
    check_count("step", first.step)
    check_count("attempt", first.attempt)
    if len(first.run.encode()) > MAX_NAME_BYTES:
        raise BadRequestError(f"the name of the run has {len(first.run.encode())} bytes; give {MAX_NAME_BYTES} at most")


def check_wait(seconds: float) -> float:
    """The same seconds. Raises BadRequestError for what is no time from now on."""
    if not seconds >= 0:
        raise BadRequestError(f"wait is {seconds}; give seconds from 0")
    return seconds
