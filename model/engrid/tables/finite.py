"""Whether an update leaves numbers: NaN and infinity are refused before anything is written.

To look at every result costs as much as the update. Nearly always a few scalars prove that nothing can overflow: how
large the gradients are, the learning rate, and how large the weights and their state may be by now. `Bounds` keeps the
latter and grows with every update; they may be far too large (1e30 times) and still lie below `SAFE`. Only if they do
not, the update is computed twice: first on copies (RowTable.try_update).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .optimizers import adam_rate
from .spec import OptimizerSpec

Floats = npt.NDArray[np.float32]

SAFE = 1e38
"""float32 ends at 3.4e38, and bfloat16 rounds to infinity a little below."""
_ROUNDING = 1 + 2e-6
"""An update rounds a few times, each by 6e-8."""
_UNDERFLOW = 1e-18
"""Squares of values below underflow."""
_CHUNK_VALUES = 1 << 20


def magnitude(values: Floats) -> float:
    """An upper bound on |values|, C-contiguous, in one pass: their norm. Infinite or NaN if one of them is."""
    flat = values.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(np.dot(flat, flat))
    if square <= SAFE:
        return math.sqrt(square) * _ROUNDING + _UNDERFLOW
    return max(float(flat.max()), -float(flat.min()))


def largest(values: Floats) -> float:
    """The largest of |values|, first dimension the row; infinite if one is NaN or infinite."""
    rows = max(1, _CHUNK_VALUES // max(1, values[:1].size))
    found = 0.0
    for first in range(0, len(values), rows):
        chunk = values[first : first + rows]
        low, high = float(chunk.min()), float(chunk.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            return math.inf
        found = max(found, high, -low)
    return found


@dataclass(frozen=True)
class Bounds:
    """No value of a table is larger than this. Infinite: nothing is known."""

    weights: float
    mean: float = 0.0
    """Adam's exp_avg."""
    square: float = 0.0
    """Adam's exp_avg_sq, Adagrad's sum; infinite also if one of them is negative."""

    @property
    def known(self) -> bool:
        """Whether nothing here can overflow, nor in the update that led here."""
        return max(self.weights, self.mean, self.square) <= SAFE

    def after(self, optimizer: OptimizerSpec, width: int, grads: float, step: int, learning_rate: float) -> Bounds:
        """What holds after an update by gradients no larger than `grads`; infinite if it may overflow on the way."""
        mean = square = 0.0
        match optimizer.kind:
            case "sgd":
                passed, change = 0.0, learning_rate * grads
            case "adagrad":
                square = self.square + grads * grads
                passed, change = width * grads * grads + grads / optimizer.eps, learning_rate * grads / optimizer.eps
            case "adam":
                mean, square = max(self.mean, grads), max(self.square, grads * grads)
                rate = adam_rate(optimizer, step, learning_rate)
                passed = self.mean + grads + self.square + grads * grads + mean / optimizer.eps + rate
                change = rate * mean / optimizer.eps
        if not passed + change <= SAFE:
            return Bounds(math.inf, math.inf, math.inf)
        return Bounds(*((bound * _ROUNDING + _UNDERFLOW) for bound in (self.weights + change, mean, square)))
