"""Initial rows from a counter-based generator, so that a row's values do not depend on who holds it.

The stream is Philox4x64-10 keyed by (seed, layer). One counter value gives 4 words of 64 bits, each word two values
(low half first), so a row of `width` values takes B = ceil(width / 8) counter values and row r owns counters
r*B .. r*B + B-1, counted as numpy.random.Philox does. A range of rows is a contiguous stretch of the stream, from any
start. (numpy keeps the stream of a bit generator's `random_raw` for ever; that of Generator methods it may change.)

The upper 24 bits of each half, as a signed integer in [-2^23, 2^23), are exact in float32; times a / 2^23 with
a = init_std * sqrt(3) they are uniform on [-a, a) with that standard deviation. Square root and multiplication are
correctly rounded everywhere, so the bits agree on every platform.
"""

import math

import numpy as np
import numpy.typing as npt

from .spec import TableSpec

_VALUES_PER_COUNTER = 8
_CHUNK_VALUES = 1 << 17
"""Values generated at a time: 512 KiB of random words, whatever the range."""


def initial_rows(spec: TableSpec, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Return the initial values of rows start..stop-1 of the table, [stop - start, width]."""
    out = np.empty((stop - start, spec.width), np.float32)
    fill_initial_rows(spec, start, out)
    return out


def fill_initial_rows(spec: TableSpec, start: int, out: npt.NDArray[np.float32]) -> None:
    """Write the initial values of rows start, start + 1, ... of the table into `out` [n, width]."""
    counters_per_row = -(-spec.width // _VALUES_PER_COUNTER)
    key = np.array([spec.seed, spec.layer], np.uint64)
    stream = np.random.Philox(key=key, counter=start * counters_per_row)
    scale = np.float32(np.float32(spec.init_std * math.sqrt(3.0)) * 2.0**-23)
    chunk_rows = max(1, _CHUNK_VALUES // (counters_per_row * _VALUES_PER_COUNTER))
    for first in range(0, len(out), chunk_rows):
        rows = out[first : first + chunk_rows]
        words = stream.random_raw((len(rows), counters_per_row * 4))
        halves = words.view(np.int32)
        halves >>= 8
        rows[...] = halves[:, : spec.width]
        rows *= scale
