"""A worker as engrid.client.TrainingRun is one: push to all shards, resend until each took it, commit likewise.

It is worse than the real one: it may send the next step's push before this one is committed, or one whose seq has run
ahead, which no shard may take. Once fenced, or once its table is gone, it goes on all the same: a zombie, whose messages
must change nothing.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from engrid.directory import Placement
from engrid.rpc.errors import ExpectedError
from engrid.shard.core.messages import PartitionPush, Push
from engrid.shard.journal.records import PushPart
from engrid.shard.rows.gradients import Gradients

from .history import Floats, Ids, Incarnation
from .network import Answer, Request
from .shard import TABLE


@dataclass
class SimulatedWorker:
    name: str
    run: str
    attempt: int
    worker: int
    workers: int
    placement: Placement
    incarnation: Incarnation
    random: random.Random
    send: Callable[[Request], None]
    zombie: bool = False
    """It may be refused anything."""
    fenced_by: "list[SimulatedWorker]" = field(default_factory=list)
    """Whose attempt came after it on the same rows: its steps count no more."""
    phase: str = "begin"
    step: int = 0
    seq: int = 0
    """The last of the steps before: the same for every partition, as each takes every push."""
    gradients: tuple[Ids, Floats] | None = None
    """Of this step."""
    taken: dict[str, bool] = field(default_factory=dict)
    """By shard: whether it has them, as far as we know."""
    committed: dict[str, bool] = field(default_factory=dict)
    begun: dict[str, int] = field(default_factory=dict)
    next_gradients: tuple[Ids, Floats] | None = None

    @property
    def token(self) -> str:
        """Of all workers of the attempt."""
        return f"of {self.run}.{self.attempt}"

    @property
    def shards(self) -> list[str]:
        return list(self.placement.shards)

    @property
    def sleeps(self) -> bool:
        """Until a newer attempt has begun on all shards nobody is fenced: a worker that went on would be in the right."""
        return any(worker.phase == "begin" for worker in self.fenced_by)

    @property
    def between_steps(self) -> bool:
        """Nothing of its step can be applied yet, all before it is acknowledged."""
        committing = self.incarnation.committing
        begun = max(committing, default=0) > self.incarnation.may_be_applied
        return not begun and (self.phase == "begin" or self.step not in committing)

    def act(self) -> None:
        """Sends one message, or sends it again."""
        if self.phase == "begin":
            missing = [shard for shard in self.shards if shard not in self.begun]
            if not self.zombie:
                self._ask(
                    self.random.choice(missing),
                    "begin_run",
                    (self.run, self.attempt, self.workers, [TABLE], self.token),
                    (),
                )
        elif self.phase == "push":
            shard = self.random.choice([shard for shard in self.shards if not self.taken[shard]])
            self._push(shard, self.step, self.seq + 1, self.gradients)
            if self.random.random() < 0.1:
                self._push(shard, self.step, self.seq + 3, self._new_gradients())
        else:
            shard = self.random.choice([shard for shard in self.shards if not self.committed[shard]])
            self._ask(
                shard, "commit", (self.run, self.attempt, self.worker, self.step, self.placement.epoch), self.step
            )
            if self.random.random() < 0.1:
                self.next_gradients = self.next_gradients or self._new_gradients()
                self._push(self.random.choice(self.shards), self.step + 1, self.seq + 2, self.next_gradients)

    def hear(self, answer: Answer) -> None:
        """Of one of our requests, maybe one long done."""
        shard, kind, mark = answer.request.shard, answer.request.kind, answer.request.mark
        if answer.error is not None:
            refused = isinstance(answer.error, ExpectedError) and kind != "begin_run"
            due = kind == "push" and mark[2]
            assert self.zombie or (refused and not due), f"{self.name} is refused: {answer}"
            if refused and self.phase != "begin":
                self._expected(shard, kind, mark)
        elif kind == "begin_run" and self.phase == "begin":
            self._begun(shard, answer.value)
        elif kind == "push" and self.phase == "push" and mark[:2] == (self.step, self.seq + 1):
            self._taken(shard)
        elif kind == "commit":
            self._committed(shard, mark)

    def _begun(self, shard: str, step: int) -> None:
        self.begun[shard] = step
        if len(self.begun) == len(self.shards):
            steps = set(self.begun.values())
            assert self.zombie or len(steps) == 1, f"the shards stand at different steps: {self.begun}"
            self._next_step(max(steps) + 1)

    def _taken(self, shard: str) -> None:
        self.taken[shard] = True
        if all(self.taken.values()):
            self.phase = "commit"
            if not self.fenced_by:
                self.incarnation.commit(self.worker, self.step)

    def _committed(self, shard: str, step: int) -> None:
        if not self.fenced_by:
            acknowledged = self.incarnation.acknowledged
            acknowledged[shard, self.worker] = max(acknowledged.get((shard, self.worker), 0), step)
        if step == self.step and self.phase != "begin":
            self.committed[shard] = True
            if all(self.committed.values()):
                self.seq += 1
                self._next_step(self.step + 1)

    def _expected(self, shard: str, kind: str, mark: object) -> None:
        """The shard lost what it had taken and not made durable: push it again."""
        if kind == "commit" and mark == self.step and not self.committed[shard]:
            self.taken[shard] = False
            self.phase = "push"

    def _next_step(self, step: int) -> None:
        self.phase, self.step = "push", step
        self.gradients = self.next_gradients or self._new_gradients()
        self.next_gradients = None
        self.taken = dict.fromkeys(self.shards, False)
        self.committed = dict.fromkeys(self.shards, False)
        if not self.fenced_by:
            self.incarnation.gradients.setdefault(step, {})[self.worker] = self.gradients

    def _new_gradients(self) -> tuple[Ids, Floats]:
        rows, width = self.incarnation.rows, self.incarnation.width
        ids = np.array(sorted(self.random.sample(range(rows), self.random.randint(0, 6))), np.int64)
        values = [[self.random.choice((-3, -2, -1, 1, 2, 3)) for _ in range(width)] for _ in ids]
        return ids, np.array(values, np.float32).reshape(len(ids), width)

    def _push(self, shard: str, step: int, seq: int, gradients: tuple[Ids, Floats]) -> None:
        due = self.phase == "push" and seq == self.seq + 1 and self.incarnation.must_be_applied(shard) == step - 1
        self._ask(shard, "push", self._request(shard, step, seq, gradients), (step, seq, due))

    def _request(self, shard: str, step: int, seq: int, gradients: tuple[Ids, Floats]) -> tuple[Push, list[PushPart]]:
        parts, logged = [], []
        for part in self.placement.partitions[TABLE]:
            if part.primary == shard:
                low, high = np.searchsorted(gradients[0], [part.start, part.stop])
                ids, values = gradients[0][low:high], gradients[1][low:high]
                parts.append(PartitionPush(key=(TABLE, part.index), seq=seq, gradients=Gradients.of(ids, values)))
                logged.append(
                    PushPart(
                        table=TABLE,
                        partition=part.index,
                        seq=seq,
                        row_ids=ids.tobytes(),
                        gradients=values.tobytes(),
                    )
                )
        push = Push(
            run=self.run,
            attempt=self.attempt,
            worker=self.worker,
            step=step,
            learning_rate=1.0,
            hold=True,
            epoch=self.placement.epoch,
            parts=parts,
        )
        return push, logged

    def _ask(self, shard: str, kind: str, body: object, mark: object) -> None:
        self.send(Request(self.name, shard, kind, body, mark))
