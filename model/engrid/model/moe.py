"""Mixture of experts after DeepSeekMoE: shared experts for every token, routed ones for the top k.

Load is balanced by a bias per expert that counts only in the choice of experts, never in their weights, and is moved
a little after each step towards even load (DeepSeek-V3): no auxiliary loss pulls on the model.

Shapes: N tokens, D model width, E routed experts, K experts per token, F hidden values of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ModelConfig

BIAS_STEP = 0.001


class MoE(nn.Module):
    """A feed-forward layer of which each token uses a part."""

    bias: Tensor
    load: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.router = nn.Linear(config.d_model, config.experts, bias=False)
        self.up = nn.Parameter(torch.empty(config.experts, config.d_model, 2 * config.expert_width))
        self.down = nn.Parameter(torch.empty(config.experts, config.expert_width, config.d_model))
        shared = config.shared_experts * config.expert_width
        self.shared_up = nn.Linear(config.d_model, 2 * shared, bias=False) if shared else None
        self.shared_down = nn.Linear(shared, config.d_model, bias=False) if shared else None
        self.register_buffer("bias", torch.zeros(config.experts))
        self.register_buffer("load", torch.zeros(config.experts), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """In training, `load` holds the tokens each expert got in the last call."""
        x_ND = x_BTD.flatten(0, 1)
        scores_NE = torch.sigmoid(self.router(x_ND))
        chosen_NK = (scores_NE.detach() + self.bias).topk(self.top_k, dim=-1).indices
        weights_NK = scores_NE.gather(1, chosen_NK)
        weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        out_ND = self._routed(x_ND, chosen_NK, weights_NK)
        if self.shared_up is not None and self.shared_down is not None:
            out_ND = out_ND + self.shared_down(_swiglu(self.shared_up(x_ND)))
        return out_ND.view_as(x_BTD)

    def _routed(self, x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Tokens sorted by expert, so that each expert is two matrix products over a slice."""
        expert, order = chosen_NK.flatten().sort(stable=True)
        token = order // self.top_k
        counts = torch.bincount(expert, minlength=len(self.up))
        if self.training:
            self.load.copy_(counts)
        slices = torch.split(x_ND[token], counts.tolist())
        parts = [_swiglu(part @ up) @ down for part, up, down in zip(slices, self.up, self.down, strict=True)]
        weighted = torch.cat(parts) * weights_NK.flatten()[order, None]
        return torch.zeros_like(x_ND).index_add_(0, token, weighted)

    @torch.no_grad()
    def balance(self, load_E: Tensor) -> None:
        """Moves the bias towards even load: up for experts below the mean of tokens [E], down for those above."""
        self.bias += BIAS_STEP * torch.sign(load_E.float().mean() - load_E)


def _swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value
