"""The three pieces of the model that have a GPU kernel beside their torch definition (docs/kernels.md).

    reference.py    torch; what the other modules are compared with, and what runs on a CPU
    cuda.py         the same three functions over hash.py, dequant.py and gate.py, which need triton

`on` picks; nothing else does. Importing this package imports no triton: that waits for a CUDA device.

Shapes: N tokens of the longest n-gram (x_0 the newest), O = N-1 orders, K heads per order, H = O*K rows per token, U
distinct rows of B bytes, T tokens, M residual branches, D model width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from . import reference


class Kernels(Protocol):
    """What both modules give. Tensors of one call lie on one device; `...` is any number of dimensions."""

    def row_ids(self, grams: Tensor, multipliers_N: Tensor, primes_OK: Tensor, offsets_OK: Tensor) -> Tensor:
        """Row ids int64 [..., H] of grams int64 [N, ...] (docs/engram.md, 4).

        Ids are not negative (dead tokens are pad ids by now) and no product overflows.
        """

    def dequantise(self, raw_UB: Tensor, inverse_TH: Tensor, dtype: torch.dtype) -> Tensor:
        """Values [T, H, 256], float32 or bfloat16, of rows uint8 [U, 264] (docs/engram.md, 8).

        inverse_TH: int64, which of the U rows stands at each place; -1, a dead position, gives zeros. Any other value
        outside 0..U-1 never gives zeros: a ValueError from the reference, NaN from the kernel, which does not make the
        host wait to look.
        """

    def gated(
        self,
        h: Tensor,
        keys: Tensor,
        values: Tensor,
        query_weight_MD: Tensor,
        key_weight_MD: Tensor,
        dead: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Gates [..., M] and u = gate * v [..., M, D] of h and keys [..., M, D] and values [..., D] (docs/engram.md, 6).

        The weights are the norms' of h and of the keys. dead: bool [...], True where the gate is 0. Differentiable.
        """


def on(device: torch.device) -> Kernels:
    """The kernels of a device: Triton's for CUDA, torch for all others."""
    if device.type != "cuda":
        return reference
    from . import cuda

    return cuda
