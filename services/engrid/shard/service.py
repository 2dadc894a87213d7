"""The shell around the state machine: locks, waiting and allocation.

Every method is one request, raises EngridError, and is called from gRPC's threads.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from engrid.directory import Placement
from engrid.rpc.errors import (
    BadRequestError,
    CancelledError,
    DeadlineExceededError,
    OutOfMemoryError,
    RequestTooLargeError,
    StepNotReachedError,
)
from engrid.rpc.frames import ids_from_bytes
from engrid.rpc.wire import Request, new_reply
from engrid.v1 import memory_pb2 as pb

from . import loading
from .bases import Bases
from .checkpointing import Checkpointing
from .config import ShardConfig, free_memory_bytes
from .journal import Journal, Taken
from .messages import Apply, PartitionKey, PartitionPush, Push
from .records import PushPart
from .rows import AnyPartition, SealedPartition, refuse_empty
from .sealed import SealedRows
from .state_folder import StateFolder

EXPORT_CHUNK_BYTES = 1 << 20
MEMORY_SHARE = 0.8


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
        self.bytes_limit = config.memory_bytes or int(MEMORY_SHARE * free_memory_bytes())
        self._folder = StateFolder(config.state, config.name) if config.state else None
        try:
            self.journal = Journal(config.name, self._folder.disk if self._folder else None)
        except BaseException:
            self._close_folder()
            raise
        self._rows, self._core = self.journal.rows, self.journal.core
        self._lock = threading.Lock()
        self._stepped = threading.Condition(self._lock)
        self._adopting = threading.Lock()
        self._pausing = False
        self.saving = threading.Lock()
        """Held by whoever has snapshots of partitions; there can be one of each."""
        self.loading = threading.Lock()
        """Held while rows come from outside and until they are kept: no run may begin on them before."""
        self._bases = Bases(self)
        self.checkpointing = Checkpointing(self, self._stepped)

    # -- lookup

    def lookup(self, request: Request, deadline: float, cancelled: Callable[[], bool]) -> bytes:
        """The LookupReply, rows gathered into it. deadline: on time.monotonic()'s clock."""
        if request.run:
            for item in request.tables:
                self._core.check_made_by(item.table, request.run)
        if request.step:
            self._wait_for_step(request, deadline, cancelled)
        if time.monotonic() >= deadline:
            raise DeadlineExceededError(f"shard {self.config.name}: the request's time was spent before the gather")
        placement = self._core.placement
        wanted = []
        for item in request.tables:
            ids = ids_from_bytes(item.row_ids, f"row ids of {item.table}")
            if self._core.empty(item.table):
                refuse_empty(self.config.name, item.table)
            self._core.check_epoch(item.table, request.epoch)
            wanted.append((self._rows.table(item.table, item.row_bytes, placement), ids))
        sizes = [len(ids) * table.spec.row_bytes for table, ids in wanted]
        if sum(sizes) > self.config.max_reply_bytes:
            raise RequestTooLargeError(
                f"the reply would be {sum(sizes)} bytes, over shard {self.config.name}'s limit of "
                f"{self.config.max_reply_bytes}; split the request"
            )
        live = [item.table for item in request.tables if "@" not in item.table]
        step = min((self._core.reached(table) for table in live), default=0)
        reply, views = new_reply(request.number, sizes, step)
        for (table, ids), view in zip(wanted, views, strict=True):
            table.gather(ids, view.reshape(len(ids), table.spec.row_bytes), placement.epoch if placement else 0)
        self.counters.lookups += 1
        self.counters.rows += sum(len(ids) for _, ids in wanted)
        self.counters.bytes += sum(sizes)
        return reply

    def _wait_for_step(self, request: Request, deadline: float, cancelled: Callable[[], bool]) -> None:
        tables = [item.table for item in request.tables]

        def done() -> bool:
            return cancelled() or all(self._core.reached(table) >= request.step for table in tables)

        with self._stepped:
            self._stepped.wait_for(done, max(0.0, deadline - time.monotonic()))
            if cancelled():
                raise CancelledError("cancelled by the client")
            for table in tables:
                reached = self._core.reached(table)
                if reached < request.step:
                    raise StepNotReachedError(
                        f"table {table} on shard {self.config.name} is at step {reached}, the lookup needs "
                        f"{request.step}; some worker has not pushed it",
                        expected=reached,
                    )

    def wake(self) -> None:
        """Lets waiting lookups look again whether they are cancelled."""
        with self._stepped:
            self._stepped.notify_all()

    # -- training

    def begin_run(self, run: str, attempt: int, workers: int, tables: list[str], token: str = "") -> int:
        """Last step applied, none being half applied; see ShardCore.begin_run."""
        with self.loading:
            with self.at_rest():
                for table in tables:
                    if self._core.empty(table):
                        refuse_empty(self.config.name, table)
                step, record = self.journal.begin_run(run, attempt, workers, tables, token)
            self.journal.wait_durable(record)
            return step

    def push(self, request: pb.PushRequest) -> list[bool]:
        """Checks every part, then takes all or none. Per part, whether it was new."""
        self._check_durable(durable=request.durable)
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
        logged = self.journal.logged(push, came)
        with self._not_pausing():
            taken = self.journal.push(push, logged)
        self._finish(taken, request.run, durable=request.durable)
        self.counters.pushes += sum(taken.new)
        return list(taken.new)

    def commit(self, request: pb.CommitRequest) -> None:
        """See ShardCore.commit. Returns after what became ready is applied, and is on disk where that was asked for."""
        self._check_durable(durable=request.durable)
        with self._not_pausing():
            taken = self.journal.commit(request.run, request.attempt, request.worker, request.step, request.epoch)
        self._finish(taken, request.run, durable=request.durable)

    def _finish(self, taken: Taken, run: str, *, durable: bool) -> None:
        self.journal.carry_out(taken.applies, self._applied)
        if not taken.applies:
            with self._stepped:  # a retry is answered no sooner than what it repeats: the next step may follow
                self._stepped.wait_for(lambda: not self._core.is_applying_of(run))
        if durable:
            self.journal.wait_durable(taken.record)
        self._bases.look()

    def _applied(self, apply: Apply, touched: int) -> None:
        self.counters.pushed_rows += touched
        with self._stepped:
            self._core.applied(apply.key, apply.step)
            self.counters.steps_applied += 1
            self._stepped.notify_all()

    def _check_durable(self, *, durable: bool) -> None:
        if durable and self.journal.log is None:
            raise BadRequestError(
                f"shard {self.config.name} keeps no log, so nothing can be durable; start it with --state FOLDER"
            )

    # -- standing still

    @contextmanager
    def _not_pausing(self) -> Iterator[None]:
        """The lock, once nobody wants the shard to stand still."""
        with self._stepped:
            self._stepped.wait_for(lambda: not self._pausing)
            yield

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """The lock, with every Apply carried out: rows and state machine are of one moment. Keep it short."""
        with self._stepped:
            self._stepped.wait_for(lambda: not self._pausing)
            self._pausing = True
            try:
                self._stepped.wait_for(lambda: not self._core.is_applying)
                yield
            finally:
                self._pausing = False
                self._stepped.notify_all()

    # -- placement

    def adopt(self, placement: Placement, *, check_only: bool) -> int:
        """Serves the placement from now on; returns the bytes held under it. Refused: nothing changes."""
        with self._adopting:
            with self._lock:
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
            added = self._rows.allocate(placement, adoption.added)
            with self.at_rest():
                record = self.journal.adopt(adoption, added)
            self.journal.wait_durable(record)
            return self._rows.nbytes

    def _bytes_under(self, placement: Placement) -> int:
        return placement.bytes_by_shard().get(self.config.name, 0)

    def bytes_held(self) -> int:
        """Of rows and optimizer state."""
        return self._rows.nbytes

    def backlog_bytes(self) -> int:
        """Of log, that a start would replay."""
        return self.journal.backlog_bytes()

    def close(self) -> None:
        """After the last call. What was acknowledged as durable is on disk already."""
        self._bases.close()
        if self.journal.log is not None:
            self.journal.log.close()
        self._close_folder()

    def _close_folder(self) -> None:
        if self._folder is not None:
            self._folder.close()

    def describe(self) -> pb.DescribeReply:
        """The newest placement and where each partition stands."""
        with self._lock:
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
        with self._lock:
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

    def load(self, chunks: Iterator[pb.LoadChunk]) -> int:
        """Overwrites one partition once all of its rows have come; returns their number."""
        first = next(chunks, None)
        if first is None:
            raise BadRequestError("load: the stream held no chunk")
        key: PartitionKey = (first.table, first.partition)
        part = self._partition_to_load(key)
        whole = itertools.chain([first], chunks)
        if isinstance(part, SealedPartition):
            loading.receive_sealed(part, key, whole)
            with self._stepped:
                # No run's: a commit of the run that made them must not find them.
                self.journal.loaded(key, first.step, "", 0, rows_kept=False)
            return part.stop - part.start
        pieces = loading.receive(part, key, whole)
        with self.loading:
            with self.at_rest():  # a step decided before must not be applied to the rows that come
                loading.put(part, pieces)
                self.journal.loaded(key, first.step, first.run, first.attempt, rows_kept=True)
            self.keep_loaded_rows()
        return part.stop - part.start

    def keep_loaded_rows(self) -> None:
        """Rows that came from outside are in no log: a base that holds them makes them survive."""
        if self.journal.log is not None:
            self._bases.make()

    def _partition_to_load(self, key: PartitionKey) -> AnyPartition:
        with self._adopting:
            state = self._core.partitions.get(key)
            if state is not None and state.empty and self._core.placement is not None and not self._rows.holds(key):
                made = self._rows.allocate(self._core.placement, [key])
                with self._lock:
                    self._rows.replace(self._core.placement, made, [])
            return self._rows.partition(key)

    def export(self, request: pb.ExportRequest) -> Iterator[pb.ExportChunk]:
        """Rows of one partition in order, about a MiB at a time."""
        key = (request.table, request.partition)
        if self._core.empty(request.table):
            refuse_empty(self.config.name, request.table)
        part = self._rows.partition(key)
        per_chunk = request.rows_per_chunk or max(1, EXPORT_CHUNK_BYTES // part.rows.spec.row_bytes)
        count = part.stop - part.start
        for start in range(0, count, per_chunk):
            raw = part.copy_out(start, min(start + per_chunk, count))
            yield pb.ExportChunk(rows=raw, step=self._core.partitions[key].step)


def _size(count: int) -> str:
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 29 else f"{count / (1 << 20):.2f} MiB"
