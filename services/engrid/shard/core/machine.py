"""What a shard decides, without any I/O: which placement it serves, which push it takes, when a step applies.

The servicer hands each message in under one lock and carries out what comes back; a simulator can drive the
same class. There is no thread, clock, socket, file or row in here: gradients pass through as opaque payloads.

A push goes through three questions, in this order, and answers the first that fails:

    whose run is it?      run unknown, older attempt, newer attempt   -> RUN_MISMATCH, FENCED, RUN_MISMATCH
    seen before?          seq <= watermark                            -> DUPLICATE, nothing changes
    is it the next?       seq > watermark + 1, or step not the next   -> EXPECTED

All partitions of a request are asked before any is changed, so a refused request leaves nothing behind. A
step of a partition applies once, when each worker's push of it is in and, where pushed with `hold`, committed
by its worker. `hold` is what makes a step all or nothing across shards: a worker commits only after every
shard took its push, so where one shard refuses, no shard applies. Until then a worker may push the step
again, with the next seq, and the newer gradients take the place of the older.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engrid.directory import Placement
from engrid.rpc.errors import (
    BadRequestError,
    ExpectedError,
    FencedError,
    PinnedError,
    ReadOnlyTableError,
    RunMismatchError,
    ShardUnavailableError,
    UnknownTableError,
    WrongEpochError,
)

from .messages import Adoption, Apply, Held, PartitionKey, PartitionPush, PartitionState, Push, Together

MOST_PIN_SECONDS = 600.0
MAX_READERS, MAX_PINNED = 1024, 16_384
"""Pins, and names of tables in all of them together: a pin is kept until its time is over, whoever sent it."""
MAX_NAME_BYTES = 512
"""Bytes of a name that a client gives and a shard keeps."""


class ShardCore:
    """The state machine of one shard. Not thread-safe: the shell serialises calls."""

    def __init__(self, shard: str, recovered: Placement | None = None) -> None:
        """recovered: the placement this shard served before it was started again. Its partitions are empty until
        their rows are recovered, loaded or taken away by a newer placement."""
        self.shard = shard
        self.placement = recovered
        self.partitions: dict[PartitionKey, PartitionState] = {}
        self._pins: dict[str, tuple[frozenset[str], float]] = {}
        """By reader: sealed tables, and until when."""
        if recovered is not None:
            self.partitions = {key: PartitionState(since=self.epoch, empty=True) for key in self._owned(recovered)}

    @property
    def epoch(self) -> int:
        """Epoch of the newest placement adopted; 0 before the first."""
        return self.placement.epoch if self.placement else 0

    def _owned(self, placement: Placement) -> dict[PartitionKey, tuple[int, int]]:
        return {
            (part.table, part.index): (part.start, part.stop)
            for parts in placement.partitions.values()
            for part in parts
            if self.shard in part.shards
        }

    # -- placement

    def plan_adoption(self, placement: Placement, now: float = 0.0) -> Adoption | None:
        """What adopting would change; None where it is the placement we have. Changes nothing."""
        if self.shard not in placement.shards:
            raise BadRequestError(f"placement of epoch {placement.epoch} does not know shard {self.shard}")
        if placement == self.placement:
            return None
        if placement.epoch <= self.epoch:
            raise WrongEpochError(
                f"shard {self.shard} is at epoch {self.epoch}; a placement of epoch {placement.epoch} is older",
                epoch=self.epoch,
            )
        after = self._owned(placement)
        before = self._owned(self.placement) if self.placement else {}
        kept = [key for key in after if key in before and self._same_rows(placement, key, before[key], after[key])]
        self._refuse_moves(placement, [key for key in after if key not in kept])
        if read := sorted(({table for table, _ in before} - {table for table, _ in after}) & self.pinned(now)):
            raise PinnedError(f"shard {self.shard} cannot drop {', '.join(read)}: it is being read")
        return Adoption(
            placement=placement,
            added=[key for key in after if key not in kept],
            removed=[key for key in before if key not in kept],
        )

    def _same_rows(
        self, placement: Placement, key: PartitionKey, before: tuple[int, int], after: tuple[int, int]
    ) -> bool:
        assert self.placement is not None
        return before == after and self.placement.tables[key[0]] == placement.tables[key[0]]

    def _refuse_moves(self, placement: Placement, added: Sequence[PartitionKey]) -> None:
        """A partition whose rows lie elsewhere now would start anew here: rows would be lost."""
        if self.placement is None:
            return
        for table in {table for table, _ in added}:
            if self.placement.tables.get(table) == placement.tables[table]:
                raise BadRequestError(
                    f"epoch {placement.epoch} moves rows of table {table}; moving live partitions is not "
                    "supported yet: drop the table and create it anew"
                )

    def adopt(self, adoption: Adoption) -> None:
        """Makes the placement ours, after the shell has allocated what was added."""
        if adoption.placement.epoch <= self.epoch:
            raise WrongEpochError(f"shard {self.shard} is at epoch {self.epoch} already", epoch=self.epoch)
        self.placement = adoption.placement
        partitions = {key: state for key, state in self.partitions.items() if key not in adoption.removed}
        for key in adoption.added:
            sealed = bool(adoption.placement.tables[key[0]].version)
            partitions[key] = PartitionState(since=self.epoch, empty=sealed)
        self.partitions = partitions  # lookups go through the old one without a lock

    # -- readers

    def pin(self, reader: str, tables: Sequence[str], seconds: float, now: float) -> None:
        """A reader uses these sealed tables, and no others, for so many seconds from now."""
        if not 0 <= seconds <= MOST_PIN_SECONDS:
            raise BadRequestError(f"a pin of {seconds} seconds: give 0 to {MOST_PIN_SECONDS:g}")
        live = [table for table in tables if "@" not in table]
        if live or not reader:
            raise BadRequestError(f"pins are a reader's and of sealed tables (NAME@VERSION), not of {live or 'nobody'}")
        for name in (reader, *tables):
            self._check_size(name)
        wanted = frozenset(tables)
        others = {name: pin for name, pin in self._pins.items() if pin[1] > now and name != reader}
        held = sum(len(names) for names, _ in others.values())
        if seconds and (len(others) >= MAX_READERS or held + len(wanted) > MAX_PINNED):
            raise ShardUnavailableError(
                f"shard {self.shard} holds pins of {held} tables by {len(others)} readers, and one of {len(wanted)} more would "
                f"pass its limits of {MAX_PINNED} and {MAX_READERS}; try again once other readers have let go"
            )
        self._pins = others
        if seconds:
            self._pins[reader] = (wanted, now + seconds)

    @staticmethod
    def _check_size(name: str) -> None:
        if len(name.encode()) > MAX_NAME_BYTES:
            raise BadRequestError(f"a name of {len(name.encode())} bytes: give at most {MAX_NAME_BYTES}")

    def pinned(self, now: float) -> frozenset[str]:
        """Tables that someone reads."""
        return frozenset().union(*(tables for tables, until in self._pins.values() if until > now))

    # -- training

    def check_begin_run(self, run: str, attempt: int, workers: int, tables: Sequence[str], token: str = "") -> bool:
        """Whether it would change anything; raises what begin_run raises and changes nothing."""
        if workers < 0 or attempt < 1 or not run:
            raise BadRequestError("a run needs a name, an attempt from 1 and at least one worker (0 only claims it)")
        self._check_size(run)
        if not tables:
            raise BadRequestError(f"run {run} is begun on no table; name those it trains")
        states = self._of_tables(tables)
        assert self.placement is not None
        for table in tables:
            if self.placement.tables[table].version:
                raise ReadOnlyTableError(f"table {table} is sealed: it takes no pushes, so no run can begin on it")
        for key, state in states.items():
            self._check_beginner(run, attempt, token, key, state)
            if (state.run, state.attempt) == (run, attempt) and 0 not in (workers, state.workers):
                self._check_workers(run, attempt, workers, state)
        if len({state.step for state in states.values()}) > 1:
            raise RunMismatchError(f"partitions of {', '.join(tables)} stand at different steps; load a checkpoint")
        return any(self._would_change(state, run, attempt, workers, token) for state in states.values())

    @staticmethod
    def _check_beginner(run: str, attempt: int, token: str, key: PartitionKey, state: PartitionState) -> None:
        """Raises FencedError where the attempt is not the newest here, or is another's."""
        if state.run == run and state.attempt > attempt:
            raise FencedError(
                f"attempt {attempt} of run {run} is older than attempt {state.attempt} of {key[0]}[{key[1]}]",
                attempt=state.attempt,
            )
        if (state.run, state.attempt) == (run, attempt) and state.token not in ("", token):
            raise FencedError(
                f"another process began attempt {attempt} of run {run} on {key[0]}[{key[1]}]: leave out `attempt` to take "
                "the next one, or share one of claim_attempt among the workers",
                attempt=state.attempt,
            )

    @staticmethod
    def _check_workers(run: str, attempt: int, workers: int, state: PartitionState) -> None:
        if state.workers != workers:
            raise BadRequestError(
                f"attempt {attempt} of run {run} was begun with {state.workers} workers, not {workers}; give all of them "
                "the same number"
            )

    @staticmethod
    def _would_change(state: PartitionState, run: str, attempt: int, workers: int, token: str) -> bool:
        """A claim again, or of an attempt that has begun, changes nothing."""
        begun = (state.run, state.attempt, state.token) == (run, attempt, token)
        return not begun or workers not in (0, state.workers)

    def begin_run(self, run: str, attempt: int, workers: int, tables: Sequence[str], token: str = "") -> int:
        """Opens an attempt on our partitions of the tables; held pushes of older attempts are dropped.

        token: tells who begins it from all others. workers: 0 claims the attempt and lets nobody push yet. Returns the
        last step applied. The same attempt again with the same token changes nothing (a retry).
        """
        self.check_begin_run(run, attempt, workers, tables, token)
        states = self._of_tables(tables)
        for state in states.values():
            if not self._would_change(state, run, attempt, workers, token):
                continue
            state.run, state.attempt, state.token, state.workers = run, attempt, token, workers
            state.watermarks, state.held = {}, {}
        return max((state.step for state in states.values()), default=0)

    def _of_tables(self, tables: Sequence[str]) -> dict[PartitionKey, PartitionState]:
        for table in tables:
            if self.placement is None or table not in self.placement.tables:
                raise UnknownTableError(f"shard {self.shard} knows no table {table} at epoch {self.epoch}")
        return {key: state for key, state in self.partitions.items() if key[0] in tables}

    def check_push(self, push: Push) -> list[bool]:
        """Per part, whether it is new; raises what push raises and changes nothing."""
        for table in {part.key[0] for part in push.parts}:
            self.check_epoch(table, push.epoch)
        return [self._admit(push, part) for part in push.parts]

    def together(self, push: Push) -> list[Together]:
        """What the push would have its partitions apply, should it be the last of its step; and before that its own alone,
        so that the worker whose gradients are too large is the one refused. Raises what push raises, changes nothing."""
        found = []
        for part, is_new in zip(push.parts, self.check_push(push), strict=True):
            if not is_new:
                continue
            found.append(Together(part.key, push.learning_rate, (part.gradients,)))
            state = self.partitions[part.key]
            pushes = {worker: (held.learning_rate, held.gradients) for worker, held in state.held.items()}
            pushes[push.worker] = (push.learning_rate, part.gradients)
            if len(pushes) == state.workers > 1:
                ranked = [pushes[worker] for worker in sorted(pushes)]
                found.append(Together(part.key, ranked[0][0], tuple(gradients for _, gradients in ranked)))
        return found

    def push(self, push: Push) -> tuple[list[bool], list[Apply]]:
        """Takes a push whole or not at all. Per part, whether it was new (False: DUPLICATE); then what applies."""
        new = self.check_push(push)
        for part, is_new in zip(push.parts, new, strict=True):
            if is_new:
                state = self.partitions[part.key]
                state.watermarks[push.worker] = part.seq
                state.held[push.worker] = Held(push.step, push.learning_rate, part.gradients, not push.hold)
        return new, self._ready([part.key for part in push.parts])

    def _admit(self, push: Push, part: PartitionPush) -> bool:
        state = self.partitions.get(part.key)
        where = f"{part.key[0]}[{part.key[1]}] on shard {self.shard}"
        if state is None:
            raise WrongEpochError(f"{where} is not owned at epoch {self.epoch}", epoch=self.epoch)
        if state.empty:
            raise ShardUnavailableError(f"{where} has no rows yet; load them first")
        self._check_run(push.run, push.attempt, push.worker, state, where)
        seen = state.watermarks.get(push.worker, 0)
        if part.seq <= seen:
            return False
        if part.seq > seen + 1:
            raise ExpectedError(
                f"{where} expects push {seen + 1} of worker {push.worker}, not {part.seq}", expected=seen + 1
            )
        held = state.held.get(push.worker)
        if push.step != state.step + 1 or state.applying or (held is not None and held.committed):
            raise ExpectedError(
                f"{where} is at step {state.step}; worker {push.worker} pushed step {push.step}",
                expected=state.step + 1,
            )
        self._check_rate(push.worker, push.learning_rate, state, where)
        return True

    @staticmethod
    def _check_rate(worker: int, learning_rate: float, state: PartitionState, where: str) -> None:
        """All workers' pushes of a step apply at one rate. What is not committed yet may still be pushed anew."""
        for other, held in state.held.items():
            if other != worker and held.committed and held.learning_rate != learning_rate:
                raise BadRequestError(
                    f"{where}: worker {worker} pushes step {held.step} with learning rate {learning_rate:g}, worker {other} "
                    f"with {held.learning_rate:g}; give all the same"
                )

    @staticmethod
    def _check_run(run: str, attempt: int, worker: int, state: PartitionState, where: str) -> None:
        if state.run == run and attempt < state.attempt:
            raise FencedError(
                f"attempt {attempt} of run {run} is fenced: attempt {state.attempt} has begun on {where}",
                attempt=state.attempt,
            )
        if (state.run, state.attempt) != (run, attempt):
            holder = f"attempt {state.attempt} of run {state.run}" if state.run else "no run"
            raise RunMismatchError(f"{where} takes pushes of {holder}, not of attempt {attempt} of run {run}")
        if worker >= state.workers:
            raise BadRequestError(f"worker {worker} pushes to {where}, but run {run} has {state.workers} workers")

    def check_commit(self, run: str, attempt: int, worker: int, step: int, epoch: int) -> bool:
        """Whether it would change anything; raises what commit raises and changes nothing."""
        mine = {key: state for key, state in self.partitions.items() if state.run == run}
        if not mine:
            raise RunMismatchError(f"shard {self.shard} holds no partition of run {run}")
        for table in {table for table, _ in mine}:
            self.check_epoch(table, epoch)
        for (table, index), state in mine.items():
            where = f"{table}[{index}] on shard {self.shard}"
            self._check_run(run, attempt, worker, state, where)
            held = state.held.get(worker)
            being_applied = state.applying and step == state.step + 1
            if state.step < step and not being_applied and (held is None or held.step != step):
                raise ExpectedError(f"{where} lacks worker {worker}'s push of step {step}", expected=state.step + 1)
            if held is not None and held.step == step:
                self._check_rate(worker, held.learning_rate, state, where)
        held_now = [state.held.get(worker) for state in mine.values()]
        return any(held is not None and held.step == step and not held.committed for held in held_now)

    def commit(self, run: str, attempt: int, worker: int, step: int, epoch: int) -> list[Apply]:
        """Ends the worker's step here; epoch: as of its pushes. A step already applied is a retry and changes nothing."""
        self.check_commit(run, attempt, worker, step, epoch)
        mine = {key: state for key, state in self.partitions.items() if state.run == run}
        for state in mine.values():
            held = state.held.get(worker)
            if held is not None and held.step == step:
                held.committed = True
        return self._ready(list(mine))

    def _ready(self, keys: Sequence[PartitionKey]) -> list[Apply]:
        out = []
        for key in dict.fromkeys(keys):
            state = self.partitions[key]
            complete = len(state.held) == state.workers and all(held.committed for held in state.held.values())
            if not complete or state.applying:
                continue
            pushes = [state.held[worker] for worker in sorted(state.held)]
            state.held, state.applying = {}, True
            out.append(
                Apply(
                    key=key,
                    step=state.step + 1,
                    learning_rate=pushes[0].learning_rate,
                    gradients=[push.gradients for push in pushes],
                )
            )
        return out

    def applied(self, key: PartitionKey, step: int) -> None:
        """The shell has carried out the Apply of this step."""
        state = self.partitions.get(key)
        if state is not None:
            state.step, state.applying = step, False

    def loading(self, key: PartitionKey) -> None:
        """The shell is about to overwrite the partition's rows: it has none to serve until `loaded`, nor takes commits."""
        self.partitions[key] = replace(self.partitions[key], empty=True, watermarks={}, held={})

    def loaded(self, key: PartitionKey, step: int, run: str = "", attempt: int = 0) -> None:
        """The shell has overwritten the partition's rows with what an attempt of a run made of `step`.

        Nobody pushes to them before a run begins, and older attempts of the same run stay fenced.
        """
        old = self.partitions[key]
        token = old.token if (old.run, old.attempt) == (run, attempt) else ""
        self.partitions[key] = PartitionState(run=run, attempt=attempt, token=token, step=step, since=old.since)

    def to_save(
        self, run: str, attempt: int, step: int, tables: Sequence[str]
    ) -> dict[PartitionKey, PartitionState] | None:
        """Our partitions of the tables, where all stand at exactly this step with nothing being applied; None: not yet.

        Raises ExpectedError where one is beyond the step, and what a push of that attempt would raise.
        """
        states = self._of_tables(tables)
        for (table, index), state in states.items():
            where = f"{table}[{index}] on shard {self.shard}"
            self._check_run(run, attempt, -1, state, where)
            if state.step > step or (state.step == step and state.applying):
                raise ExpectedError(
                    f"{where} is beyond step {step} already; save a later one", expected=state.step + state.applying
                )
        return states if all(state.step == step for state in states.values()) else None

    def to_restore(self, run: str, attempt: int, tables: Sequence[str], token: str = "") -> list[PartitionKey] | None:
        """Our partitions of the tables, empty from now on and closed to older attempts; None while one is applied to.

        Raises FencedError where a newer attempt has begun, or another has begun this one.
        """
        states = self._of_tables(tables)
        for key, state in states.items():
            self._check_beginner(run, attempt, token, key, state)
        if any(state.applying for state in states.values()):
            return None
        for key, state in states.items():
            self.partitions[key] = PartitionState(run=run, attempt=attempt, token=token, since=state.since, empty=True)
        return list(states)

    def check_epoch(self, table: str, epoch: int) -> None:
        """Raises WrongEpochError where a request was routed before the table of that name was made."""
        made = max((state.since for (name, _), state in self.partitions.items() if name == table), default=0)
        if epoch < made:
            raise WrongEpochError(
                f"table {table} was made at epoch {made}, after epoch {epoch} by which the request was routed",
                epoch=self.epoch,
            )

    def check_made_by(self, table: str, run: str) -> None:
        """Raises RunMismatchError where rows of the table here are another run's."""
        for (name, index), state in self.partitions.items():
            if name == table and state.run != run:
                holder = f"run {state.run}" if state.run else "no run"
                raise RunMismatchError(
                    f"{table}[{index}] on shard {self.shard} holds rows of {holder}, not of run {run}; load the checkpoint again"
                )

    @property
    def is_applying(self) -> bool:
        """Whether the shell still has an Apply to carry out."""
        return any(state.applying for state in self.partitions.values())

    def is_applying_of(self, run: str) -> bool:
        """Whether one of them is of this run."""
        return any(state.applying for state in self.partitions.values() if state.run == run)

    def emptied(self, key: PartitionKey) -> None:
        """The partition's rows are gone or about to be replaced; whatever stood on them is too."""
        self.partitions[key] = PartitionState(since=self.partitions[key].since, empty=True)

    def reached(self, table: str) -> int:
        """The last step applied to every partition of the table here."""
        return min((state.step for (name, _), state in self.partitions.items() if name == table), default=0)

    def empty(self, table: str) -> bool:
        """Whether any partition of the table here has no rows to serve yet."""
        return any(state.empty for (name, _), state in self.partitions.items() if name == table)
