"""The same way through a KeyCache's sets as NumpyEngine, key by key in compiled code; needs numba.

Importing this compiles (some seconds the first time on a machine, kept on disk where that is writable), so that no
request waits for it. What is missing is told apart by an open-addressing table instead of a sort.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

from engrid.rpc.frames import Ids

from .sets import AGE, AGE_BITS, FREE, HELD, MOST, WAYS, Bools, Counters, Found, Sets

_Kernel = TypeVar("_Kernel", bound=Callable[..., object])

_NOT_ALL_ALIVE = np.empty((0, 0), np.bool_)


def _compiled(signature: str) -> Callable[[_Kernel], _Kernel]:
    def compile_(kernel: _Kernel) -> _Kernel:
        try:
            compiled: Any = numba.njit(signature, nogil=True, cache=True)(kernel)
        except RuntimeError:  # no folder that could keep the compiled code can be written
            compiled = numba.njit(signature, nogil=True)(kernel)
        return cast("_Kernel", compiled)

    return compile_


@_compiled("uint64(int32)")
def _mix(tag: int) -> np.uint64:
    word = np.uint64((np.uint64(tag) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9))
    return np.uint64(word ^ (word >> np.uint64(29)))


@_compiled("uint64(int64, uint64)")
def _hash(key: int, word: np.uint64) -> np.uint64:
    bits = (np.uint64(key) ^ word) * np.uint64(0x9E3779B97F4A7C15)
    bits ^= bits >> np.uint64(32)
    return np.uint64(bits * np.uint64(0xD6E8FEB86659FD93))


@_compiled("int64(uint64, int64)")
def _upper(bits: np.uint64, size: int) -> int:
    return np.int64(((bits >> np.uint64(32)) * np.uint64(size)) >> np.uint64(32))  # type: ignore[return-value]


@_compiled("int64(uint64, int64)")
def _lower(bits: np.uint64, size: int) -> int:
    return np.int64(((bits & np.uint64(0xFFFFFFFF)) * np.uint64(size)) >> np.uint64(32))  # type: ignore[return-value]


@_compiled(
    "void(int64[::1], int32[::1], int64[::1], int64[:, ::1], boolean[:, ::1], int32[::1],"
    " int64, int64[:, ::1], int64[::1], int64[::1])"
)
def _find(
    keys: Ids,
    tags: npt.NDArray[np.int32],
    worth: Ids,
    keys_CT: Ids,
    alive_CT: Bools,
    tags_C: npt.NDArray[np.int32],
    number: int,
    slots_TC: Ids,
    hits_C: Ids,
    misses_C: Ids,
) -> None:
    """Fills slots with the entry of each position, -1 where the key is not held."""
    columns, length = keys_CT.shape
    count = len(keys) // WAYS
    for column in range(columns):
        tag, word, hits, misses = tags_C[column], _mix(tags_C[column]), 0, 0
        for position in range(length):
            if len(alive_CT) and not alive_CT[column, position]:
                slots_TC[position, column] = len(keys)
                continue
            key = keys_CT[column, position]
            first = _upper(_hash(key, word), count) * WAYS
            found = -1
            for entry in range(first, first + WAYS):
                if keys[entry] == key and tags[entry] == tag:
                    found = entry
                    break
            slots_TC[position, column] = found
            if found < 0:
                misses += 1
                continue
            hits += 1
            if worth[found] & AGE != number:
                worth[found] = (min((worth[found] >> AGE_BITS) + 1, MOST) << AGE_BITS) + number
        hits_C[column], misses_C[column] = hits, misses


@_compiled(
    "void(uint8[::1], int64[:, ::1], int32[::1], int64, int64, int64[:, ::1], int64[::1], int64[::1], uint8[::1])"
)
def _stage(
    sketch: Counters,
    keys_CT: Ids,
    tags_C: npt.NDArray[np.int32],
    misses: int,
    staging: int,
    slots_TC: Ids,
    positions_M: Ids,
    bounds: Ids,
    estimates_M: Counters,
) -> None:
    """Numbers the distinct missing keys by first appearance, column by column."""
    columns, length = keys_CT.shape
    size = 16
    while size < 2 * misses:
        size *= 2
    table = np.full(size, -1, np.int32)
    counters = np.empty(misses, np.int64)
    distinct = 0
    for column in range(columns):
        begin, word = distinct, _mix(tags_C[column])
        for position in range(length):
            if slots_TC[position, column] >= 0:
                continue
            key = keys_CT[column, position]
            bits = _hash(key, word)
            place = np.int64(bits >> np.uint64(20)) & (size - 1)
            # Numbers below `begin` are another column's, and so another tag's.
            while table[place] >= 0 and (table[place] < begin or keys_CT[column, positions_M[table[place]]] != key):
                place = (place + 1) & (size - 1)
            if table[place] < 0:
                table[place] = distinct
                positions_M[distinct] = position
                counters[distinct] = _lower(bits, len(sketch))
                distinct += 1
            slots_TC[position, column] = staging + table[place]
        bounds[column + 1] = distinct
    for key in range(distinct):
        estimates_M[key] = min(sketch[counters[key]] + 1, MOST)
    for key in range(distinct):
        sketch[counters[key]] = estimates_M[key]


@_compiled("UniTuple(int64, 2)(int64[::1], int32[::1], int64[::1], int64, int64, int32, int64, int64)")
def _victim(
    keys: Ids, tags: npt.NDArray[np.int32], worth: Ids, first: int, key: int, tag: int, oldest: int, policy: int
) -> tuple[int, int]:
    """The least worthy entry of a set and its worth; HELD where none can be had or the key is there already."""
    least, victim, there = HELD, first, False
    for entry in range(first, first + WAYS):
        there |= (keys[entry] == key) & (tags[entry] == tag)
        value = HELD if worth[entry] & AGE >= oldest else worth[entry] & policy
        if value < least:
            least, victim = value, entry
    return victim, HELD if there else least


@_compiled(
    "int64(int64[::1], int32[::1], int64[::1], uint8[::1], int64[::1], int32[::1], uint8[::1], int64[::1],"
    " int64, int64, int64, int64[::1], int64[::1], int32[::1])"
)
def _admit(
    keys: Ids,
    tags: npt.NDArray[np.int32],
    worth: Ids,
    sketch: Counters,
    keys_M: Ids,
    tags_M: npt.NDArray[np.int32],
    estimates_M: Counters,
    order: Ids,
    number: int,
    oldest: int,
    policy: int,
    chosen: Ids,
    entries: Ids,
    before: npt.NDArray[np.int32],
) -> int:
    """Goes through the candidates in order, so that none replaces one before it; returns how many got in."""
    count, admitted = len(keys) // WAYS, 0
    for candidate in order:
        key, tag = keys_M[candidate], tags_M[candidate]
        first = _upper(_hash(key, _mix(tag)), count) * WAYS
        victim, least = _victim(keys, tags, worth, first, key, tag, oldest, policy)
        newcomer = (np.int64(estimates_M[candidate]) << AGE_BITS) + number
        if newcomer & policy <= least:
            continue
        if tags[victim] != FREE:
            counter = _lower(_hash(keys[victim], _mix(tags[victim])), len(sketch))
            sketch[counter] = max(sketch[counter], worth[victim] >> AGE_BITS)
        chosen[admitted], entries[admitted], before[admitted] = candidate, victim, tags[victim]
        keys[victim], tags[victim], worth[victim] = key, tag, newcomer
        admitted += 1
    return admitted


class NumbaEngine:
    """Engine in compiled code; the GIL is released while it runs."""

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
        slots_TC = np.empty((length, columns), np.int64)
        hits_C, misses_C = np.empty(columns, np.int64), np.empty(columns, np.int64)
        alive = _NOT_ALL_ALIVE if alive_CT is None else alive_CT
        _find(sets.keys, sets.tags, sets.worth, keys_CT, alive, tags_C, number, slots_TC, hits_C, misses_C)
        misses = int(misses_C.sum())
        positions_M, estimates_M = np.empty(misses, np.int64), np.empty(misses, np.uint8)
        bounds = np.zeros(columns + 1, np.int64)
        if misses:
            _stage(sets.sketch, keys_CT, tags_C, misses, staging, slots_TC, positions_M, bounds, estimates_M)
        distinct = bounds[-1]
        return Found(slots_TC, positions_M[:distinct], bounds, estimates_M[:distinct], hits_C, misses_C)

    def admit(
        self,
        sets: Sets,
        keys_M: Ids,
        tags_M: npt.NDArray[np.int32],
        estimates_M: Counters,
        number: int,
        oldest: int,
    ) -> tuple[Ids, Ids, npt.NDArray[np.int32]]:
        order = np.argsort(MOST - estimates_M, kind="stable")
        size = len(keys_M)
        chosen, entries, before = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int32)
        admitted = _admit(
            sets.keys, sets.tags, sets.worth, sets.sketch, keys_M, tags_M, estimates_M, order,
            number, oldest, sets.policy, chosen, entries, before,
        )  # fmt: skip
        return chosen[:admitted], entries[:admitted], before[:admitted]
