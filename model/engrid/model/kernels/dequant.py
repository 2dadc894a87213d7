"""264-byte rows to values, each distinct row read by every place that wants it.

    raw   [U, 264]    256 e4m3 codes | 8 ue8m0 scales       out [T*H, 256]
    a program: BLOCK places x 8 groups x 32 values; a group shares its scale byte

A code is decoded by its bits, as Triton knows the type from sm_89 on only. Its seven low bits, put where float32 has the
low end of its exponent and the top of its mantissa, are the value times 2^-120, subnormal codes included, since both
formats have implicit ones and subnormals of the same kind:

    code        s eeee mmm           magnitude   0000eeee mmm 00000000000000000000   * 2^120 -> value, exact
    scale byte  b in 1..254          float32     0 bbbbbbbb 0...    = 2^(b-127);   b = 0: the subnormal 2^-127

The product has four significant bits, so in float32 it is exact or overflows to infinity. It and the scale may be
subnormal: multiplications here must not flush to zero (Triton emits none that does; a test reads the PTX). bfloat16 is
rounded to nearest even by hand: its subnormals are coarser than the product, and the interpreter's cast truncates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engrid.tables.spec import FP8_VALUES

BLOCK = 8


@triton.jit
def dequantise_kernel(
    raw: tl.tensor,
    inverse: tl.tensor,
    out: tl.tensor,
    places: tl.tensor,
    rows: tl.tensor,
    BFLOAT16: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Dead places are code 0 times scale 0; an index outside the rows reads as the NaN scale."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < places
    index = tl.load(inverse + place, mask=inside, other=-1)
    found = (index >= 0) & (index < rows)
    group = tl.arange(0, 8)
    column = group[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    start = raw + index * 264
    code = tl.load(start[:, None, None] + column, mask=found[:, None, None], other=0).to(tl.uint32)
    scale = tl.load(start[:, None] + 256 + group[None, :], mask=found[:, None], other=0).to(tl.uint32)
    scale = tl.where((found | (index == -1))[:, None], scale, 255)[:, :, None]

    magnitude = ((code & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    power = tl.where(scale == 0, 0x00400000, scale << 23).to(tl.uint32).to(tl.float32, bitcast=True)
    bits = (magnitude * power).to(tl.uint32, bitcast=True) | ((code & 0x80) << 24)
    bits = tl.where(((code & 0x7F) == 0x7F) | (scale == 255), 0x7FC00000, bits).to(tl.uint32)
    if BFLOAT16:
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        value = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        value = bits.to(tl.float32, bitcast=True)
    tl.store(out + place[:, None, None] * 256 + column, value, mask=inside[:, None, None])


def dequantise(raw_UB: Tensor, inverse_TH: Tensor, dtype: torch.dtype) -> Tensor:
    """See Kernels."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"rows are decoded to float32 or bfloat16, not {dtype}")
    out = torch.empty(*inverse_TH.shape, FP8_VALUES, dtype=dtype, device=raw_UB.device)
    places = inverse_TH.numel()
    with torch.cuda.device_of(raw_UB):  # type: ignore[no-untyped-call]
        dequantise_kernel[(triton.cdiv(places, BLOCK),)](
            raw_UB.contiguous(),
            inverse_TH.contiguous(),
            out,
            places,
            len(raw_UB),
            BFLOAT16=dtype == torch.bfloat16,
            BLOCK=BLOCK,
        )
    return out
