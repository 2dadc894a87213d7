"""Decisions carried out: rows updated, the state machine told. Memory that runs out here must not stop a run for ever.

An update takes all its memory before it writes anything, so one that fails for want of memory has changed nothing. It is
kept, and the next request that has to wait for it tries it again: the answers until then are OutOfMemoryError, and the
step is applied once, as soon as there is memory. If there is none for `PATIENCE` and a log holds the step, or an update
fails in the middle, or of anything else, the shard cannot go on: a start applies the step from the log.

A decision is noted in the moment in which the state machine makes it, so it is not lost with the thread that asked for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engrid.rpc.errors import OutOfMemoryError
from engrid.shard.core.messages import Apply
from engrid.shard.gate import Gate
from engrid.shard.rows.partitions import ShardRows

PATIENCE, TRIES = 30.0, 3
"""Seconds and tries in which an update found no memory, after which a shard that has a log ends."""


@dataclass(eq=False)
class _Decided:
    apply: Apply
    busy: bool = False
    """A thread is at it."""
    done: bool = False
    tries: int = 0
    """For which there was no memory, the first of them `since`, on time.monotonic()'s clock."""
    since: float = 0.0


class Applying:
    """Carries out what one shard's state machine decided."""

    def __init__(
        self, shard: str, rows: ShardRows, gate: Gate, on_applied: Callable[[Apply, int], None], *, lives_on: bool
    ) -> None:
        """on_applied: takes, under the gate's lock, what was applied and how many rows it touched. lives_on: a log brings
        back what the process had."""
        self._lives_on = lives_on
        self._shard, self._rows, self._gate, self._on_applied = shard, rows, gate, on_applied
        self._decided: list[_Decided] = []

    def decided(self, applies: Sequence[Apply]) -> None:
        """Under the gate's lock: to be carried out, by whoever comes first."""
        self._decided.extend(_Decided(apply) for apply in applies)

    @property
    def has_left(self) -> bool:
        """Whether no thread is at one of them; under the gate's lock."""
        return any(not each.busy for each in self._decided)

    def is_pending(self, applies: Sequence[Apply]) -> bool:
        """Whether one of these is not carried out; under the gate's lock."""
        return any(each.apply is wanted for each in self._decided for wanted in applies)

    def carry_out(self, applies: Sequence[Apply] | None = None) -> None:
        """These, or all that no thread is at, whatever becomes of one. What another thread is at is not waited for.

        Raises OutOfMemoryError if one is left to be tried again, ShardUnavailableError if the shard cannot go on.
        """
        missing = ""
        for each in list(self._decided):
            if applies is None or any(each.apply is wanted for wanted in applies):
                missing = self._try(each) or missing
        self._gate.refuse_failed()
        if missing:
            raise OutOfMemoryError(
                f"shard {self._shard} has no memory to apply {missing}. It is kept and tried again; make room, then send "
                "this again"
            )

    def _try(self, each: _Decided) -> str:
        """What there was no memory for; empty: it is carried out, or another thread is at it."""
        with self._gate.stepped:
            if each.busy or each.done:
                return ""
            each.busy = True
        try:
            self._carry_out(each)
        except MemoryError as error:
            missing = f"step {each.apply.step} of {each.apply.key[0]}[{each.apply.key[1]}]: {str(error) or 'no memory'}"
            self._note(each, missing)
            return missing
        finally:
            with self._gate.stepped:
                each.busy = False
                self._gate.stepped.notify_all()
        return ""

    def _carry_out(self, each: _Decided) -> None:
        apply, part = each.apply, None
        try:
            part = self._rows.live(apply.key)
            touched = part.apply(apply.step, apply.learning_rate, apply.gradients)
        except BaseException as error:
            if part is not None and not part.rows.torn and isinstance(error, MemoryError):
                raise
            self._fail(apply, error)
            return
        try:
            with self._gate.stepped:
                each.done = True
                self._on_applied(apply, touched)
                self._decided.remove(each)
        except BaseException as error:  # noqa: BLE001 - rows and state machine differ now, whatever it was
            self._fail(apply, error)

    def _note(self, each: _Decided, missing: str) -> None:
        now = time.monotonic()
        each.since, each.tries = each.since or now, each.tries + 1
        if self._lives_on and each.tries >= TRIES and now - each.since > PATIENCE:
            self._gate.fail(f"there was no memory for {PATIENCE:g} s to apply {missing}")

    def _fail(self, apply: Apply, error: BaseException) -> None:
        self._gate.fail(f"applying step {apply.step} to {apply.key[0]}[{apply.key[1]}] failed: {error!r}")
