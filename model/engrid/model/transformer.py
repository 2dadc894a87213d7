"""The language model: a decoder-only transformer with MoE layers, and an Engram before the attention of some.

Shapes: B sequences, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attention, KeyValueCache, rotary_table
from .config import ModelConfig
from .engram import EngramLayer
from .moe import MoE
from .rows import PendingRows

INIT_STD = 0.02


class DecodeState:
    """What decoding carries from one chunk of tokens to the next, apart from the n-grams (NgramHasher's state)."""

    def __init__(self, model: Transformer, batch: int) -> None:
        like = model.embedding.weight
        self.length = 0
        """Tokens seen."""
        self.chunk = 0
        """Of these the last, which can be forgotten."""
        self.attention = [KeyValueCache(model.config, batch, like) for _ in model.blocks]
        self.conv = {int(layer): engram.start(batch) for layer, engram in model.engrams.items()}  # type: ignore[operator]

    def advance(self, tokens: int) -> None:
        """Tokens were read."""
        self.length, self.chunk = self.length + tokens, tokens

    def rewind(self, tokens: int) -> None:
        """Forgets the last tokens, at most those of the last chunk: all is as if they had not been read.

        Their keys and values lie beyond `length`, where the next tokens overwrite them before anything reads there.
        """
        assert 0 <= tokens <= self.chunk, f"{tokens} tokens to forget, the last chunk had {self.chunk}"
        self.length, self.chunk = self.length - tokens, self.chunk - tokens
        self.conv = {layer: conv[:, : conv.shape[1] - tokens] for layer, conv in self.conv.items()}


class Block(nn.Module):
    """Attention and MoE, each on the normalised stream and added to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.d_model)
        self.moe = MoE(config)

    def forward(self, x_BTD: Tensor, cos_sin: Tensor, cache: KeyValueCache | None, start: int) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_sin, cache, start)
        return x_BTD + self.moe(self.moe_norm(x_BTD))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Token ids in, logits out. Asks for a layer's rows only when it reaches the layer."""

    rotary: Tensor

    def __init__(self, config: ModelConfig) -> None:
        """Weights depend on the config's seed alone, and the backbone's not on whether there is an Engram."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.d_model)
        spec = config.engram
        self.engrams = nn.ModuleDict(
            {str(layer): EngramLayer(config.d_model, spec.embed_width, spec.max_ngram) for layer in spec.layers}
            if spec
            else {}
        )
        self.register_buffer("rotary", rotary_table(config), persistent=False)
        self._initialise(config)

    def _initialise(self, config: ModelConfig) -> None:
        generators = {engram: torch.Generator().manual_seed(config.seed + engram) for engram in (False, True)}
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and not name.endswith("conv_weight"):
                narrow = name.endswith(("out.weight", "down", "shared_down.weight"))
                std = INIT_STD / math.sqrt(2 * config.layers) if narrow else INIT_STD
                nn.init.normal_(parameter, 0.0, std, generator=generators[name.startswith("engrams")])
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        ids_BT: Tensor,
        pending: PendingRows | None = None,
        state: DecodeState | None = None,
        *,
        dead_BT: Tensor | None = None,
        gates: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Logits [B, T, V].

        pending: the rows of these tokens, where the model has an Engram. state: the tokens before these; it is
        moved on. dead_BT: True for dead tokens. gates: filled with [B, T, M] per Engram layer.
        """
        length = ids_BT.shape[1]
        start = state.length if state else 0
        if start + length > self.config.context:
            raise ValueError(f"{start + length} tokens are longer than the context of {self.config.context}")
        if self.engrams and pending is None:
            raise ValueError("this model has an Engram: give the pending rows of the tokens")
        x_BTD = self.embedding(ids_BT)
        cos_sin = self.rotary[:, start : start + length]
        for layer, block in enumerate(self.blocks):
            if pending is not None and str(layer) in self.engrams:
                x_BTD = self._remember(layer, x_BTD, pending, state, dead_BT, gates)
            x_BTD = block(x_BTD, cos_sin, state.attention[layer] if state else None, start)
        if state:
            state.advance(length)
        return F.linear(self.norm(x_BTD), self.embedding.weight)

    def _remember(
        self,
        layer: int,
        x_BTD: Tensor,
        pending: PendingRows,
        state: DecodeState | None,
        dead_BT: Tensor | None,
        gates: dict[int, Tensor] | None,
    ) -> Tensor:
        engram = self.engrams[str(layer)]
        assert isinstance(engram, EngramLayer)
        rows: Tensor = pending.rows(layer)
        rows_BTHW = rows.view(*x_BTD.shape[:2], *rows.shape[1:])
        conv = state.conv[layer] if state else engram.start(len(x_BTD))
        out_BTMD, conv, gate_BTM = engram(x_BTD[:, :, None], rows_BTHW, conv, dead_BT=dead_BT, keep=x_BTD.shape[1])
        if state:
            state.conv[layer] = conv
        if gates is not None:
            gates[layer] = gate_BTM
        return x_BTD + out_BTMD[:, :, 0]  # type: ignore[no-any-return]

    def expert_loads(self) -> Tensor:
        """Tokens each expert got in the last training step: [layers, experts]."""
        return torch.stack([block.moe.load for block in self.blocks])  # type: ignore[union-attr,misc]

    def balance(self, loads: Tensor) -> None:
        """Moves every MoE's bias by the loads [layers, experts] of all workers."""
        for block, load in zip(self.blocks, loads, strict=True):
            block.moe.balance(load)  # type: ignore[union-attr,operator]
