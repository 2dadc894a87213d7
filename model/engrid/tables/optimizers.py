"""One step of an optimizer over the rows a push touched: gather, update in place, scatter.

All arrays are float32, and nothing is done to rows that have no gradient: their moments do not decay, as in
torch.optim.SparseAdam. The caller passes blocks of rows small enough that the scratch stays in the cache.
"""

import math

import numpy as np
import numpy.typing as npt

from .spec import OptimizerSpec

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

SCRATCHES = 3
"""Blocks of scratch `update_rows` needs."""
_LARGEST = float(np.finfo(np.float32).max)


def check_learning_rate(learning_rate: float) -> None:
    """Raise ValueError unless the rate is a number from 0 that float32 holds: rows are float32."""
    if isinstance(learning_rate, bool) or not isinstance(learning_rate, int | float | np.floating | np.integer):
        raise ValueError(f"learning rate is {learning_rate!r}; give a number")  # noqa: TRY004 - as every other value
    # As Python's: to a float16, _LARGEST is infinite.
    rate = float(learning_rate) if isinstance(learning_rate, np.floating) else learning_rate
    if not 0 <= rate <= _LARGEST:
        raise ValueError(f"learning rate is {learning_rate!r}; give a number from 0 to {_LARGEST:.3g}")


def adam_rate(optimizer: OptimizerSpec, step: int, learning_rate: float) -> float:
    """The rate of a step, corrected for the bias of the means that began at zero."""
    return learning_rate * math.sqrt(1 - optimizer.beta2**step) / (1 - optimizer.beta1**step)


def new_state(optimizer: OptimizerSpec, rows: int, width: int) -> dict[str, Floats]:
    """Return zeroed state, named as in torch: exp_avg and exp_avg_sq [n, width] for adam, sum [n] for adagrad."""
    match optimizer.kind:
        case "sgd":
            return {}
        case "adagrad":
            return {"sum": np.zeros(rows, np.float32)}
        case "adam":
            return {name: np.zeros((rows, width), np.float32) for name in ("exp_avg", "exp_avg_sq")}


def update_rows(
    optimizer: OptimizerSpec,
    weights: Floats,
    state: dict[str, Floats],
    ids: Ids,
    grads: Floats,
    *,
    step: int,
    learning_rate: float,
    scratch: Floats,
) -> Floats:
    """Apply `grads` [u, width] to rows `ids` [u] (distinct, in range) of `weights` [n, width] and `state`.

    `scratch` is [SCRATCHES, u, width]. Returns the new rows [u, width], which lie in the scratch.
    """
    match optimizer.kind:
        case "sgd":
            change = scratch[0]
            np.multiply(grads, learning_rate, out=change)
        case "adagrad":
            change = _adagrad_change(optimizer, state["sum"], ids, grads, learning_rate, scratch)
        case "adam":
            change = _adam_change(optimizer, state, ids, grads, step, learning_rate, scratch)
    rows = _gather(weights, ids, scratch[2])
    rows -= change
    _scatter(weights, ids, rows)
    return rows


def _adagrad_change(
    optimizer: OptimizerSpec, sums: Floats, ids: Ids, grads: Floats, learning_rate: float, scratch: Floats
) -> Floats:
    """lr * g / (sqrt(sum of mean(g^2)) + eps), the sum and the mean over a row's values being one number per row."""
    touched = sums[ids]
    touched += np.multiply(grads, grads, out=scratch[0]).mean(axis=1)
    sums[ids] = touched
    np.sqrt(touched, out=touched)
    touched += optimizer.eps
    change: Floats = scratch[0]
    np.divide(grads, touched[:, None], out=change)
    change *= learning_rate
    return change


def _adam_change(
    optimizer: OptimizerSpec,
    state: dict[str, Floats],
    ids: Ids,
    grads: Floats,
    step: int,
    learning_rate: float,
    scratch: Floats,
) -> Floats:
    """The order of operations is that of torch.optim._functional.sparse_adam."""
    mean: Floats = scratch[0]
    square, delta = scratch[1], scratch[2]
    _gather(state["exp_avg"], ids, mean)
    np.subtract(grads, mean, out=delta)
    delta *= 1 - optimizer.beta1
    mean += delta
    _scatter(state["exp_avg"], ids, mean)

    _gather(state["exp_avg_sq"], ids, square)
    np.multiply(grads, grads, out=delta)
    delta -= square
    delta *= 1 - optimizer.beta2
    square += delta
    _scatter(state["exp_avg_sq"], ids, square)

    np.sqrt(square, out=square)
    square += optimizer.eps
    mean /= square
    mean *= adam_rate(optimizer, step, learning_rate)
    return mean


def _gather(array: Floats, ids: Ids, out: Floats) -> Floats:
    rows = f"V{4 * array.shape[1]}"
    np.take(array.view(rows).reshape(-1), ids, out=out.view(rows).reshape(-1), mode="clip")
    return out


def _scatter(array: Floats, ids: Ids, values: Floats) -> None:
    rows = f"V{4 * array.shape[1]}"
    np.put(array.view(rows).reshape(-1), ids, values.view(rows).reshape(-1), mode="clip")
