"""Causal self-attention with rotary positions, grouped key/value heads and a cache.

Shapes: B sequences, T tokens, S tokens seen so far (cached and new), H query heads, G key/value heads, C head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ModelConfig


class KeyValueCache:
    """Keys and values of one layer, [B, G, context, C], filled from the left."""

    def __init__(self, config: ModelConfig, batch: int, like: Tensor) -> None:
        shape = (batch, config.kv_heads, config.context, config.d_model // config.heads)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)

    def extend(self, start: int, keys_BGTC: Tensor, values_BGTC: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new tokens at `start`; returns all up to them, [B, G, S, C]."""
        stop = start + keys_BGTC.shape[2]
        self.keys[:, :, start:stop] = keys_BGTC
        self.values[:, :, start:stop] = values_BGTC
        return self.keys[:, :, :stop], self.values[:, :, :stop]


def rotary_table(config: ModelConfig) -> Tensor:
    """cos and sin of every position's angles: [2, context, C/2]."""
    width = config.d_model // config.heads
    frequencies = config.rope_theta ** (-torch.arange(0, width, 2).float() / width)
    angles = torch.arange(config.context).float()[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x_BHTC: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates pairs (c, c + C/2) of each head by the position's angles [2, T, C/2]."""
    first, second = x_BHTC.chunk(2, dim=-1)
    cos, sin = cos_sin
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attention(nn.Module):
    """Multi-head attention over the past."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.width = config.d_model // config.heads
        self.qkv = nn.Linear(config.d_model, (config.heads + 2 * config.kv_heads) * self.width, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x_BTD: Tensor, cos_sin: Tensor, cache: KeyValueCache | None = None, start: int = 0) -> Tensor:
        """cos_sin: of these T positions. start: tokens in the cache."""
        batch, length, _ = x_BTD.shape
        heads = self.qkv(x_BTD).view(batch, length, -1, self.width).transpose(1, 2)
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        query, key = rotate(query, cos_sin), rotate(key, cos_sin)
        mask = None
        if cache is not None:
            key, value = cache.extend(start, key, value)
            if start and length > 1:
                mask = torch.ones(length, start + length, dtype=torch.bool, device=x_BTD.device).tril(start)
        seen = F.scaled_dot_product_attention(
            query,
            key.repeat_interleave(self.heads // self.kv_heads, dim=1),
            value.repeat_interleave(self.heads // self.kv_heads, dim=1),
            attn_mask=mask,
            is_causal=mask is None and length > 1,
        )
        return self.out(seen.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]
