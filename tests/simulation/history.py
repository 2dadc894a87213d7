"""What must be true: the steps of each table that was made, and the rows they lead to. Knows nothing of logs or seqs.

Gradients are small integers and the learning rate is 1, so the rows at a step are exactly minus the sum of all
gradients up to it. A step may be in the rows once every worker of the newest attempt has begun to commit it, and must be
there from when the shard acknowledged the last of these commits, whatever crashes then.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engrid.shard.core.messages import PartitionKey, PartitionState

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


@dataclass
class Incarnation:
    """One making of the table, by the epoch that made it."""

    epoch: int
    rows: int
    width: int
    workers: int = 1
    """Of the newest attempt."""
    gradients: dict[int, dict[int, tuple[Ids, Floats]]] = field(default_factory=dict)
    """By step and worker."""
    committing: dict[int, set[int]] = field(default_factory=dict)
    """Workers that have begun to commit, by step."""
    may_be_applied: int = 0
    """The last step that all its workers have begun to commit."""
    acknowledged: dict[tuple[str, int], int] = field(default_factory=dict)
    """By shard and worker: the last step of which it said that its commit is durable."""
    _at_least: int = 0
    _sums: list[Floats] = field(default_factory=list)

    def begin(self, workers: int) -> None:
        """A new attempt; steps that the last one had not begun to commit count no more."""
        self.workers = workers
        self._at_least = self.may_be_applied
        self.gradients = {step: all_of for step, all_of in self.gradients.items() if step <= self.may_be_applied}

    def commit(self, worker: int, step: int) -> None:
        """A worker knows that all shards have its push."""
        begun = self.committing.setdefault(step, set())
        begun.add(worker)
        if len(begun) == self.workers:
            self.may_be_applied = max(self.may_be_applied, step)

    def must_be_applied(self, shard: str) -> int:
        """The last step that all workers were told is durable on the shard."""
        told = min(self.acknowledged.get((shard, worker), 0) for worker in range(self.workers))
        return max(told, self._at_least)

    def rows_at(self, step: int) -> Floats:
        """What all rows [rows, width] are after `step`."""
        if not self._sums:
            self._sums.append(np.zeros((self.rows, self.width), np.float32))
        while len(self._sums) <= step:
            after = self._sums[-1].copy()
            for ids, values in self.gradients[len(self._sums)].values():
                after[ids] -= values
            self._sums.append(after)
        return self._sums[step]


class History:
    """All incarnations, and what shards show of them."""

    def __init__(self) -> None:
        self.made: dict[int, Incarnation] = {}

    def check(self, shard: str, key: PartitionKey, state: PartitionState, span: tuple[int, int], rows: Floats) -> None:
        """The partition's rows and what its shard says of them fit together, and to what was sent and acknowledged."""
        where = f"{key[0]}[{key[1]}] on {shard}, made at epoch {state.since},"
        assert state.since in self.made, f"{where} was never made"
        incarnation = self.made[state.since]
        assert not state.empty, f"{where} lost its rows"
        may, must = incarnation.may_be_applied, incarnation.must_be_applied(shard)
        assert state.step <= may, f"{where} applied step {state.step}; all workers have committed {may}"
        assert state.step >= must, f"{where} is at step {state.step}; step {must} was acknowledged"
        expected = incarnation.rows_at(state.step)[span[0] : span[1]]
        assert np.array_equal(rows, expected), f"{where} does not hold the rows of step {state.step}: {rows - expected}"

    def check_lookup(self, epoch: int, step: int, spans: list[tuple[int, int]], rows: list[Floats]) -> None:
        """Rows by partition, as a lookup for the table made at `epoch` and for `step` was answered."""
        incarnation = self.made[epoch]
        for (start, stop), part in zip(spans, rows, strict=True):
            steps = [
                each
                for each in range(step, incarnation.may_be_applied + 1)
                if np.array_equal(part, incarnation.rows_at(each)[start:stop])
            ]
            assert steps, f"a lookup got rows of no step from {step} on of the table made at epoch {epoch}"
