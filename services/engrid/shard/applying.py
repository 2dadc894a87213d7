"""Decisions carried out: rows updated, the state machine told. Memory that runs out here must not stop a run for ever.

An update takes all its memory before it writes anything, so one that fails for want of memory has changed nothing. It is
kept, and the next request that has to wait for it tries it again: the answers until then are OutOfMemoryError, and the
step is applied once, as soon as there is memory. If there is none for `PATIENCE` and a log holds the step, or an update
fails in the middle, or of anything else, the shard cannot go on: a start applies the step from the log.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from engrid.rpc.errors import OutOfMemoryError

from .gate import Gate
from .messages import Apply
from .rows import ShardRows

PATIENCE, TRIES = 30.0, 3
"""Seconds and tries in which an update found no memory, after which a shard that has a log ends."""


class Applying:
    """Carries out what one shard's state machine decided."""

    def __init__(
        self, shard: str, rows: ShardRows, gate: Gate, on_applied: Callable[[Apply, int], None], *, lives_on: bool
    ) -> None:
        """on_applied: takes, under the gate's lock, what was applied and how many rows it touched. lives_on: a log brings
        back what the process had."""
        self._lives_on = lives_on
        self._shard, self._rows, self._gate, self._on_applied = shard, rows, gate, on_applied
        self._left: list[Apply] = []
        self._since, self._tries = 0.0, 0
        """When the first of them failed, and how often any has."""

    @property
    def has_left(self) -> bool:
        """Whether an update waits for memory; under the gate's lock."""
        return bool(self._left)

    def carry_out(self, applies: Sequence[Apply]) -> None:
        """All of them, whatever becomes of one. Raises OutOfMemoryError if one is left to be tried again, and
        ShardUnavailableError if the shard cannot go on."""
        missing = ""
        for apply in applies:
            try:
                self._carry_out(apply)
            except MemoryError as error:
                missing = f"step {apply.step} of {apply.key[0]}[{apply.key[1]}]: {error or 'no memory'}"
                self._leave(apply, missing)
        self._gate.refuse_failed()
        if missing:
            raise OutOfMemoryError(
                f"shard {self._shard} has no memory to apply {missing}. It is kept and tried again; make room, then send "
                "this again"
            )

    def try_again(self) -> None:
        """What is left. Raises as `carry_out`."""
        with self._gate.stepped:
            left, self._left = self._left, []
        self.carry_out(left)

    def _carry_out(self, apply: Apply) -> None:
        part = None
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
                self._on_applied(apply, touched)
                if not self._left:
                    self._since, self._tries = 0.0, 0
                self._gate.stepped.notify_all()
        except BaseException as error:  # noqa: BLE001 - rows and state machine differ now, whatever it was
            self._fail(apply, error)

    def _leave(self, apply: Apply, why: str) -> None:
        now = time.monotonic()
        with self._gate.stepped:
            self._since, self._tries = self._since or now, self._tries + 1
            self._left.append(apply)
            self._gate.stepped.notify_all()
            hopeless = self._lives_on and self._tries >= TRIES and now - self._since > PATIENCE
        if hopeless:
            self._gate.fail(f"there was no memory for {PATIENCE:g} s to apply {why}")

    def _fail(self, apply: Apply, error: BaseException) -> None:
        self._gate.fail(f"applying step {apply.step} to {apply.key[0]}[{apply.key[1]}] failed: {error!r}")
