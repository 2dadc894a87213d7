"""Two shards, one table, workers, an operator and readers, over a bad network and bad disks: all of it by one seed.

    network ──► SimulatedShard (Journal on a SimulatedDisk) ──► network        any message lost, late, twice, out of order
    scheduler: draws what happens next, one thing at a time                    power failure or kill -9 at any disk operation
    History: after everything that happens, what the shard shows is right

At the end the network heals, the last step is finished everywhere (or the run is stuck, which is a failure as well), and
power fails a last time under all shards.
"""

import random
from collections import deque
from collections.abc import Callable

from engrid.rpc.errors import EngridError, FencedError
from engrid.shard.core.messages import PartitionKey
from tests.simulated_disk import CrashedError, SimulatedDisk

from .history import History
from .network import Answer, Message, Network, Request
from .operator import SHARDS, Operator
from .shard import TABLE, Found, SimulatedShard
from .worker import SimulatedWorker

EVENTS = 700
ZOMBIES = 3
LAST_STEPS = 2
Standing = dict[PartitionKey, tuple[str, int, int, dict[int, int]]]


class World:
    def __init__(self, seed: int, *, ignore: set[str] | None = None) -> None:
        """ignore: places whose sync does nothing, see SimulatedDisk."""
        self.random = random.Random(seed)
        self.ignore = ignore or set()
        self.network = Network(random.Random(self.random.random()))
        self.history = History()
        self.operator = Operator(self.history, self.random, self._send)
        self.workers: dict[str, SimulatedWorker] = {}
        self.shards: dict[str, SimulatedShard] = {}
        self.killed: dict[str, Standing] = {}
        """Where the partitions of a shard stood when it was killed; the page cache has it all."""
        self.trace: deque[str] = deque(maxlen=200)
        self.sites: set[str] = set()
        self.steps = self.crashes = self.bases = self.attempts = 0
        self.run, self.attempt = "r0", 0
        for name in SHARDS:
            disk = SimulatedDisk(self.random.getrandbits(32))
            shard = SimulatedShard(name, disk, self.random, self._send)
            shard.meanwhile = lambda shard=shard: self._let_in(shard)
            self.shards[name] = shard
        weights = {
            self._deliver: 45.0,
            self._deliver_late: self.random.choice((2.0, 5.0, 15.0)),
            self._worker_acts: 5.0,
            self._shard_works: 10.0,
            self._operator_acts: 2.0,
            self._reader_acts: 3.0,
            self._shard_starts: 3.0,
            self._base: self.random.choice((0.3, 1.5, 4.0)),
            self._crash: self.random.choice((0.2, 0.8, 2.0)),
            self._change: self.random.choice((0.2, 0.6, 1.5)),
        }
        self.actions, self.weights = list(weights), list(weights.values())

    # -- the run

    def live(self, events: int = EVENTS) -> None:
        """Raises AssertionError, or what the product raised, where something is not as it must be."""
        for action in self.random.choices(self.actions, self.weights, k=events):
            action()
        self._heal()
        for name, shard in self.shards.items():
            self._die(shard, power=True)
            self._start(shard)
            assert shard.journal is not None, name
        self._compare_shards()

    def _heal(self) -> None:
        self.network.faulty = False
        self.network.late.clear()
        for shard in self.shards.values():
            shard.dies_at = None
        self._retire_zombies(0)
        goal = None
        for _ in range(3000):
            for shard in self.shards.values():
                if shard.journal is None:
                    self._start(shard)
            self._deliver()
            if self.network.waiting:
                continue
            self._shard_works()
            if not self.operator.idle:
                self.operator.act()
            elif not self._active():
                self._change()
            else:
                goal = goal or max(worker.step for worker in self._active()) + LAST_STEPS
                behind = [worker for worker in self._active() if worker.phase == "begin" or worker.step < goal]
                if not behind:
                    return
                for worker in behind:
                    worker.act()
        stuck = [(worker.name, worker.phase, worker.step, worker.taken) for worker in self._active()]
        raise AssertionError(f"stuck with a healthy network: {stuck}")

    # -- things that happen

    def _deliver(self) -> None:
        message = self.network.take()
        if message is None and self.network.faulty:
            for action in (self._worker_acts, self._operator_acts, self._shard_works, self._shard_starts):
                action()
        self._hand_over(message)

    def _deliver_late(self) -> None:
        self._hand_over(self.network.take_late())

    def _hand_over(self, message: Message | None) -> None:
        if message is None:
            return
        self.trace.append(str(message))
        if isinstance(message, Request):
            shard = self.shards[message.shard]
            self._on(shard, lambda: shard.handle(message))
        elif message.request.sender == "operator":
            self.operator.hear(message)
            self._begin_when_made()
        else:
            worker = self.workers.get(message.request.sender)
            if worker is not None and not worker.sleeps:
                worker.hear(message)

    def _let_in(self, shard: SimulatedShard) -> None:
        """Another thread's turn while a sync or a base is under way."""
        request = self.network.take_for(shard.name)
        if request is not None:
            self.trace.append(f"meanwhile {request}")
            shard.handle(request)

    def _worker_acts(self) -> None:
        awake = [worker for worker in self.workers.values() if not worker.sleeps]
        if awake:
            self.random.choice(awake).act()

    def _operator_acts(self) -> None:
        if not self.operator.idle:
            self.operator.act()

    def _shard_works(self) -> None:
        shard = self._any_shard()
        self._on(shard, shard.carry_out_one if self.random.random() < 0.3 else shard.sync)

    def _base(self) -> None:
        shard = self._any_shard()
        self.bases += 1
        self.trace.append(f"base on {shard.name}")
        if self.random.random() < 0.2:
            shard.dies_at = shard.disk.operations + self.random.randint(1, 60)
        self._on(shard, shard.make_base)

    def _reader_acts(self) -> None:
        """Of any table there was, the newest once all shards have it: one that is behind cannot tell it from the last."""
        made = list(self.history.made.values())[-3:]
        if made and not self.operator.idle and made[-1] is self.operator.incarnation:
            made.pop()
        if made:
            incarnation, shard = self.random.choice(made), self._any_shard()
            step = self.random.choice((0, incarnation.must_be_applied(shard.name)))
            request = Request("reader", shard.name, "lookup", (incarnation.epoch, step), (incarnation.epoch, step))
            self.network.send(request)

    def _change(self) -> None:
        """The table is made anew, an attempt or another run takes over, or the epoch rises and nothing else."""
        if not self.operator.idle:
            return
        draw = self.random.random()
        if self.operator.incarnation is None or draw < 0.25:
            self.trace.append("the table is made anew")
            self._make_zombies()
            self.operator.make_table()
        elif draw < 0.5:
            self.operator.raise_epoch()
        elif all(worker.between_steps for worker in self._active()):
            self._take_over()

    def _take_over(self) -> None:
        if self.random.random() < 0.3:
            self.run, self.attempt = f"r{self.attempts}", 0
            self.network.forget("begin_run")  # no order between runs of different names is kept
        self.attempt += 1
        fenced = self._active()
        self._make_zombies()
        self._begin()
        for worker in fenced:
            worker.fenced_by = self._active()

    # -- workers

    def _active(self) -> list[SimulatedWorker]:
        return [worker for worker in self.workers.values() if not worker.zombie]

    def _make_zombies(self) -> None:
        for worker in self.workers.values():
            worker.zombie = True
        self._retire_zombies(ZOMBIES)

    def _retire_zombies(self, left: int) -> None:
        zombies = [name for name, worker in self.workers.items() if worker.zombie]
        for name in zombies[: max(0, len(zombies) - left)]:
            del self.workers[name]

    def _begin_when_made(self) -> None:
        """On a table made anew the same run and attempt begin."""
        if self.operator.idle and self.operator.placement.tables and not self._active():
            self.attempt = max(1, self.attempt)
            self._begin()

    def _begin(self) -> None:
        """Workers of the newest attempt; their number follows from it, as a shard was told it once."""
        incarnation = self.operator.incarnation
        assert incarnation is not None
        self.attempts += 1
        workers = 1 + (self.attempt + len(self.run)) % 2
        incarnation.begin(workers)
        self.trace.append(f"attempt {self.attempt} of run {self.run} after step {incarnation.may_be_applied}")
        for worker in range(workers):
            name = f"w{self.attempts}.{worker}"
            self.workers[name] = SimulatedWorker(
                name=name,
                run=self.run,
                attempt=self.attempt,
                worker=worker,
                workers=workers,
                placement=self.operator.placement,
                incarnation=incarnation,
                random=self.random,
                send=self.network.send,
            )

    # -- shards

    def _send(self, message: Message) -> None:
        if isinstance(message, Answer) and message.request.kind == "lookup":
            self._check_lookup(message)
        else:
            self.network.send(message)

    def _check_lookup(self, answer: Answer) -> None:
        epoch, step = answer.request.mark
        if isinstance(answer.value, Found):
            self.history.check_lookup(epoch, step, answer.value.spans, answer.value.rows)

    def _any_shard(self) -> SimulatedShard:
        return self.shards[self.random.choice(SHARDS)]

    def _crash(self) -> None:
        shard = self._any_shard()
        if self.random.random() < 0.5:
            shard.dies_at = shard.disk.operations + self.random.choice((1, 2, 5, 10, 25))
        elif shard.journal is not None:
            self._die(shard, power=self.random.random() < 0.6)

    def _shard_starts(self) -> None:
        shard = self._any_shard()
        if shard.journal is None:
            if self.random.random() < 0.15:
                shard.dies_at = shard.disk.operations + self.random.randint(1, 25)
            self._start(shard)

    def _on(self, shard: SimulatedShard, work: Callable[[], None]) -> None:
        """Lets a shard that is up do something, and looks at it afterwards."""
        if shard.journal is None:
            return
        try:
            work()
        except CrashedError as crash:
            self.trace.append(f"{shard.name} dies at {crash}")
            self._die(shard, power=self.random.random() < 0.7, between_messages=False)
            return
        self._check(shard)

    def _die(self, shard: SimulatedShard, *, power: bool, between_messages: bool = True) -> None:
        self.crashes += 1
        self.trace.append(f"{'power fails under' if power else 'kill -9 of'} {shard.name}")
        self.killed.pop(shard.name, None)
        if not power and between_messages and shard.journal is not None:
            self.killed[shard.name] = _standing(shard)
        shard.die()
        self.sites |= set(shard.disk.sites)
        if power:
            shard.disk = shard.disk.crash()

    def _start(self, shard: SimulatedShard) -> None:
        self.trace.append(f"{shard.name} is started")
        try:
            shard.start(shard.disk, self.ignore)
        except CrashedError as crash:
            self.trace.append(f"{shard.name} dies at {crash}")
            self._die(shard, power=self.random.random() < 0.7)
            return
        except EngridError as error:
            raise AssertionError(f"{shard.name} cannot be started again: {error}") from error
        if shard.name in self.killed:
            before = self.killed.pop(shard.name)
            assert _standing(shard) == before, f"kill -9 of {shard.name}: {before} became {_standing(shard)}"
        epoch = shard.journal.core.epoch
        taken = self.operator.taken.get(shard.name, 0)
        assert epoch >= taken, f"{shard.name} is at epoch {epoch} again; it had taken {taken}"
        self._check(shard)

    def _check(self, shard: SimulatedShard) -> None:
        core = shard.journal.core
        rows = shard.live_rows()
        assert {key for key, _, _ in rows} == core.partitions.keys(), f"{shard.name} holds other rows than it says"
        for key, span, values in rows:
            self.history.check(shard.name, key, core.partitions[key], span, values)
        for worker in self._active():
            if shard.name in worker.begun:
                self._refuse_thief(shard, worker)

    def _refuse_thief(self, shard: SimulatedShard, worker: SimulatedWorker) -> None:
        """Whoever begins an attempt that was begun is refused, whatever became of the shard since; it changes nothing."""
        core = shard.journal.core
        try:
            core.check_begin_run(worker.run, worker.attempt, worker.workers, [TABLE], "a thief's")
        except FencedError:
            return
        raise AssertionError(f"{shard.name} lets another begin attempt {worker.attempt} of {worker.run}")

    def _compare_shards(self) -> None:
        steps = {(name, shard.journal.core.reached(TABLE)) for name, shard in self.shards.items()}
        assert len({step for _, step in steps}) == 1, f"the shards ended at different steps: {sorted(steps)}"
        self.steps = sum(incarnation.may_be_applied for incarnation in self.history.made.values())


def _standing(shard: SimulatedShard) -> Standing:
    return {
        key: (state.run, state.attempt, state.since, dict(state.watermarks))
        for key, state in shard.journal.core.partitions.items()
    }
