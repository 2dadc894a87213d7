"""The Engram layer: rows of n-grams, gated by the hidden state and mixed in (docs/engram.md, section 6).

    e = the token's rows end to end          k_m = W_K[m] e          v = W_V e
    gate_m = sigmoid(signed_sqrt(RMSNorm(h_m) . RMSNorm(k_m) / sqrt(d)))
    u_m = gate_m v                           out_m = u_m + SiLU(conv(RMSNorm(u_m)))          h_m <- h_m + out_m

Shapes: B sequences, T tokens, M residual branches (1 for a plain stream), D model width, H rows per token,
W values per row, E = H*W, S conv tokens carried.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import kernels

CONV_KERNEL = 4
CONV_EPS = 1e-5


class EngramLayer(nn.Module):
    """Adds what the memory says about the last n-grams to the hidden state."""

    def __init__(self, d_model: int, embed_width: int, max_ngram: int, *, branches: int = 1) -> None:
        """embed_width: E. max_ngram: N, the conv's dilation. Conv weights start at zero, so the layer starts as
        out = u."""
        super().__init__()
        self.branches = branches
        self.dilation = max_ngram
        self.carried = (CONV_KERNEL - 1) * max_ngram
        """Tokens of normalised u a decoder carries, S."""
        self.value_proj = nn.Linear(embed_width, d_model)
        self.key_projs = nn.ModuleList(nn.Linear(embed_width, d_model) for _ in range(branches))
        self.key_norms = nn.ModuleList(nn.RMSNorm(d_model) for _ in range(branches))
        self.query_norms = nn.ModuleList(nn.RMSNorm(d_model) for _ in range(branches))
        self.conv_norms = nn.ModuleList(nn.RMSNorm(d_model, eps=CONV_EPS) for _ in range(branches))
        self.conv_weight = nn.Parameter(torch.zeros(CONV_KERNEL, branches, d_model))

    def start(self, batch: int) -> Tensor:
        """The conv's state before any token: zeros [B, S, M, D]."""
        return self.conv_weight.new_zeros(batch, self.carried, *self.conv_weight.shape[1:])

    def gate(self, h_BTMD: Tensor, e_BTE: Tensor, dead_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """How far each branch lets the memory in, 0..1: [B, T, M]; and what it lets in, u [B, T, M, D].

        The formula is in kernels/reference.py, which runs here on a CPU; on CUDA it is one kernel.
        """
        keys = [project(e_BTE) for project in self.key_projs]
        keys_BTMD = keys[0][:, :, None] if self.branches == 1 else torch.stack(keys, dim=2)
        return kernels.on(h_BTMD.device).gated(
            h_BTMD, keys_BTMD, self.value_proj(e_BTE), _weights(self.query_norms), _weights(self.key_norms), dead_BT
        )

    def forward(
        self,
        h_BTMD: Tensor,
        rows_BTHW: Tensor,
        state_BSMD: Tensor,
        *,
        dead_BT: Tensor | None = None,
        keep: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What to add to h [B, T, M, D]; the conv's next state [B, S, M, D]; the gates [B, T, M].

        dead_BT: True where the token is dead; its gate is 0. keep: the next state is longer by this many tokens, and
        cut off that many tokens earlier it is the state there: so tokens can be forgotten again.
        """
        e_BTE = rows_BTHW.flatten(2)
        gate_BTM, u_BTMD = self.gate(h_BTMD, e_BTE, dead_BT)
        normed = torch.stack([norm(u_BTMD[:, :, branch]) for branch, norm in enumerate(self.conv_norms)], dim=2)
        window = torch.cat([state_BSMD[:, -self.carried :], normed], dim=1)
        state_BSMD = window[:, -(self.carried + keep) :]
        return u_BTMD + F.silu(self._conv(window, u_BTMD.shape[1])), state_BSMD, gate_BTM

    def _conv(self, window: Tensor, length: int) -> Tensor:
        """Causal, depthwise, dilated: the last tap is the token itself."""
        taps = [window[:, tap * self.dilation :][:, :length] * self.conv_weight[tap] for tap in range(CONV_KERNEL)]
        return torch.stack(taps).sum(0)


def _weights(norms: nn.ModuleList) -> Tensor:
    """[M, D]."""
    return torch.stack([norm.weight for norm in norms])  # type: ignore[misc]
