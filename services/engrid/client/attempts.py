"""Attempts of a training run: each belongs to whoever began it, and to nobody else.

What a worker counts (the seqs of its pushes) is worth something only together with what the shards counted of the same
worker. A process that is started again counts from 1, so it has to begin an attempt of its own: the shards keep the
token that an attempt was begun with, through restarts too, and refuse any other.

    attempt = claim_attempt(memory, "r", ["t"])       once, by one process; it is plain data and can be sent to the others
    run = TrainingRun(memory, run="r", tables=["t"], attempt=attempt, worker=rank, workers=2)
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import grpc

from engrid.rpc.errors import BadRequestError, FencedError, RunMismatchError
from engrid.v1 import memory_pb2 as pb

from .apart import Calls, apart
from .arrays import as_integer, check_text
from .asking import ask_all, worst
from .client import MemoryClient

CLAIM_TRIES = 64
"""How often the next number is tried where others claim at the same time."""
MOST_WORKERS = 2**32 - 1


@dataclass(frozen=True)
class Attempt:
    """One start of a run, as all its workers know it."""

    run: str
    number: int
    """Counts the starts of the run, from 1."""
    token: str
    """Drawn by whoever began it."""

    def __post_init__(self) -> None:
        check_text("run", self.run)
        if not self.run:
            raise BadRequestError("run '': give the name of the run")
        number = as_integer(self.number)
        if number is None or not 1 <= number < 2**63:
            raise BadRequestError(f"attempt {self.number!r} of run {self.run}: attempts are counted from 1")
        object.__setattr__(self, "number", number)
        if not isinstance(self.token, str) or not self.token:
            raise BadRequestError(f"attempt {self.number} of run {self.run} has no token; get one by claim_attempt")


def claim_attempt(client: MemoryClient, run: str, tables: Sequence[str]) -> Attempt:
    """The next attempt of a run, which from now on nobody else can begin; older ones are fenced.

    One process claims it and gives it to all workers, who begin it each with its own rank. Raises BadRequestError and
    UnknownTableError for tables that cannot be trained, FencedError where others claim faster than we do.
    """
    attempt, _ = claim(client, run, tables, workers=0)
    return attempt


def claim(client: MemoryClient, run: str, tables: Sequence[str], *, workers: int) -> tuple[Attempt, int]:
    """As claim_attempt, begun for so many workers at once; and the step the tables stand at."""
    tables = check_tables(client, tables)
    number, token = newest_attempt(client, run) + 1, uuid.uuid4().hex
    for _ in range(CLAIM_TRIES):
        attempt = Attempt(run, number, token)
        try:
            return attempt, begin(client, attempt, tables, workers=workers)
        except FencedError as taken:
            number = max(number, taken.attempt) + 1
    raise FencedError(f"others began {CLAIM_TRIES} attempts of run {run} while this one looked for the next; try again")


def begin(client: MemoryClient, attempt: Attempt, tables: Sequence[str], *, workers: int) -> int:
    """Begins an attempt on every shard that holds the tables; returns the step they stand at.

    One shard after the other, by name: of two who begin the same attempt one is refused by the first shard, so neither
    ends up with some of the shards. Raises FencedError, RunMismatchError.
    """
    request = pb.BeginRunRequest(
        run=attempt.run, attempt=attempt.number, workers=workers, tables=tables, token=attempt.token
    )
    steps = set()
    deadline = time.monotonic() + client.config.push_timeout
    for shard in sorted(holders(client, tables)):
        answers = ask_all(client, lambda stub: stub.BeginRun, {shard: request}, deadline)
        if answers.errors:
            raise worst(list(answers.errors.values()))
        steps.add(answers.replies[shard].step)
    if len(steps) > 1:
        raise RunMismatchError(f"the shards stand at different steps {sorted(steps)}; load a checkpoint first")
    return int(steps.pop())


def newest_attempt(client: MemoryClient, run: str) -> int:
    """The newest attempt of a run that any shard has seen; 0 where none knows the run. Shards that are away know none."""
    client.connections.refresh()
    if not client.connections.epoch:
        return 0
    transports = [client.connections.transport(shard) for shard in client.connections.shards()]
    timeout = client.config.timeout

    def ask(calls: Calls) -> int:
        newest, request = 0, pb.DescribeRequest()
        for call in [calls.add(each.future(lambda stub: stub.Describe, request, timeout)) for each in transports]:
            with suppress(grpc.RpcError):
                newest = max([newest, *(state.attempt for state in call.result().partitions if state.run == run)])
        return newest

    return apart(ask)


def holders(client: MemoryClient, tables: Sequence[str]) -> set[str]:
    """All shards that hold partitions of the tables; raises UnknownTableError."""
    for table in tables:
        client.connections.table(table)
    partitions = client.placement.partitions
    return {part.primary for table in tables for part in partitions[table]}


def check_tables(client: MemoryClient, tables: Sequence[str]) -> list[str]:
    """Raises BadRequestError for none, or one named twice; UnknownTableError for one that is not there."""
    if isinstance(tables, str):
        raise BadRequestError(f"tables is {tables!r}; give a list of names")
    names = list(tables)
    if not names:
        raise BadRequestError("a run needs tables; name at least one")
    if twice := sorted({str(name) for name in names if names.count(name) > 1}):
        raise BadRequestError(f"table {', '.join(twice)} is named twice in the tables of the run")
    for name in names:
        client.connections.table(name)
    return names


def check_rank(worker: int, workers: int) -> tuple[int, int]:
    """The same; raises BadRequestError unless 0 <= worker < workers."""
    rank, of = as_integer(worker), as_integer(workers)
    for name, value, number in (("worker", worker, rank), ("workers", workers, of)):
        if number is None:
            raise BadRequestError(f"{name} is {value!r}; give a whole number")
    if rank is None or of is None or not 1 <= of <= MOST_WORKERS or not 0 <= rank < of:
        raise BadRequestError(f"worker {worker} of {workers}: workers are counted from 0 to workers - 1")
    return rank, of


def check_attempt(client: MemoryClient, attempt: Attempt | int, run: str) -> Attempt:
    """An attempt as given to a TrainingRun; raises BadRequestError where it is another run's.

    A bare number stands for an attempt that this client begins, and nobody else.
    """
    if isinstance(attempt, Attempt):
        if attempt.run != run:
            raise BadRequestError(f"attempt {attempt.number} is of run {attempt.run}, not of run {run}")
        return attempt
    return Attempt(run, attempt, client.identity)
