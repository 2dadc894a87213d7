"""Who changes placements and begins attempts: one change at a time, each sent until every shard has taken it."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from engrid.directory.placement import Partition, Placement
from engrid.rpc.errors import WrongEpochError
from engrid.tables import OptimizerSpec, TableSpec

from .history import History, Incarnation
from .network import Answer, Request
from .shard import TABLE

ROWS, WIDTH = 24, 2
SHARDS = ("s0", "s1")


def first_placement() -> Placement:
    return Placement(epoch=1, shards=dict.fromkeys(SHARDS, "host:1"), tables={}, partitions={})


def with_table(placement: Placement, epoch: int, seed: int) -> Placement:
    """The table in four partitions, two on each shard; seed: what makes it another table of the same shape."""
    spec = TableSpec(
        name=TABLE,
        rows=ROWS,
        row_format="float32",
        width=WIDTH,
        seed=seed,
        layer=0,
        init_std=0.0,
        optimizer=OptimizerSpec(kind="sgd"),
    )
    cuts = (0, 7, 12, 18, ROWS)
    parts = tuple(
        Partition(table=TABLE, index=i, start=cuts[i], stop=cuts[i + 1], shards=(SHARDS[i % len(SHARDS)],))
        for i in range(len(cuts) - 1)
    )
    return replace(placement, epoch=epoch, tables={TABLE: spec}, partitions={TABLE: parts})


@dataclass
class Operator:
    history: History
    random: random.Random
    send: Callable[[Request], None]
    placement: Placement = field(default_factory=first_placement)
    """The newest that was sent out."""
    missing: list[str] = field(default_factory=lambda: list(SHARDS))
    """Shards that have not taken it."""
    following: list[Placement] = field(default_factory=list)
    taken: dict[str, int] = field(default_factory=dict)
    """By shard, the last epoch it said that it took."""
    incarnation: Incarnation | None = None

    @property
    def idle(self) -> bool:
        return not self.missing

    def act(self) -> None:
        self.send(Request("operator", self.random.choice(self.missing), "adopt", self.placement, self.placement.epoch))

    def hear(self, answer: Answer) -> None:
        if answer.error is not None:
            newer = isinstance(answer.error, WrongEpochError) and answer.request.mark < self.placement.epoch
            assert newer, f"the operator is refused: {answer}"
            return
        shard = answer.request.shard
        self.taken[shard] = max(self.taken.get(shard, 0), answer.value)
        if answer.value == self.placement.epoch and shard in self.missing:
            self.missing.remove(shard)
            if not self.missing and self.following:
                self._roll_out(self.following.pop(0))

    def make_table(self) -> None:
        """Drops the table, if there is one, and makes it anew: in two epochs, or in one as another table."""
        epoch, seed = self.placement.epoch, self.random.randrange(1 << 30)
        without = replace(self.placement, epoch=epoch + 1, tables={}, partitions={})
        if self.placement.tables and self.random.random() < 0.6:
            self.following = [with_table(without, epoch + 2, self.placement.tables[TABLE].seed)]
            self._roll_out(without)
        else:
            self._roll_out(with_table(without, epoch + 1, seed))

    def raise_epoch(self) -> None:
        """A placement that changes nothing of the table."""
        self._roll_out(replace(self.placement, epoch=self.placement.epoch + 1))

    def _roll_out(self, placement: Placement) -> None:
        made = placement.tables and placement.tables != self.placement.tables
        self.placement, self.missing = placement, list(SHARDS)
        if made:
            self.incarnation = Incarnation(placement.epoch, ROWS, WIDTH)
            self.history.made[placement.epoch] = self.incarnation
