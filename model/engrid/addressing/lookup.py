"""What hashing finds and a row source is asked: which rows of which table. Needs numpy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

DEAD = -1
"""Canonical id of a negative raw id (an image token), which no n-gram spans, and row id of its position."""


@dataclass(frozen=True)
class Lookup:
    """One order of one layer's table, for T positions of a batch (sequences end to end)."""

    layer: int
    order: int
    keys: Ids
    """int64 [T]; equal keys have equal rows in all heads."""
    row_ids: Ids
    """int64 [T, K], bucket offsets included; -1 in all K at a dead position."""


def check_lookup(lookup: Lookup) -> None:
    """Raises ValueError for ids or keys of a wrong type or shape, and for a position that is dead in part."""
    ids, keys = lookup.row_ids, lookup.keys
    if ids.dtype != np.int64 or ids.ndim != 2 or keys.dtype != np.int64 or keys.shape != ids.shape[:1]:
        raise ValueError(
            f"lookup of layer {lookup.layer}: row ids must be int64 [T, K] and keys int64 [T], "
            f"not {ids.dtype} {list(ids.shape)} and {keys.dtype} {list(keys.shape)}"
        )
    dead = ids[:, :1] < 0
    if (ids[dead[:, 0]] != -1).any() or ((ids < 0) != dead).any():
        raise ValueError(f"lookup of layer {lookup.layer}: a dead position is -1 in every head, and no id is below -1")
