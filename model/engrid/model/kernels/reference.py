"""The three functions in torch: what they mean, and what runs where there is no GPU. Shapes as in __init__.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from engrid.tables.spec import FP8_SCALES, FP8_VALUES

SCORE_FLOOR = 1e-6


def row_ids(grams: Tensor, multipliers_N: Tensor, primes_OK: Tensor, offsets_OK: Tensor) -> Tensor:
    """Products of ids and multipliers folded by XOR from the newest token back; K primes per order."""
    products = grams * multipliers_N.reshape(-1, *[1] * (grams.dim() - 1))
    rows, key = [], products[0]
    for product, primes_K, offsets_K in zip(products[1:], primes_OK, offsets_OK, strict=True):
        key = key ^ product
        rows.append(offsets_K + key[..., None] % primes_K)
    return torch.cat(rows, dim=-1)


def dequantise(raw_UB: Tensor, inverse_TH: Tensor, dtype: torch.dtype) -> Tensor:
    """Value times scale in float32, then rounded to dtype."""
    if inverse_TH.numel() and not -1 <= int(inverse_TH.min()) <= int(inverse_TH.max()) < len(raw_UB):
        raise ValueError(
            f"inverse holds {int(inverse_TH.min())} to {int(inverse_TH.max())}: give -1 to {len(raw_UB) - 1}"
        )
    values = raw_UB[:, :FP8_VALUES].view(torch.float8_e4m3fn).float().view(-1, FP8_SCALES, FP8_VALUES // FP8_SCALES)
    scales = raw_UB[:, FP8_VALUES:].view(torch.float8_e8m0fnu).float()
    rows = (values * scales[:, :, None]).flatten(1).to(dtype)
    out = rows.new_zeros(*inverse_TH.shape, FP8_VALUES)
    living = inverse_TH >= 0
    out[living] = rows[inverse_TH[living]]
    return out


def gated(
    h: Tensor, keys: Tensor, values: Tensor, query_weight_MD: Tensor, key_weight_MD: Tensor, dead: Tensor | None
) -> tuple[Tensor, Tensor]:
    """RMSNorm's default eps: finfo of the type it computes in, so float32's for bfloat16 too."""
    width, scores = h.shape[-1:], []
    for branch, (query_weight, key_weight) in enumerate(zip(query_weight_MD, key_weight_MD, strict=True)):
        query = F.rms_norm(h[..., branch, :], width, query_weight)
        key = F.rms_norm(keys[..., branch, :], width, key_weight)
        scores.append((query * key).sum(-1))
    score = torch.stack(scores, dim=-1) / math.sqrt(h.shape[-1])
    gates = torch.sigmoid(score.sign() * score.abs().clamp_min(SCORE_FLOOR).sqrt())
    if dead is not None:
        gates = gates.masked_fill(dead[..., None], 0.0)
    return gates, gates[..., None] * values[..., None, :]
