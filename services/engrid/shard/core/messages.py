"""What the state machine of a shard is told, what it decides, and what it remembers of each partition (core.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engrid.directory import Placement

PartitionKey = tuple[str, int]
"""(table, index of the partition in it)."""


@dataclass(frozen=True, kw_only=True)
class PartitionPush:
    """One partition's part of a push; `gradients` is whatever the shell wants back in Apply."""

    key: PartitionKey
    seq: int
    gradients: Any


@dataclass(frozen=True, kw_only=True)
class Push:
    """All of one worker's gradients of one step for this shard."""

    run: str
    attempt: int
    worker: int
    step: int
    learning_rate: float
    hold: bool
    epoch: int
    parts: Sequence[PartitionPush]


@dataclass(frozen=True, kw_only=True)
class Apply:
    """Decision: update this partition's rows now, once, with the workers' gradients in rank order."""

    key: PartitionKey
    step: int
    learning_rate: float
    gradients: Sequence[Any]


@dataclass(frozen=True)
class Together:
    """Gradients of one step that a partition would apply at once, in rank order."""

    key: PartitionKey
    learning_rate: float
    gradients: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Adoption:
    """Decision: what a new placement changes on this shard."""

    placement: Placement
    added: Sequence[PartitionKey]
    removed: Sequence[PartitionKey]


@dataclass
class Held:
    """A worker's push that its partition has not applied yet."""

    step: int
    learning_rate: float
    gradients: Any
    committed: bool


@dataclass
class PartitionState:
    """Where one partition stands in its run."""

    run: str = ""
    attempt: int = 0
    token: str = ""
    """Of whoever began or restored the attempt; empty: nobody has, and the first to begin it has it."""
    workers: int = 0
    """0: the attempt is claimed and not begun; nobody may push."""
    step: int = 0
    watermarks: dict[int, int] = field(default_factory=dict)
    """Last seq taken, per worker."""
    held: dict[int, Held] = field(default_factory=dict)
    """At most one push per worker: that of step + 1."""
    applying: bool = False
    since: int = 0
    """Epoch that made the table these rows belong to: ids routed by an older one were hashed for another table."""
    empty: bool = False
    """It has no rows to serve until they are loaded: its table is sealed, or the process that held its live rows is
    gone."""
