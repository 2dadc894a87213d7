"""How many n-grams of a text share rows: with K heads an n-gram is confused with another only if it collides in all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engrid.rpc.frames import Ids


@dataclass(frozen=True)
class Collisions:
    """Of one order of one layer."""

    order: int
    ngrams: int
    """Distinct n-grams in the text."""
    one_head: float
    """Share of them whose row in a given head is another n-gram's too; mean over the heads."""
    all_heads: float
    """Share of them whose row is another n-gram's too in every head."""
    same_in_all: float
    """Share of them that have all K rows in common with one other n-gram: what the model cannot tell apart."""


def count_collisions(order: int, ngrams: npt.NDArray[np.int64], row_ids: Ids) -> Collisions:
    """Collisions among the n-grams of one order.

    ngrams: canonical ids int64 [T, order], row by row the n-gram at a position. row_ids: int64 [T, K].
    """
    _, first = np.unique(_packed(ngrams), return_index=True)
    rows = row_ids[first]
    collides = np.stack([_shared(rows[:, head]) for head in range(rows.shape[1])], axis=1)
    return Collisions(
        order=order,
        ngrams=len(rows),
        one_head=float(collides.mean()) if len(rows) else 0.0,
        all_heads=float(collides.all(axis=1).mean()) if len(rows) else 0.0,
        same_in_all=float(_shared(_packed(rows)).mean()) if len(rows) else 0.0,
    )


def _packed(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
    """One comparable item per row, exact whatever the values."""
    whole = np.ascontiguousarray(rows)
    return whole.view(np.dtype((np.void, whole.itemsize * whole.shape[1]))).reshape(-1)


def _shared(values: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    """Which entries occur more than once."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray(counts[inverse.reshape(-1)] > 1)


def windows(canonical_ids: Ids, order: int, pad: int) -> npt.NDArray[np.int64]:
    """The n-gram that ends at each position of a sequence [T]: int64 [T, order], oldest first, padded before it."""
    padded = np.concatenate([np.full(order - 1, pad, np.int64), canonical_ids])
    return np.lib.stride_tricks.sliding_window_view(padded, order)
