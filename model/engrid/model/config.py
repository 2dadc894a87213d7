"""What a model is: its transformer, and its Engram memory if it has one. Travels as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from engrid.addressing.spec import EngramSpec
from engrid.tables import check_float, check_int, check_keys


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer with MoE feed-forward layers and, on some layers, an Engram."""

    vocab_size: int
    """Token ids the embedding and the head know."""
    d_model: int
    layers: int
    heads: int
    """Query heads; d_model / heads is a head's width."""
    kv_heads: int
    """Key and value heads, each shared by heads / kv_heads queries."""
    context: int
    """Longest sequence, in tokens."""
    experts: int
    """Routed experts per layer."""
    top_k: int
    """Routed experts a token goes to."""
    shared_experts: int
    """Experts every token goes to."""
    expert_width: int
    """Hidden values of one expert."""
    rope_theta: float = 10_000.0
    seed: int = 0
    """Of the initial weights."""
    engram: EngramSpec | None = None
    """None: the same transformer without memory."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "layers", "heads", "kv_heads", "context", "experts", "expert_width"):
            check_int(name, asdict(self)[name], 1, 2**31)
        for name in ("shared_experts", "seed", "top_k"):
            check_int(name, asdict(self)[name], 0, 2**63)
        check_float("rope_theta", self.rope_theta, 1e-30, 1e30)
        if self.d_model % self.heads or self.heads % self.kv_heads or self.d_model // self.heads % 2:
            raise ValueError(
                f"d_model {self.d_model}, heads {self.heads}, kv_heads {self.kv_heads}: heads must divide d_model into "
                "even widths, and kv_heads must divide heads"
            )
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k {self.top_k}: must be 1 to experts ({self.experts})")
        if self.engram and max(self.engram.layers) >= self.layers:
            raise ValueError(f"engram layers {self.engram.layers}: the model has layers 0..{self.layers - 1}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        check_keys("ModelConfig", values, {field.name for field in fields(cls)})
        engram = values["engram"]
        return cls(**{**values, "engram": EngramSpec.from_json(engram) if engram is not None else None})
