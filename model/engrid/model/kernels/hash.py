"""Row ids of n-grams. A program takes BLOCK positions and all orders and heads; a key stays in registers from order to order.

grams   [N, P]      one load per position and order, side by side across a warp
out     [P, (N-1)K] a [BLOCK, K] tile per order: K neighbours of 8 bytes fill whole 32-byte sectors
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128


@triton.jit
def row_ids_kernel(
    grams: tl.tensor,
    multipliers: tl.tensor,
    primes: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    positions: tl.tensor,
    ORDERS: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Keys are below 2^63, so the unsigned remainder, the cheaper one, is torch's."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < positions
    head = tl.arange(0, PADDED_HEADS)
    real = head < HEADS
    key = tl.load(grams + position, mask=inside, other=0) * tl.load(multipliers)
    at = position
    for order in tl.static_range(ORDERS):
        at += positions
        key ^= tl.load(grams + at, mask=inside, other=0) * tl.load(multipliers + order + 1)
        prime = tl.load(primes + order * HEADS + head, mask=real, other=1).to(tl.uint64)
        offset = tl.load(offsets + order * HEADS + head, mask=real, other=0)
        row = offset[None, :] + (key.to(tl.uint64)[:, None] % prime[None, :]).to(tl.int64)
        place = position[:, None] * (ORDERS * HEADS) + order * HEADS + head[None, :]
        tl.store(out + place, row, mask=inside[:, None] & real[None, :])


def row_ids(grams: Tensor, multipliers_N: Tensor, primes_OK: Tensor, offsets_OK: Tensor) -> Tensor:
    """See Kernels."""
    orders, heads = primes_OK.shape
    out = grams.new_empty(*grams.shape[1:], orders * heads)
    positions = grams[0].numel()
    with torch.cuda.device_of(grams):  # type: ignore[no-untyped-call]
        row_ids_kernel[(triton.cdiv(positions, BLOCK),)](
            grams.contiguous(),
            multipliers_N.contiguous(),
            primes_OK.contiguous(),
            offsets_OK.contiguous(),
            out,
            positions,
            ORDERS=orders,
            HEADS=heads,
            PADDED_HEADS=triton.next_power_of_2(heads),
            BLOCK=BLOCK,
        )
    return out
