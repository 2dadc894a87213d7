"""A worker's side of training: one push per step to every partition, in two phases.

Every push is checked whole before anything leaves. It is then held by the shards, and only when all of them
have taken it does the worker commit: where one shard refuses, the step is applied nowhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message

from engrid.directory import Placement
from engrid.rpc.channel import MAX_MESSAGE_BYTES
from engrid.rpc.errors import (
    BadRequestError,
    DeadlineExceededError,
    EngridError,
    ExpectedError,
    NotFiniteError,
    ReadOnlyTableError,
    RequestError,
    RequestTooLargeError,
    RowOutOfRangeError,
    RowWidthMismatchError,
    RunMismatchError,
    ShardUnavailableError,
    from_rpc,
)
from engrid.rpc.frames import Floats, Ids, floats_to_bytes, ids_to_bytes
from engrid.tables import TableSpec, check_learning_rate, sum_duplicates
from engrid.v1 import memory_pb2 as pb
from engrid.v1 import memory_pb2_grpc

from .client import MemoryClient

MESSAGE_HEADROOM = 4096
"""Bytes of a push that are not rows, at most, per partition."""
SHORTEST_PAUSE, LONGEST_PAUSE = 0.01, 0.5
"""Seconds before a shard that is away is asked again: twice as long each time."""


class TrainingRun:
    """One worker's pushes of one attempt of a run. Not thread-safe."""

    def __init__(
        self,
        client: MemoryClient,
        *,
        run: str,
        attempt: int,
        worker: int,
        workers: int,
        tables: Sequence[str],
        durable: bool = False,
    ) -> None:
        """Opens the attempt on every shard that holds the tables; each worker does, in any order.

        durable: a push is acknowledged once it is on the shards' disks. `step` is the last step applied. Raises FencedError where a newer attempt has begun.
        """
        self._client = client
        self._run, self._attempt, self._worker = run, attempt, worker
        self._tables = list(tables)
        self._durable = durable
        self._seq: dict[tuple[str, int], int] = {}
        """The last that its shard took, per partition."""
        self._unsure: set[str] = set()
        """Shards that may have taken the seq after that, of a push that failed."""
        self._committing: tuple[int, dict[str, pb.PushRequest]] | None = None
        """A step whose commit was sent and not answered by every shard, and its pushes: some may have applied it."""
        request = pb.BeginRunRequest(run=run, attempt=attempt, workers=workers, tables=self._tables)
        replies = self._send(lambda stub: stub.BeginRun, dict.fromkeys(self._shards(), request))
        steps = {reply.step for reply in replies.values()}
        if len(steps) > 1:
            raise RunMismatchError(f"the shards stand at different steps {sorted(steps)}; load a checkpoint first")
        self.step: int = steps.pop()

    def push(
        self, gradients: Mapping[str, tuple[Ids, Floats]], *, step: int, learning_rate: float, hold: bool = True
    ) -> int:
        """Pushes this worker's gradients of a step: per table int64 row ids [n] and float32 [n, width].

        Duplicate ids are summed, -1 (dead) is left out; a table not named gets empty pushes. Returns the rows
        sent. Raises NotFiniteError and other RequestErrors before anything leaves, and whatever a shard
        answers; then the step is applied nowhere. A shard that is away is tried again for `push_timeout` seconds: what
        it took already it takes for a duplicate. Where that is not enough (UnavailableError), call again with the same
        gradients: whatever the shards have of the step by then, it is applied once.
        """
        _check_rate(learning_rate)
        summed = {table: self._checked(table, gradients.get(table)) for table in self._tables}
        placement = self._client.placement
        hold = hold and len(self._shards()) > 1  # one shard takes a push whole or not at all
        if not hold or self._committing is None or self._committing[0] != step:
            requests = self._requests(placement, summed, step, learning_rate, hold=hold)
            self._push(requests, hold=hold)
            self._committing = (step, requests)
        if hold:
            self._commit(*self._committing)
        self._committing = None
        return sum(len(ids) for ids, _ in summed.values())

    def _commit(self, step: int, requests: Mapping[str, pb.PushRequest]) -> None:
        """Commits on every shard what it has taken. One whose host lost power meanwhile has it no more: pushed once more."""
        epoch = next(request.epoch for request in requests.values())
        commit = pb.CommitRequest(
            run=self._run, attempt=self._attempt, worker=self._worker, step=step, durable=self._durable, epoch=epoch
        )
        try:
            self._send(lambda stub: stub.Commit, dict.fromkeys(requests, commit))
        except ExpectedError:
            self._send(lambda stub: stub.Push, requests)
            self._send(lambda stub: stub.Commit, dict.fromkeys(requests, commit))

    def _push(self, requests: Mapping[str, pb.PushRequest], *, hold: bool) -> None:
        """Returns once every shard has taken these very gradients.

        A shard that took a push of this step, of which another shard would hear nothing, still holds it. It is given
        the next seq, with which it lets go of the gradients it holds. Where it is unknown whether it took one, the same
        seq is sent first, and the next where that turns out to be a duplicate.
        """
        replies, errors = self._ask(lambda stub: stub.Push, requests)
        again: dict[str, pb.PushRequest] = {}
        for shard, reply in replies.items():
            if hold or not errors:
                self._took(requests[shard])
            if hold and shard in self._unsure and pb.DUPLICATE in reply.outcomes:
                again[shard] = requests[shard]
                for part in again[shard].partitions:
                    part.seq += 1
        if not errors and again:
            replies, errors = self._ask(lambda stub: stub.Push, again)
            for shard in replies:
                self._took(again[shard])
        self._unsure = set(errors)
        if errors:
            raise _worst(list(errors.values()))

    def _took(self, request: pb.PushRequest) -> None:
        for part in request.partitions:
            self._seq[part.table, part.partition] = part.seq

    def _checked(self, table: str, given: tuple[Ids, Floats] | None) -> tuple[Ids, Floats]:
        spec, _ = self._client.connections.table(table)
        if given is None:
            return np.empty(0, np.int64), np.empty((0, spec.width), np.float32)
        ids, values = given
        _check_arrays(spec, ids, values)
        summed = sum_duplicates(ids, values)
        if len(summed[0]) < len(ids) and not np.isfinite(summed[1]).all():
            raise NotFiniteError(
                f"table {table}: a gradient overflowed when duplicate rows were summed; nothing was sent"
            )
        return summed

    def _requests(
        self,
        placement: Placement,
        summed: Mapping[str, tuple[Ids, Floats]],
        step: int,
        learning_rate: float,
        *,
        hold: bool,
    ) -> dict[str, pb.PushRequest]:
        requests: dict[str, pb.PushRequest] = {}
        for table, (ids, values) in summed.items():
            for part in placement.partitions[table]:
                request = requests.setdefault(
                    part.shards[0],
                    pb.PushRequest(
                        run=self._run,
                        attempt=self._attempt,
                        worker=self._worker,
                        step=step,
                        learning_rate=learning_rate,
                        epoch=placement.epoch,
                        hold=hold,
                        durable=self._durable and not hold,
                    ),
                )
                low, high = np.searchsorted(ids, [part.start, part.stop])
                request.partitions.add(
                    table=table,
                    partition=part.index,
                    seq=self._seq.get((table, part.index), 0) + 1,
                    row_ids=ids_to_bytes(ids[low:high]),
                    gradients=floats_to_bytes(values[low:high]),
                )
        for shard, request in requests.items():
            if (size := request.ByteSize()) > MAX_MESSAGE_BYTES - MESSAGE_HEADROOM:
                raise RequestTooLargeError(
                    f"the push to shard {shard} is {size} bytes, over the limit of {MAX_MESSAGE_BYTES}; use smaller "
                    "batches or more shards. Nothing was sent"
                )
        return requests

    def _shards(self) -> set[str]:
        """All that hold partitions of the tables."""
        for table in self._tables:
            self._client.connections.table(table)
        partitions = self._client.placement.partitions
        return {part.primary for table in self._tables for part in partitions[table]}

    def _send(
        self, method: Callable[[memory_pb2_grpc.MemoryServiceStub], Any], requests: Mapping[str, Message]
    ) -> dict[str, Any]:
        """As `_ask`, but raises the worst error once every call has ended."""
        replies, errors = self._ask(method, requests)
        if errors:
            raise _worst(list(errors.values()))
        return replies

    def _ask(
        self, method: Callable[[memory_pb2_grpc.MemoryServiceStub], Any], requests: Mapping[str, Message]
    ) -> tuple[dict[str, Any], dict[str, EngridError]]:
        """Calls all shards at once and waits for all: what they answered, and why the others did not.

        Shards that are away are asked again until `push_timeout` is over: every request here may come twice.
        """
        deadline = time.monotonic() + self._client.config.push_timeout
        replies: dict[str, Any] = {}
        errors: dict[str, EngridError] = {}
        asked, first, pause = list(requests), True, SHORTEST_PAUSE
        while asked:
            transports = {shard: self._client.connections.transport(shard) for shard in asked}
            timeout = max(0.0, deadline - time.monotonic())
            calls = {
                shard: method(transport.stub).future(requests[shard], timeout=timeout, wait_for_ready=not first)
                for shard, transport in transports.items()
            }
            before, errors = errors, {}
            for shard, call in calls.items():
                try:
                    replies[shard] = call.result()
                except grpc.RpcError as error:
                    errors[shard] = from_rpc(error, transports[shard].peer)
                    if isinstance(errors[shard], DeadlineExceededError):  # why it was away says more
                        errors[shard] = before.get(shard, errors[shard])
            away = [shard for shard, error in errors.items() if isinstance(error, ShardUnavailableError)]
            if len(away) < len(errors) or time.monotonic() >= deadline:
                break
            if away:
                self._client.connections.refresh()  # it may be back under another address
                # One that is there and cannot serve (a disk that failed) answers at once, every time.
                time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
                pause = min(2 * pause, LONGEST_PAUSE)
            asked, first = away, False
        return replies, errors


def _worst(errors: Sequence[EngridError]) -> EngridError:
    """The error to raise of several: a refusal says more than an outage."""
    refusals: list[EngridError] = [error for error in errors if isinstance(error, RequestError)]
    return (refusals or list(errors))[0]


def _check_rate(learning_rate: float) -> None:
    try:
        check_learning_rate(learning_rate)
    except ValueError as error:
        raise BadRequestError(f"{error}; nothing was sent") from error


def _check_arrays(spec: TableSpec, ids: Ids, values: Floats) -> None:
    if spec.optimizer is None:
        raise ReadOnlyTableError(f"table {spec.name} takes no pushes: it was made without an optimizer")
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int64 or ids.ndim != 1:
        raise BadRequestError(f"table {spec.name}: row ids of a push must be a numpy array of int64 [n]")
    if values.dtype != np.float32 or values.ndim != 2 or len(values) != len(ids):
        raise BadRequestError(
            f"table {spec.name}: gradients must be float32 [{len(ids)}, {spec.width}], "
            f"not {values.dtype} {list(values.shape)}"
        )
    if values.shape[1] != spec.width:
        raise RowWidthMismatchError(
            f"table {spec.name}: rows hold {spec.width} values, the gradients {values.shape[1]}"
        )
    if len(ids) and (int(ids.min()) < -1 or int(ids.max()) >= spec.rows):
        bad = int(ids.min()) if int(ids.min()) < -1 else int(ids.max())
        raise RowOutOfRangeError(f"table {spec.name}: row id {bad} is outside its {spec.rows} rows")
    if not np.isfinite(values).all():
        bad = int(ids[~np.isfinite(values).all(axis=1)][0])
        raise NotFiniteError(f"table {spec.name}: the gradient of row {bad} holds NaN or Inf; nothing was sent")
