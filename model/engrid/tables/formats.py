"""Rows as bytes and rows as float32, for the three row formats. Bytes are little-endian.

float32, bfloat16    width values, nothing else
fp8_e4m3_ue8m0       | 256 x e4m3fn: sign 1, exponent 4 (bias 7), mantissa 3 | 8 x ue8m0: 2^(byte - 127) |
                     scale j belongs to values 32j..32j+31; scale byte 255 is NaN, 0 is 2^-127 (docs/engram.md, section 8)

e4m3fn has no infinity: 0x7F and 0xFF are NaN, the largest value is 448.
"""

import numpy as np
import numpy.typing as npt

from .spec import FP8_ROW_BYTES, FP8_SCALES, FP8_VALUES, RowFormat

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_GROUP = FP8_VALUES // FP8_SCALES
_FP8_BLOCK = 128
"""Rows decoded at a time: their 64-bit table indices (256 KiB) stay in the second-level cache."""


def _e4m3_values() -> Floats:
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, (codes & 7).astype(np.float64)
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    magnitude[(codes & 127) == 127] = np.nan
    return np.where(codes < 128, magnitude, -magnitude).astype(np.float32)


def _ue8m0_values() -> Floats:
    values = 2.0 ** (np.arange(256, dtype=np.float64) - 127)
    values[255] = np.nan
    return values.astype(np.float32)


E4M3 = _e4m3_values()
UE8M0 = _ue8m0_values()


def decode_rows(raw: Bytes, row_format: RowFormat, width: int, out: Floats | None = None) -> Floats:
    """Return the values of `raw` [n, row_bytes] as float32 [n, width].

    Written into `out` (C-contiguous) where given; else, for float32 rows, the result shares memory with `raw`.
    A product of an fp8 value and its scale is rounded once, to nearest even, into float32.
    """
    if row_format == "float32":
        values = raw.view(np.float32)
        if out is None:
            return values
        out[...] = values
        return out
    if out is None:
        out = np.empty((len(raw), width), np.float32)
    if row_format == "bfloat16":
        np.left_shift(raw.view(np.uint16), np.uint32(16), out=out.view(np.uint32))
        return out
    assert width == FP8_VALUES
    scales = UE8M0[raw[:, FP8_VALUES:]]
    grouped = out.reshape(-1, FP8_SCALES, _GROUP)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for start in range(0, len(raw), _FP8_BLOCK):
            block = slice(start, start + _FP8_BLOCK)
            np.take(E4M3, raw[block, :FP8_VALUES], out=out[block], mode="clip")
            grouped[block] *= scales[block, :, None]
    return out


def encode_rows(values: Floats, row_format: RowFormat) -> Bytes:
    """Return float32 `values` [n, width] as bytes [n, row_bytes], rounded to nearest even.

    fp8: each group of 32 gets the smallest power of two that brings its largest finite magnitude to 448 or less
    (any for zeros alone); NaN and infinity become NaN. For float32 rows the result shares memory with `values`.
    """
    if row_format == "float32":
        return np.ascontiguousarray(values).view(np.uint8)
    if row_format == "bfloat16":
        return _to_bfloat16(values).view(np.uint8)
    raw = np.empty((len(values), FP8_ROW_BYTES), np.uint8)
    groups = values.reshape(-1, FP8_SCALES, _GROUP)
    largest = np.where(np.isfinite(groups), np.abs(groups), np.float32(0)).max(axis=2)
    fraction, exponent = np.frexp(largest)
    scale = np.clip(exponent - 9 + (fraction > 0.875) + 127, 0, 254)  # 448 = 0.875 * 2^9
    raw[:, FP8_VALUES:] = scale
    scaled = groups * UE8M0[254 - scale][:, :, None]
    raw[:, :FP8_VALUES] = _to_e4m3(scaled).reshape(-1, FP8_VALUES)
    return raw


def _to_bfloat16(values: Floats) -> npt.NDArray[np.uint16]:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += bits
    rounded += 0x7FFF
    rounded >>= 16
    halves = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        halves[nan] = 0x7FC0
    return halves


def _to_e4m3(values: Floats) -> Bytes:
    """Nearest-even e4m3fn codes of values whose finite magnitudes are at most 448.

    Below 2^-6 codes count steps of 2^-9, the spacing of float32 at 2^14: adding 2^14 rounds to such a step.
    Above, the mantissa is rounded from 23 bits to 3 and the exponent's bias goes from 127 to 7.
    """
    magnitude = np.abs(values)
    bits = magnitude.view(np.uint32)
    small = (np.minimum(magnitude, np.float32(1)) + np.float32(2**14)).view(np.uint32) & 0xFF
    normal = ((bits + (bits >> 20 & 1) + 0x7FFFF) >> 20) - (120 << 3)
    codes = np.where(magnitude < np.float32(2**-6), small, normal).astype(np.uint8)
    codes[~np.isfinite(values)] = 0x7F
    return codes | np.where(np.signbit(values), np.uint8(0x80), np.uint8(0))
