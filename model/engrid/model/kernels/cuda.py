"""The three functions as Triton kernels."""

from .dequant import dequantise
from .gate import gated
from .hash import row_ids

__all__ = ["dequantise", "gated", "row_ids"]
