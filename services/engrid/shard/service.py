"""The shell around the state machine: locks, waiting and allocation.

Every method is one request, raises EngridError, and is called from gRPC's threads. A `deadline` is on time.monotonic()'s
clock: nobody waits longer, and a request whose caller has given up is not carried out.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from engrid.directory import Placement
from engrid.host.memory import memory
from engrid.rpc.errors import (
    BadRequestError,
    CancelledError,
    DeadlineExceededError,
    EngridError,
    OutOfMemoryError,
    RequestTooLargeError,
    StepNotReachedError,
)
from engrid.rpc.frames import Ids, ids_from_bytes
from engrid.rpc.wire import Request, new_reply
from engrid.storage.log.log import SEGMENT_BYTES
from engrid.v1 import memory_pb2 as pb

from .config import MEMORY_SHARE, ShardConfig
from .core.messages import Apply, PartitionKey, PartitionPush, PartitionState, Push, Together
from .gate import LONGEST_WAIT, Gate
from .journal.journal import Journal, Logged, Taken
from .journal.records import PushPart
from .journal.state_folder import StateFolder
from .ops import requests
from .ops.applying import Applying
from .ops.bases import Bases
from .ops.checkpointing import Checkpointing
from .ops.transfers import Transfers
from .rows.partitions import SealedPartition, TableRows, refuse_empty
from .rows.sealed import SealedRows

LEAST_SEGMENT_BYTES = 1 << 16
"""Of the log, which a base shortens by whole segments: one must not hold far more than makes a base due."""

CONTROL_SECONDS = 10.0
"""For which a call that only asks waits for the lock, which a disk that hangs may keep."""


@dataclass
class Counters:
    """Since the start."""

    lookups: int = 0
    rows: int = 0
    bytes: int = 0
    pushes: int = 0
    pushed_rows: int = 0
    steps_applied: int = 0
    errors: int = 0


class ShardService:
    """One shard's partitions and decisions."""

    def __init__(self, config: ShardConfig) -> None:
        self.config = config
        self.counters = Counters()
        self.bytes_limit = config.memory_bytes or int(MEMORY_SHARE * memory().free)
        self._folder = StateFolder(config.state, config.name) if config.state else None
        try:
            segment = max(LEAST_SEGMENT_BYTES, min(SEGMENT_BYTES, config.log_bytes))
            self.journal = Journal(config.name, self._folder.disk if self._folder else None, segment_bytes=segment)
        except BaseException:
            self._close_folder()
            raise
        self._rows, self._core = self.journal.rows, self.journal.core
        self.gate = Gate(config.name)
        """The lock that the state machine is asked under."""
        self._stepped = self.gate.stepped
        lives_on = self.journal.log is not None
        self._applying = Applying(config.name, self._rows, self.gate, self._applied, lives_on=lives_on)
        self.adopting = threading.Lock()
        """Held from a placement's check until it is in force."""
        self.saving = threading.Lock()
        """Held by whoever has snapshots of partitions; there can be one of each."""
        self.loading = threading.Lock()
        """Held while rows come from outside and until they are kept: no run may begin on them before. Taken before `saving`,
        and that before the gate."""
        self._bases = Bases(self)
        self.checkpointing = Checkpointing(self)
        self.transfers = Transfers(self)

    # -- lookup

    def lookup(self, request: Request, deadline: float, cancelled: Callable[[], bool]) -> bytes:
        """The LookupReply, rows gathered into it. deadline: on time.monotonic()'s clock."""
        ids = [ids_from_bytes(item.row_ids, f"row ids of {item.table}") for item in request.tables]
        while True:
            if request.step:
                self._wait_for_step(request, deadline, cancelled)
            if time.monotonic() >= deadline:
                raise DeadlineExceededError(f"shard {self.config.name}: the request's time was spent before the gather")
            states, tables = self._states(request), self._tables(request)
            reply = self._gather(request, tables, ids)
            if list(map(id, self._states(request))) == list(map(id, states)):
                break  # else other rows came meanwhile: some may be of the old ones, some of the new
        if request.run:
            self._tables(request)  # a run that began meanwhile changes the rows that are there
        self.counters.lookups += 1
        self.counters.rows += sum(map(len, ids))
        self.counters.bytes += sum(
            len(wanted) * table.spec.row_bytes for table, wanted in zip(tables, ids, strict=True)
        )
        return reply

    def _tables(self, request: Request) -> list[TableRows]:
        """What is asked for, checked. To be asked again after every wait, and once rows are gathered: a run may have begun,
        or other rows have come, and those are not what was asked for. Takes no lock."""
        self.gate.refuse_failed()
        placement, found = self._core.placement, []
        for item in request.tables:
            if self._core.empty(item.table):
                refuse_empty(self.config.name, item.table)
            self._core.check_epoch(item.table, request.epoch)
            if request.run:
                self._core.check_made_by(item.table, request.run)
            found.append(self._rows.table(item.table, item.row_bytes, placement))
        return found

    def _states(self, request: Request) -> list[PartitionState]:
        """Of live tables. Their identity tells one set of rows from the next: what comes from outside changes it before."""
        names = {item.table for item in request.tables if "@" not in item.table}
        return [state for (table, _), state in self._core.partitions.items() if table in names]

    def _gather(self, request: Request, tables: Sequence[TableRows], ids: Sequence[Ids]) -> bytes:
        sizes = [len(wanted) * table.spec.row_bytes for table, wanted in zip(tables, ids, strict=True)]
        if sum(sizes) > self.config.max_reply_bytes:
            raise RequestTooLargeError(
                f"the reply would be {sum(sizes)} bytes, over shard {self.config.name}'s limit of "
                f"{self.config.max_reply_bytes}; split the request"
            )
        live = [item.table for item in request.tables if "@" not in item.table]
        step = min((self._core.reached(table) for table in live), default=0)
        reply, views = new_reply(request.number, sizes, step)
        for table, wanted, view in zip(tables, ids, views, strict=True):
            out = view.reshape(len(wanted), table.spec.row_bytes)
            table.gather(wanted, out, self._core.epoch)
        return reply

    def _wait_for_step(self, request: Request, deadline: float, cancelled: Callable[[], bool]) -> None:
        def reached() -> int:
            self._tables(request)
            return min((self._core.reached(item.table) for item in request.tables), default=request.step)

        with self.gate.locked(deadline):
            left = max(0.0, min(deadline - time.monotonic(), LONGEST_WAIT))
            self._stepped.wait_for(lambda: cancelled() or reached() >= request.step, left)
            if cancelled():
                raise CancelledError("cancelled by the client")
            if reached() < request.step:
                item = min(request.tables, key=lambda each: self._core.reached(each.table))
                step = self._core.reached(item.table)
                raise StepNotReachedError(
                    f"table {item.table} on shard {self.config.name} is at step {step}, the lookup needs "
                    f"{request.step}; some worker has not pushed it",
                    expected=step,
                )

    def wake(self) -> None:
        """Lets waiting lookups look again whether they are cancelled."""
        self.gate.wake()

    # -- training

    def begin_run(
        self, run: str, attempt: int, workers: int, tables: list[str], token: str = "", *, deadline: float
    ) -> int:
        """Last step applied, none being half applied; see ShardCore.begin_run."""
        requests.check_begin_run(attempt, workers, tables)
        with self.gate.hold(self.loading, deadline, "rows that are being loaded"):
            with self.at_rest(deadline):
                for table in tables:
                    if self._core.empty(table):
                        refuse_empty(self.config.name, table)
                with self.deciding("a run begun"):
                    step, record = self.journal.begin_run(run, attempt, workers, tables, token)
            self.journal.wait_durable(record)
            return step

    def push(self, request: pb.PushRequest, *, deadline: float) -> list[bool]:
        """Checks every part, then takes all or none. Per part, whether it was new."""
        self._check_durable(durable=request.durable)
        requests.check_push(request)
        self._bases.wait_for_room(deadline)
        with self.memory("take the push"):
            push, came = self._read_push(request)
            logged = self.journal.logged(push, came)
        taken = self._take(push, logged, deadline)
        self._finish(taken, request.run, durable=request.durable, deadline=deadline)
        self.counters.pushes += sum(taken.new)
        return list(taken.new)

    def _read_push(self, request: pb.PushRequest) -> tuple[Push, list[PushPart]]:
        parts, came = [], []
        for part in request.partitions:
            key = (part.table, part.partition)
            raw_ids, raw_gradients = part.row_ids, part.gradients  # protobuf copies them each time it is asked
            ids = ids_from_bytes(raw_ids, f"row ids of {part.table}[{part.partition}]")
            gradients = self._rows.check_gradients(key, ids, raw_gradients)
            parts.append(PartitionPush(key=key, seq=part.seq, gradients=gradients))
            came.append(
                PushPart(
                    table=part.table,
                    partition=part.partition,
                    seq=part.seq,
                    row_ids=raw_ids,
                    gradients=raw_gradients,
                )
            )
        push = Push(
            run=request.run,
            attempt=request.attempt,
            worker=request.worker,
            step=request.step,
            learning_rate=request.learning_rate,
            hold=request.hold,
            epoch=request.epoch,
            parts=parts,
        )
        return push, came

    def _take(self, push: Push, logged: Logged | None, deadline: float) -> Taken:
        """Once it is sure that what it has applied leaves numbers. To find out may take long, so it is not done under the
        lock, and what was found out is looked at again under it."""
        sure: set[Together] = set()
        while True:
            with self.gate.open(deadline):
                with self.memory("take the push"):
                    unsure = [each for each in self.journal.unsure(push) if each not in sure]
                if not unsure:
                    with self.deciding("a push taken"):
                        taken = self.journal.push(push, logged)
                        self._applying.decided(taken.applies)
                        return taken
            with self.memory("try the push"):
                for each in unsure:
                    self._rows.live(each.key).refuse_not_finite(push.step, each.learning_rate, each.gradients)
            sure.update(unsure)

    def commit(self, request: pb.CommitRequest, *, deadline: float) -> None:
        """See ShardCore.commit. Returns after what became ready is applied, and is on disk where that was asked for."""
        self._check_durable(durable=request.durable)
        requests.check_count("step", request.step, 1)
        with self.gate.open(deadline), self.deciding("a commit taken"):
            taken = self.journal.commit(request.run, request.attempt, request.worker, request.step, request.epoch)
            self._applying.decided(taken.applies)
        self._finish(taken, request.run, durable=request.durable, deadline=deadline)

    def _finish(self, taken: Taken, run: str, *, durable: bool, deadline: float) -> None:
        self._applying.carry_out(taken.applies)
        # A retry is answered no sooner than what it repeats: the next step may follow.
        self._wait_until_applied(taken.applies, run, deadline)
        if durable:
            self.journal.wait_durable(taken.record)
        self._bases.look()

    def _wait_until_applied(self, applies: Sequence[Apply], run: str, deadline: float) -> None:
        """These; where there are none, whatever is of the run."""

        def done() -> bool:
            return not (self._applying.is_pending(applies) if applies else self._core.is_applying_of(run))

        while True:
            with self.gate.locked(deadline):
                self.gate.wait_for(lambda: self._applying.has_left or done(), deadline, f"run {run}'s step")
                if done():
                    return
            self._applying.carry_out()

    def _applied(self, apply: Apply, touched: int) -> None:
        self._core.applied(apply.key, apply.step)
        self.counters.pushed_rows += touched
        self.counters.steps_applied += 1

    def _check_durable(self, *, durable: bool) -> None:
        if durable and self.journal.log is None:
            raise BadRequestError(
                f"shard {self.config.name} keeps no log, so nothing can be durable; start it with --state FOLDER"
            )

    @contextmanager
    def deciding(self, what: str) -> Iterator[None]:
        """What stands in the log and what the state machine knows must not come to differ: nobody could tell."""
        try:
            yield
        except EngridError:
            raise
        except BaseException as error:
            self.gate.fail(f"{what} broke off: {error!r}")
            self.gate.refuse_failed()
            raise

    @contextmanager
    def memory(self, what: str) -> Iterator[None]:
        try:
            yield
        except MemoryError as error:
            raise OutOfMemoryError(
                f"shard {self.config.name} has no memory to {what}: {str(error) or 'none is left'}. Nothing was changed; make "
                "room, then send it again"
            ) from error

    # -- standing still

    @contextmanager
    def at_rest(self, deadline: float) -> Iterator[None]:
        """The lock, with every Apply carried out: rows and state machine are of one moment. Keep it short."""
        while True:
            if self._applying.has_left:
                self._applying.carry_out()
            with self.gate.at_rest(lambda: self._core.is_applying and not self._applying.has_left, deadline):
                if not self._core.is_applying:
                    yield
                    return

    # -- placement

    def adopt(self, placement: Placement, *, check_only: bool, deadline: float) -> int:
        """Serves the placement from now on; returns the bytes held under it. Refused: nothing changes."""
        with self.gate.hold(self.adopting, deadline, "another placement"):
            with self.gate.locked(deadline):
                adoption = self._core.plan_adoption(placement, time.monotonic())
            if adoption is None:
                return self._rows.nbytes
            needed = self._bytes_under(placement)
            if needed > self.bytes_limit:
                raise OutOfMemoryError(
                    f"shard {self.config.name} would hold {_size(needed)} of rows and optimizer state, over its "
                    f"limit of {_size(self.bytes_limit)}; use more shards, give them more memory, or a smaller table"
                )
            if check_only:
                return needed
            with self.memory("hold the tables"):
                added = self._rows.allocate(placement, adoption.added)
            with self.at_rest(deadline):
                self._core.plan_adoption(placement, time.monotonic())  # a reader may have come meanwhile
                with self.deciding("a placement adopted"):
                    record = self.journal.adopt(adoption, added)
            self.journal.wait_durable(record)
            return self._rows.nbytes

    def _bytes_under(self, placement: Placement) -> int:
        return placement.bytes_by_shard().get(self.config.name, 0)

    def backlog_bytes(self) -> int:
        """Of log, that a start would replay."""
        return self.journal.backlog_bytes()

    def close(self) -> None:
        """After the last call. What was acknowledged as durable is on disk already."""
        self.gate.close()
        self._bases.close()
        if self.journal.log is not None:
            self.journal.log.close()
        self._close_folder()

    def _close_folder(self) -> None:
        if self._folder is not None:
            self._folder.close()

    def describe(self) -> pb.DescribeReply:
        """The newest placement and where each partition stands."""
        with self.gate.locked(time.monotonic() + CONTROL_SECONDS):
            placement = self._core.placement
            reply = pb.DescribeReply(
                shard=self.config.name,
                placement=json.dumps(placement.to_json()) if placement else "",
                bytes=self._rows.nbytes,
                bytes_limit=self.bytes_limit,
                pinned=sorted(self._core.pinned(time.monotonic())),
            )
            for (table, index), state in sorted(self._core.partitions.items()):
                assert placement is not None
                part = placement.partitions[table][index]
                reply.partitions.add(
                    table=table,
                    partition=index,
                    start=part.start,
                    stop=part.stop,
                    step=state.step,
                    run=state.run,
                    attempt=state.attempt,
                    empty=state.empty,
                )
            return reply

    def pin(self, request: pb.PinRequest) -> None:
        """See ShardCore.pin."""
        with self.gate.locked(time.monotonic() + CONTROL_SECONDS):
            self._core.pin(request.reader, list(request.tables), request.seconds, time.monotonic())

    # -- whole partitions

    def sealed_rows(self, key: PartitionKey) -> SealedRows:
        """Loaded rows that may be handed over; raises BadRequestError where they are live."""
        part = self._rows.partition(key)
        if not isinstance(part, SealedPartition):
            raise BadRequestError(f"table {key[0]} is live: its rows are read over gRPC")
        if not part.rows.loaded:
            refuse_empty(self.config.name, key[0])
        return part.rows

    @contextmanager
    def keeping_rows(self, deadline: float) -> Iterator[None]:
        """Rows that come from outside meanwhile are in no log: a base that holds them makes them survive, made at the end.
        Its turn is waited for before anything is changed."""
        if self.journal.log is None:
            yield
            return
        with self.gate.hold(self.saving, deadline, "another save to end"):
            self._bases.refuse_without_room()
            yield
            self._bases.make_in_turn()


def _size(count: int) -> str:
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 29 else f"{count / (1 << 20):.2f} MiB"
