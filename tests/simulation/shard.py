"""A shard in the simulation: the product's Journal over a simulated disk, and a shell without threads around it.

What the real shell leaves to threads is here a matter of when the scheduler calls: Applies are carried out one by one,
an answer that has to be durable waits until somebody syncs for all, and while a sync or a base is under way the disk
lets in other messages between any two of its operations.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engrid.directory import Placement
from engrid.rpc.errors import EngridError, StepNotReachedError, WrongEpochError
from engrid.shard.core.messages import Apply, Push
from engrid.shard.journal.base import begin_snapshots
from engrid.shard.journal.journal import Journal, Taken
from engrid.shard.rows.partitions import PartitionRows
from engrid.shard.rows.snapshot import ImageMemory
from tests.simulated_disk import CrashedError, SimulatedDisk

from .history import Floats
from .network import Answer, Request

TABLE = "t"
SEGMENT_BYTES = 700


@dataclass
class Unfinished:
    applies: list[Apply]
    answer: Answer
    record: int
    """To wait for; 0: the answer may leave at once."""


@dataclass
class Found:
    """What a lookup read, by partition."""

    spans: list[tuple[int, int]]
    rows: list[Floats] = field(repr=False)


class SimulatedShard:
    def __init__(self, name: str, disk: SimulatedDisk, rng: random.Random, answer: Callable[[Answer], None]) -> None:
        self.name = name
        self.disk = disk
        self.random = rng
        self.journal: Journal | None = None
        self.unfinished: list[Unfinished] = []
        self.meanwhile: Callable[[], None] = lambda: None
        """Called between two operations of the disk where other threads could run."""
        self.dies_at: int | None = None
        """Operation of the disk at which it dies."""
        self._answer = answer
        self._shared = False

    # -- life and death

    def start(self, disk: SimulatedDisk, ignore: set[str]) -> None:
        """Recovers from the disk, unless it dies in it."""
        self.disk = disk
        disk.ignore = ignore
        disk.before = self._before
        self.journal = Journal(self.name, disk, segment_bytes=SEGMENT_BYTES)

    def die(self) -> None:
        self.journal, self.unfinished, self.dies_at, self._shared = None, [], None, False
        self.disk.before = lambda operation, path: None

    def _before(self, operation: str, path: str) -> None:
        if self.dies_at is not None and self.disk.operations >= self.dies_at:
            raise CrashedError(f"{operation} of {path}")
        if self._shared and self.random.random() < 0.15:
            self._shared = False
            self.meanwhile()
            self._shared = True

    # -- requests

    def handle(self, request: Request) -> None:
        """Answers now, or when what it takes is done."""
        assert self.journal is not None
        handlers: dict[str, Callable[[Any], tuple[Any, Taken]]] = {
            "push": self._push,
            "commit": lambda body: ((), self.journal.commit(*body)),
            "begin_run": self._begin_run,
            "adopt": self._adopt,
            "lookup": lambda body: (self._lookup(*body), Taken((), (), 0)),
        }
        try:
            value, taken = handlers[request.kind](request.body)
        except EngridError as error:
            self._answer(Answer(request, error=error))
            return
        if request.kind == "commit" and not taken.applies:
            self._rest()
        durable = request.kind in ("commit", "begin_run", "adopt")
        self.unfinished.append(Unfinished(list(taken.applies), Answer(request, value), taken.record if durable else 0))
        if self.random.random() < 0.7:
            self.carry_out()

    def _push(self, push_and_parts: tuple[Push, Any]) -> tuple[Any, Taken]:
        push, parts = push_and_parts
        for each in self.journal.unsure(push):
            self.journal.rows.live(each.key).refuse_not_finite(push.step, each.learning_rate, each.gradients)
        taken = self.journal.push(push, self.journal.logged(push, parts))
        return taken.new, taken

    def _begin_run(self, body: tuple[str, int, int, list[str], str]) -> tuple[Any, Taken]:
        self._rest()
        step, record = self.journal.begin_run(*body)
        return step, Taken((), (), record)

    def _adopt(self, placement: Placement) -> tuple[Any, Taken]:
        self._rest()
        adoption = self.journal.core.plan_adoption(placement)
        record = self.journal.log.last
        if adoption is not None:
            record = self.journal.adopt(adoption, self.journal.rows.allocate(placement, adoption.added))
        return placement.epoch, Taken((), (), record)

    def _lookup(self, epoch: int, step: int) -> Found:
        core, placement = self.journal.core, self.journal.core.placement
        if placement is None or core.empty(TABLE):
            raise WrongEpochError("nothing to read here")
        if core.reached(TABLE) < step:
            raise StepNotReachedError(f"{self.name} is at step {core.reached(TABLE)}, not {step}")
        core.check_epoch(TABLE, epoch)
        table = self.journal.rows.table(TABLE, 0, placement)
        spans = [(part.start, part.stop) for part in table.parts]
        rows = []
        for start, stop in spans:
            out = np.empty((stop - start, table.spec.row_bytes), np.uint8)
            table.gather(np.arange(start, stop), out, placement.epoch)
            rows.append(out.view(np.float32).copy())
        return Found(spans, rows)

    # -- what takes time

    def carry_out(self) -> None:
        """All that was decided, in order."""
        self._rest()
        self._answer_finished()

    def _rest(self) -> None:
        while any(each.applies for each in self.unfinished):
            self.carry_out_one()

    def carry_out_one(self) -> None:
        for each in self.unfinished:
            if each.applies:
                self.journal.carry_out([each.applies.pop(0)])
                break
        self._answer_finished()

    def _answer_finished(self) -> None:
        done = [each for each in self.unfinished if not each.applies and not each.record]
        self.unfinished = [each for each in self.unfinished if each.applies or each.record]
        for each in done:
            self._answer(each.answer)

    def sync(self) -> None:
        """For all that wait, or only for some: what the one who leads had not seen yet waits for the next."""
        waiting = [each for each in self.unfinished if each.record and not each.applies]
        if not waiting:
            return
        record = self.random.choice(waiting).record
        self._letting_others_in(lambda: self.journal.wait_durable(record))
        for each in waiting:
            if each.record <= record:
                each.record = 0
        self._answer_finished()

    def make_base(self) -> None:
        """As shard/ops/bases.py does."""
        journal = self.journal
        self._rest()
        if journal.is_based:
            return
        base, live = journal.capture()
        begin_snapshots(live, ImageMemory(1 << 20))

        def write() -> None:
            try:
                journal.wait_durable(base.record)
                written = base.write(journal.needed_disk(), live)
            finally:
                for _, part in live:
                    part.settle_snapshot()
            journal.rebased(written)

        self._letting_others_in(write)

    def _letting_others_in(self, work: Callable[[], None]) -> None:
        self._shared = True
        try:
            work()
        finally:
            self._shared = False

    # -- what the oracle sees

    def live_rows(self) -> list[tuple[tuple[str, int], tuple[int, int], Floats]]:
        """Key, rows' span and rows of each partition."""
        out = []
        for key, part in self.journal.rows.partitions().items():
            assert isinstance(part, PartitionRows)
            out.append((key, (part.start, part.stop), part.rows.arrays()["rows"].view(np.float32)))
        return out
