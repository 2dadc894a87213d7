"""Row gradients of a batch: duplicates summed before they are pushed (docs/engram.md, section 7).

Summing 32,768 rows is dominated by moving rows, so no row is moved twice. Row id and position are packed into one
integer: such keys are distinct, so numpy's vectorised unstable sort orders them stably, at a seventh of the time of
a stable argsort. The first rows of all ids are taken in one gather, then all second rows are added at once, all third
rows, ... while many ids have more. The few ids that are left, the frequent n-grams of a Zipf tail, have long runs:
those are summed by `add.reduceat`, which costs too much per run to be used for all (4.8 ms against 1.4).
"""

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

_FEW_IDS = 128
"""Below so many ids with rows left, `add.reduceat` is faster than adding row by row."""


def sum_duplicates(row_ids: Ids, grads: Floats) -> tuple[Ids, Floats]:
    """Sum the gradients of equal row ids; return the distinct ids [u], rising, and their sums [u, width].

    `row_ids` [n] and `grads` [n, width]; rows of dead positions (-1) are dropped. The order of the additions is a
    function of `row_ids` alone, so equal inputs give equal bits. Raises ValueError for ids below -1 and for shapes
    that do not match.
    """
    if row_ids.dtype != np.int64 or row_ids.ndim != 1:
        raise ValueError(f"row_ids is {row_ids.dtype} {row_ids.shape}; give int64 [n]")
    if grads.dtype != np.float32 or grads.ndim != 2 or len(grads) != len(row_ids) or grads.shape[1] == 0:
        raise ValueError(f"grads is {grads.dtype} {grads.shape}; give float32 [{len(row_ids)}, width]")
    ids, order = _stable_sort(row_ids)
    if len(ids) and ids[0] < -1:
        raise ValueError(f"row_ids holds {ids[0]}; only -1 marks a dead position")
    starts = np.flatnonzero(np.diff(ids, prepend=-1))  # -1 itself starts no run
    return ids[starts], _sum_runs(grads, order, starts)


def _stable_sort(row_ids: Ids) -> tuple[Ids, Ids]:
    bits = len(row_ids).bit_length()
    if len(row_ids) and row_ids.min() >= -1 and row_ids.max() < 1 << (63 - bits):
        packed = row_ids << bits
        packed |= np.arange(len(row_ids))
        packed.sort()
        return packed >> bits, packed & ((1 << bits) - 1)
    order = np.argsort(row_ids, kind="stable")
    return row_ids[order], order


def _sum_runs(grads: Floats, order: Ids, starts: Ids) -> Floats:
    """Sum grads[order[s:e]] for every run s:e, where a run goes from its start to the next."""
    width = grads.shape[1]
    rows = np.ascontiguousarray(grads).view(f"V{4 * width}").reshape(-1)
    counts = np.diff(starts, append=len(order))
    sums = rows.take(order[starts], mode="clip")
    active = np.flatnonzero(counts > 1)
    added = 1
    while len(active) >= _FEW_IDS:
        partial = sums.take(active, mode="clip")
        partial.view(np.float32)[...] += rows.take(order[starts[active] + added], mode="clip").view(np.float32)
        np.put(sums, active, partial, mode="clip")
        added += 1
        active = active[counts[active] > added]
    result = sums.view(np.float32).reshape(-1, width)
    if len(active):
        left = counts[active] - added
        firsts = np.cumsum(left) - left
        places = np.arange(left.sum()) + np.repeat(starts[active] + added - firsts, left)
        remaining = rows.take(order[places], mode="clip").view(np.float32).reshape(-1, width)
        result[active] += np.add.reduceat(remaining, firsts, axis=0)
    return result
