"""The gate, from h and the projections to gate * v, without the normalised h and keys ever being written.

A norm is one number per row, so it can be taken out of the dot product, and one pass over D gives all three sums:

    s = sum(h w_q k w_k) / (sqrt(mean h^2 + eps) * sqrt(mean k^2 + eps) * sqrt(D))

    a program: BLOCK_T tokens of one branch, BLOCK_D columns at a time; sums stay in registers, as float32
    then a second walk over D writes u = gate * v; the branches of a token are neighbouring programs, so v comes
    from memory once and from the second-level cache for the others

Training goes through `_Gated`: forward is the kernel, backward runs the reference again on the saved inputs and takes its
gradients, so that there is one definition of them. It costs the reference's forward once more and saves its activations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference

EPS = torch.finfo(torch.float32).eps
"""RMSNorm's default for all types that are computed in float32."""
SCORE_FLOOR = tl.constexpr(reference.SCORE_FLOOR)
TILE = 2048
"""Values of h a program holds at a time: 16 for each of 128 threads."""


def blocks(width: int) -> tuple[int, int]:
    """BLOCK_T and BLOCK_D of a model width: whole rows where several fit into a tile, else a row in pieces."""
    block_d = min(1024, int(triton.next_power_of_2(width)))
    return min(16, TILE // block_d), block_d


@triton.jit
def gated_kernel(
    h: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    query_weight: tl.tensor,
    key_weight: tl.tensor,
    dead: tl.tensor,
    gates: tl.tensor,
    u: tl.tensor,
    tokens: tl.tensor,
    eps: tl.tensor,
    inverse_root: tl.tensor,
    M: tl.constexpr,
    D: tl.constexpr,
    HAS_DEAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """inverse_root: 1 / sqrt(D). NaN anywhere in a row reaches its gate, as in torch."""
    branch = tl.program_id(0) % M
    token = (tl.program_id(0) // M).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < tokens
    row = (token * M + branch)[:, None] * D
    query_squares = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    key_squares = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    products = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)[None, :]
        mask = inside[:, None] & (column < D)
        query = tl.load(h + row + column, mask=mask, other=0.0).to(tl.float32)
        key = tl.load(keys + row + column, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(query_weight + branch * D + column, mask=column < D, other=0.0).to(tl.float32)
        weight *= tl.load(key_weight + branch * D + column, mask=column < D, other=0.0).to(tl.float32)
        query_squares += query * query
        key_squares += key * key
        products += query * key * weight
    query_norm = tl.rsqrt(tl.sum(query_squares, axis=1) / D + eps)
    key_norm = tl.rsqrt(tl.sum(key_squares, axis=1) / D + eps)
    score = tl.sum(products, axis=1) * query_norm * key_norm * inverse_root
    size = tl.abs(score)
    # Not tl.maximum: compiled, it drops NaN; the interpreter, which keeps it, would not show that.
    root = tl.sqrt(tl.where(size < SCORE_FLOOR, SCORE_FLOOR, size))
    root = tl.where(score < 0, -root, tl.where(score == 0, 0.0, root))
    gate = 1.0 / (1.0 + tl.exp(-root))
    if HAS_DEAD:
        gate = tl.where(tl.load(dead + token, mask=inside, other=0) != 0, 0.0, gate)
    tl.store(gates + token * M + branch, gate, mask=inside)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)[None, :]
        mask = inside[:, None] & (column < D)
        value = tl.load(values + token[:, None] * D + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(u + row + column, gate[:, None] * value, mask=mask)


def gated(
    h: Tensor, keys: Tensor, values: Tensor, query_weight_MD: Tensor, key_weight_MD: Tensor, dead: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See Kernels. The kernel computes in float32, so float64 goes to the reference."""
    if h.dtype == torch.float64:
        return reference.gated(h, keys, values, query_weight_MD, key_weight_MD, dead)
    gates, u = _Gated.apply(h, keys, values, query_weight_MD, key_weight_MD, dead)  # type: ignore[no-untyped-call]
    return gates, u


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        return _launch(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gates_gradient: Tensor, u_gradient: Tensor) -> tuple[Tensor | None, ...]:
        *saved, dead = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:-1]
        inputs = [each.detach().requires_grad_(needs) for each, needs in zip(saved, wanted, strict=True)]
        with torch.enable_grad():
            h, keys, values, query_weight_MD, key_weight_MD = inputs
            outputs = reference.gated(h, keys, values, query_weight_MD, key_weight_MD, dead)
        leaves = [each for each in inputs if each.requires_grad]
        gradients = iter(torch.autograd.grad(outputs, leaves, (gates_gradient, u_gradient), allow_unused=True))
        return (*[next(gradients) if needs else None for needs in wanted], None)


def _launch(
    h: Tensor, keys: Tensor, values: Tensor, query_weight_MD: Tensor, key_weight_MD: Tensor, dead: Tensor | None
) -> tuple[Tensor, Tensor]:
    branches, width = query_weight_MD.shape
    gates, u = h.new_empty(h.shape[:-1]), h.new_empty(h.shape)
    tokens = gates.numel() // branches
    block_t, block_d = blocks(width)
    with torch.cuda.device_of(h):  # type: ignore[no-untyped-call]
        gated_kernel[(triton.cdiv(tokens, block_t) * branches,)](
            h.contiguous(),
            keys.contiguous(),
            values.contiguous(),
            query_weight_MD.contiguous(),
            key_weight_MD.contiguous(),
            gates if dead is None else dead.contiguous().view(torch.uint8),
            gates,
            u,
            tokens,
            EPS,
            1.0 / math.sqrt(width),
            M=branches,
            D=width,
            HAS_DEAD=dead is not None,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
        )
    return gates, u
