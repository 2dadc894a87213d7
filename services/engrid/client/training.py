"""A worker's side of training: one push per step to every partition, in two phases.

Every push is checked whole before anything leaves. It is then held by the shards, and only when all of them
have taken it does the worker commit: where one shard refuses, the step is applied nowhere.

Shards answer DUPLICATE for a seq they have seen. That is good news for a request that was sent before, and for no other:
what never left this worker can only have been seen if somebody else pushes in its place, so it is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import Message

from engrid.directory import Placement
from engrid.rpc.channel import MAX_MESSAGE_BYTES
from engrid.rpc.errors import (
    BadRequestError,
    ExpectedError,
    FencedError,
    NotFiniteError,
    ReadOnlyTableError,
    RequestTooLargeError,
    RowOutOfRangeError,
    RowWidthMismatchError,
    UnknownTableError,
)
from engrid.rpc.frames import Floats, Ids, floats_to_bytes, ids_to_bytes
from engrid.tables import TableSpec, check_learning_rate, sum_duplicates
from engrid.v1 import memory_pb2 as pb

from .arrays import as_ids, as_integer
from .asking import Answers, ask_all, worst
from .attempts import Attempt, begin, check_attempt, check_rank, check_tables, claim
from .client import MemoryClient
from .connections import Method

MESSAGE_HEADROOM = 4096
"""Bytes of a push that are not rows, at most, per partition."""


class TrainingRun:
    """One worker's pushes of one attempt of a run. Of threads that share it, one pushes at a time."""

    def __init__(
        self,
        client: MemoryClient,
        *,
        run: str,
        tables: Sequence[str],
        attempt: Attempt | int | None = None,
        worker: int = 0,
        workers: int = 1,
        durable: bool = False,
    ) -> None:
        """Opens the attempt on every shard that holds the tables; each worker does, in any order.

        attempt: None: the next one, for a run of one worker. Several workers share one of `claim_attempt`. A bare number
        is begun by this client alone. durable: a push is acknowledged once it is on the shards' disks. Raises
        FencedError where a newer attempt has begun, or another process began this one.
        """
        worker, workers = check_rank(worker, workers)
        self._client = client
        self._run, self._worker = run, worker
        self._pushing = threading.Lock()
        self._tables = check_tables(client, tables)
        self._durable = durable
        self._seq: dict[tuple[str, int], int] = {}
        """The last that its shard took, per partition."""
        self._unsure: dict[str, pb.PushRequest] = {}
        """By shard, what it may have taken under the seq after that, of a push that failed."""
        self._committing: tuple[int, dict[str, pb.PushRequest]] | None = None
        """A step whose commit was sent and not answered by every shard, and its pushes: some may have applied it."""
        if attempt is None:
            if workers > 1:
                raise BadRequestError(
                    f"{workers} workers of run {run} need one attempt: get it by claim_attempt and give it to all of them"
                )
            self.attempt, self.step = claim(client, run, self._tables, workers=1)
        else:
            self.attempt = check_attempt(client, attempt, run)
            self.step = begin(client, self.attempt, self._tables, workers=workers)
        self._placement = client.placement
        """Where the tables are as the attempt was begun on them: ones made anew since refuse its epoch."""

    def push(
        self, gradients: Mapping[str, tuple[Ids, Floats]], *, step: int, learning_rate: float, hold: bool = True
    ) -> int:
        """Pushes this worker's gradients of a step: per table int64 row ids [n] and float32 [n, width].

        Duplicate ids are summed, -1 (dead) is left out; a table of the run that is not named gets empty pushes. Returns
        the rows sent; `step` is then this one. Raises NotFiniteError and other RequestErrors before anything leaves, and whatever a shard
        answers; then the step is applied nowhere. A shard that is away is tried again for `push_timeout` seconds: what
        it took already it takes for a duplicate. Where that is not enough (UnavailableError), call again with the same
        gradients: whatever the shards have of the step by then, it is applied once. Other gradients for a step that was
        taken by then, or is being committed, are refused (ExpectedError).
        """
        step = self._check_push(gradients, step, learning_rate)
        summed = {table: self._checked(table, gradients.get(table)) for table in self._tables}
        with self._pushing:
            self._push_step(summed, step, learning_rate, hold=hold)
        return sum(len(ids) for ids, _ in summed.values())

    def _push_step(
        self, summed: Mapping[str, tuple[Ids, Floats]], step: int, learning_rate: float, *, hold: bool
    ) -> None:
        placement = self._placement
        hold = hold and len(self._shards()) > 1  # one shard takes a push whole or not at all
        requests = self._requests(placement, summed, step, learning_rate, hold=hold)
        if not hold or self._committing is None or self._committing[0] != step:
            self._push(requests, hold=hold)
            self._committing = (step, requests)
        elif any(not _same(requests[shard], taken) for shard, taken in self._committing[1].items()):
            raise ExpectedError(
                f"step {step} of run {self._run} is being committed with other gradients, some shards may have applied it; "
                "push those again",
                expected=step,
            )
        if hold:
            self._commit(*self._committing)
        self._committing = None
        self.step = step

    def _commit(self, step: int, requests: Mapping[str, pb.PushRequest]) -> None:
        """Commits on every shard what it has taken. One whose host lost power meanwhile has it no more: pushed once more."""
        epoch = next(request.epoch for request in requests.values())
        commit = pb.CommitRequest(
            run=self._run,
            attempt=self.attempt.number,
            worker=self._worker,
            step=step,
            durable=self._durable,
            epoch=epoch,
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
        seq is sent first, and the next where that turns out to be a duplicate: of these gradients, where nothing is held,
        it is the answer that was lost; of others it says nothing of these.
        """
        known, self._unsure = self._unsure, self._in_doubt(requests)  # until each has answered
        answers = self._ask(lambda stub: stub.Push, requests)
        unsettled = answers.errors if hold or not answers.errors else requests
        self._unsure = {shard: self._unsure[shard] for shard in unsettled}
        self._refuse_strange(requests, answers, set(known))
        again: dict[str, pb.PushRequest] = {}
        for shard, reply in answers.replies.items():
            if hold or not answers.errors:
                self._took(requests[shard])
            if shard in known and pb.DUPLICATE in reply.outcomes and (hold or not _same(requests[shard], known[shard])):
                again[shard] = requests[shard]
                self._took(again[shard])
                for part in again[shard].partitions:
                    part.seq += 1
        if not answers.errors and again:
            self._unsure = dict(again)
            answers = self._ask(lambda stub: stub.Push, again)
            self._unsure = {shard: again[shard] for shard in answers.errors}
            self._refuse_strange(again, answers, set())
            for shard in answers.replies:
                self._took(again[shard])
        if answers.errors:
            raise worst(list(answers.errors.values()))

    def _in_doubt(self, requests: Mapping[str, pb.PushRequest]) -> dict[str, pb.PushRequest]:
        """What each shard may have taken once these are sent too; of two that differ nobody can say which."""
        known, neither = self._unsure, pb.PushRequest()
        return {
            **known,
            **{
                shard: neither if shard in known and not _same(request, known[shard]) else request
                for shard, request in requests.items()
            },
        }

    def _refuse_strange(self, requests: Mapping[str, pb.PushRequest], answers: Answers, known: set[str]) -> None:
        """Raises FencedError where a shard has seen what we never sent it. known: shards that may have it of an earlier try."""
        for shard, reply in answers.replies.items():
            if shard not in known | answers.again and pb.DUPLICATE in reply.outcomes:
                part = requests[shard].partitions[list(reply.outcomes).index(pb.DUPLICATE)]
                raise FencedError(
                    f"shard {shard} has seen push {part.seq} of worker {self._worker} to {part.table}[{part.partition}] in "
                    f"attempt {self.attempt.number} of run {self._run}, which this TrainingRun never sent: somebody else "
                    f"pushes as this worker. Step {requests[shard].step} does not hold these gradients; begin a new attempt",
                    attempt=self.attempt.number,
                )

    def _took(self, request: pb.PushRequest) -> None:
        for part in request.partitions:
            self._seq[part.table, part.partition] = part.seq

    def _check_push(self, gradients: Mapping[str, object], step: int, learning_rate: float) -> int:
        if not isinstance(gradients, Mapping):
            raise BadRequestError(f"gradients is {type(gradients).__name__}; give {{table: (row ids, gradients)}}")
        if unknown := [table for table in gradients if table not in self._tables]:
            raise UnknownTableError(
                f"push to {', '.join(map(repr, unknown))}, which run {self._run} does not train; its tables are "
                f"{', '.join(self._tables)}. Nothing was sent"
            )
        number = as_integer(step)
        if number is None or not 1 <= number < 2**63:
            raise BadRequestError(f"step {step!r}: steps are counted from 1")
        _check_rate(learning_rate)
        return number

    def _checked(self, table: str, given: tuple[Ids, Floats] | None) -> tuple[Ids, Floats]:
        spec, _ = self._client.connections.table(table)
        if given is None:
            return np.empty(0, np.int64), np.empty((0, spec.width), np.float32)
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise BadRequestError(f"table {table}: give a pair of row ids and gradients, not {type(given).__name__}")
        ids = as_ids(
            given[0], f"table {table}: row ids of a push", 1
        ).copy()  # another thread may write to the caller's
        values = np.asarray(given[1])
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
                        attempt=self.attempt.number,
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
        return {part.primary for table in self._tables for part in self._placement.partitions[table]}

    def _send(self, method: Method, requests: Mapping[str, Message]) -> dict[str, Any]:
        """As `_ask`, but raises the worst error once every call has ended."""
        answers = self._ask(method, requests)
        if answers.errors:
            raise worst(list(answers.errors.values()))
        return answers.replies

    def _ask(self, method: Method, requests: Mapping[str, Message]) -> Answers:
        return ask_all(self._client, method, requests)


def _same(one: pb.PushRequest, other: pb.PushRequest) -> bool:
    """Whether they say the same but for their seqs."""

    def said(request: pb.PushRequest) -> tuple[object, ...]:
        parts = [(part.table, part.partition, part.row_ids, part.gradients) for part in request.partitions]
        return request.step, request.learning_rate, parts

    return said(one) == said(other)


def _check_rate(learning_rate: float) -> None:
    try:
        check_learning_rate(learning_rate)
    except ValueError as error:
        raise BadRequestError(f"{error}; nothing was sent") from error


def _check_arrays(spec: TableSpec, ids: Ids, values: Floats) -> None:
    if spec.optimizer is None:
        raise ReadOnlyTableError(f"table {spec.name} takes no pushes: it was made without an optimizer")
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
