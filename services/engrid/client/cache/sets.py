"""The sets of a KeyCache as arrays, and the numpy way through them. cache.py says what they are for.

Shape suffixes: C columns of a probe, T positions, M distinct missing keys, W ways of a set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engrid.rpc.frames import Ids

Counters = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint64]

WAYS = 8
"""Entries of a set: its keys fill one cache line."""
SKETCH_PER_ENTRY = 8
"""Counters for keys that are not held, per entry."""
MOST = 15
"""A frequency stops here, so that what was hot once is forgotten in four halvings."""
FREE = 0
"""Tag of an entry that holds nothing; tags given out begin at 1."""
BOOKKEEPING_BYTES = 8 + 4 + 8 + SKETCH_PER_ENTRY
"""Of one entry, beside its rows."""

AGE_BITS = 40
"""An entry's worth is its frequency above the number of the newest plan that used it, which never takes more bits."""
AGE = (1 << AGE_BITS) - 1
EMPTY = -(1 << 62)
"""Added to the worth of an entry that holds nothing: less than any other, and the age can still be read."""
HELD = 1 << 62
"""Worth of an entry that an open plan points at: more than any other."""
RECENCY = AGE - (1 << 63)
"""The bits of a worth that count where only age does; all of them otherwise."""
FREQUENCY = -1


class Sets:
    """Which key lies in which entry; set s is the entries s * WAYS up to the next."""

    def __init__(self, count: int, policy: int = FREQUENCY) -> None:
        """policy: the bits of a worth that decide, FREQUENCY or RECENCY."""
        entries = count * WAYS
        self.count = count
        self.entries = entries
        self.policy = policy
        self.keys: Ids = np.zeros(entries, np.int64)
        self.tags = np.full(entries, FREE, np.int32)
        self.worth: Ids = np.full(entries, EMPTY, np.int64)
        """Batches that used the entry's key, halved as time goes by, and how lately."""
        self.sketch: Counters = np.zeros(entries * SKETCH_PER_ENTRY, np.uint8)
        """The same count for keys not held, by hash; keys that collide share one."""

    def age(self) -> None:
        """Halves all frequencies."""
        held = self.worth >= 0
        self.worth[held] = (self.worth[held] >> (AGE_BITS + 1) << AGE_BITS) | (self.worth[held] & AGE)
        self.sketch >>= 1

    def free(self, tag: int) -> None:
        """Empties the entries of a tag. Their rows stay where they are while a plan points at them."""
        mine = self.tags == tag
        self.tags[mine] = FREE
        self.worth[mine] = (self.worth[mine] & AGE) + EMPTY


@dataclass(frozen=True)
class Found:
    """What a probe found."""

    slots_TC: Ids
    """Where each position's rows lie: an entry, the zero row, or `staging` + number of the missing key."""
    positions_M: Ids
    """A position that holds the missing key, column by column."""
    bounds: Ids
    """Column c's missing keys are numbers bounds[c] up to bounds[c + 1]."""
    estimates_M: Counters
    """How often each missing key was asked for, by batches."""
    hits_C: Ids
    misses_C: Ids


class Engine(Protocol):
    """The two ways through the sets, with and without numba; tests hold them to one suite."""

    def probe(
        self,
        sets: Sets,
        keys_CT: Ids,
        alive_CT: Bools | None,
        tags_C: npt.NDArray[np.int32],
        number: int,
        staging: int,
    ) -> Found:
        """Finds keys for plan `number` and marks the entries found as used by it. Tags differ between columns."""

    def admit(
        self,
        sets: Sets,
        keys_M: Ids,
        tags_M: npt.NDArray[np.int32],
        estimates_M: Counters,
        number: int,
        oldest: int,
    ) -> tuple[Ids, Ids, npt.NDArray[np.int32]]:
        """Gives entries to missing keys; entries used by plan `oldest` or a newer one are left alone.

        Returns which keys were admitted, the entry of each, and the tag each entry had before.
        """


def mix(tags: npt.NDArray[np.int32]) -> Words:
    """A word per tag that sends equal keys of two tags to different sets."""
    words = (tags.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    return words ^ (words >> np.uint64(29))


def hash_keys(keys: Ids, mixes: Words) -> Words:
    """64 bits of which the upper half chooses the set and the lower half the sketch's counter."""
    words = (keys.view(np.uint64) ^ mixes) * np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(32)
    words *= np.uint64(0xD6E8FEB86659FD93)
    return words


def set_of(hashes: Words, count: int) -> Ids:
    """By the upper half."""
    return (((hashes >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)).view(np.int64)


def counter_of(hashes: Words, size: int) -> Ids:
    """By the lower half."""
    return (((hashes & np.uint64(0xFFFFFFFF)) * np.uint64(size)) >> np.uint64(32)).view(np.int64)


class NumpyEngine:
    """Whole batches in some forty numpy calls; only what is missing is sorted."""

    def probe(
        self,
        sets: Sets,
        keys_CT: Ids,
        alive_CT: Bools | None,
        tags_C: npt.NDArray[np.int32],
        number: int,
        staging: int,
    ) -> Found:
        columns, length = keys_CT.shape
        hashes = hash_keys(keys_CT, mix(tags_C)[:, None]).reshape(-1)
        keys = keys_CT.reshape(-1)
        where, entry = _find(sets, keys, np.repeat(tags_C, length), hashes)
        if alive_CT is not None:
            living = alive_CT.reshape(-1)[where]
            where, entry = where[living], entry[living]
        # A key that fills many positions is one use: every duplicate writes the same value.
        sets.worth[entry] = _worth(np.minimum((sets.worth[entry] >> AGE_BITS) + 1, MOST), number)

        slots = np.full(keys.size, -1, np.int64)
        slots[where] = entry
        if alive_CT is not None:
            slots[~alive_CT.reshape(-1)] = sets.entries
        missing = np.flatnonzero(slots < 0)
        edges = np.searchsorted(missing, np.arange(columns + 1) * length)
        chosen, bounds = [], np.zeros(columns + 1, np.int64)
        for column in range(columns):
            places = missing[edges[column] : edges[column + 1]]
            first, inverse = _distinct(keys[places])
            slots[places] = inverse + (staging + bounds[column])
            bounds[column + 1] = bounds[column] + len(first)
            chosen.append(places[first])
        flat = np.concatenate(chosen)
        counters = counter_of(hashes[flat], len(sets.sketch))
        estimates = np.minimum(sets.sketch[counters] + 1, MOST).astype(np.uint8)
        sets.sketch[counters] = estimates
        hits = np.bincount(where // length, minlength=columns) if length else np.zeros(columns, np.int64)
        return Found(
            np.ascontiguousarray(slots.reshape(columns, length).T),
            flat - np.repeat(np.arange(columns) * length, np.diff(bounds)),
            bounds,
            estimates,
            hits,
            np.diff(edges),
        )

    def admit(
        self,
        sets: Sets,
        keys_M: Ids,
        tags_M: npt.NDArray[np.int32],
        estimates_M: Counters,
        number: int,
        oldest: int,
    ) -> tuple[Ids, Ids, npt.NDArray[np.int32]]:
        hashes = hash_keys(keys_M, mix(tags_M))
        already, _ = _find(sets, keys_M, tags_M, hashes)
        fresh = np.ones(len(keys_M), np.bool_)
        fresh[already] = False
        order = np.argsort(MOST - estimates_M, kind="stable")
        order = order[fresh[order]]
        home = set_of(hashes[order], sets.count)
        by_set = np.argsort(home, kind="stable")
        order, home = order[by_set], home[by_set]

        # The r-th most frequent candidate of a set meets its r-th least worthy entry.
        begins = np.ones(len(home), np.bool_)
        begins[1:] = home[1:] != home[:-1]
        group = np.cumsum(begins) - 1
        starts = np.flatnonzero(begins)
        rank = np.arange(len(home)) - starts[group]
        order, home, group, rank = (array[rank < WAYS] for array in (order, home, group, rank))
        worth = sets.worth.reshape(-1, WAYS)[home[rank == 0]]
        worth = np.where(worth & AGE >= oldest, HELD, worth & sets.policy)
        way = np.argsort(worth, axis=1, kind="stable")[group, rank]
        newcomers = _worth(estimates_M[order], number)
        better = newcomers & sets.policy > worth[group, way]
        order, entry, newcomers = order[better], (home * WAYS + way)[better], newcomers[better]

        before = sets.tags[entry]
        evicted = entry[before != FREE]
        counters = counter_of(hash_keys(sets.keys[evicted], mix(sets.tags[evicted])), len(sets.sketch))
        sets.sketch[counters] = np.maximum(sets.sketch[counters], sets.worth[evicted] >> AGE_BITS)
        sets.keys[entry] = keys_M[order]
        sets.tags[entry] = tags_M[order]
        sets.worth[entry] = newcomers
        return order, entry, before


def _find(sets: Sets, keys: Ids, tags: npt.NDArray[np.int32], hashes: Words) -> tuple[Ids, Ids]:
    """Which of the keys are held, and in which entries."""
    home = set_of(hashes, sets.count)
    same = np.flatnonzero(sets.keys.reshape(-1, WAYS)[home] == keys[:, None])
    where = same // WAYS
    entry = home[where] * WAYS + same % WAYS
    # Two tags may hold the same key in one set: it is the tag that decides.
    exact = sets.tags[entry] == tags[where]
    return where[exact], entry[exact]


def _distinct(keys: Ids) -> tuple[Ids, Ids]:
    """Where each distinct key occurs, and which of them each key is."""
    order = np.argsort(keys)
    rising = keys[order]
    begins = np.ones(len(keys), np.bool_)
    begins[1:] = rising[1:] != rising[:-1]
    inverse = np.empty(len(keys), np.int64)
    inverse[order] = np.cumsum(begins) - 1
    return order[begins], inverse


def _worth(frequency: npt.NDArray[np.integer], number: int) -> Ids:
    return (frequency.astype(np.int64) << AGE_BITS) + number
