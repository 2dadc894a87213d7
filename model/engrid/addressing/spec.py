"""What addresses the rows of a model's Engram memory, and the published shapes. Travels as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, get_args

from engrid.tables import RowFormat, check_float, check_int, check_keys


@dataclass(frozen=True, kw_only=True)
class EngramSpec:
    """The memory of one model: which layers have a table, and how n-grams address its rows (docs/engram.md, 2-4)."""

    layers: tuple[int, ...]
    """Transformer layers that have an Engram layer, 0-based, in the order that hands out primes."""
    max_ngram: int
    """Largest n-gram order N; orders 2..N are used."""
    heads: int
    """Hash heads K per order."""
    vocab_size: tuple[int, ...]
    """Rows per head for each order 2..N, before rounding up to primes."""
    row_width: int
    """Values per row."""
    row_format: RowFormat = "float32"
    pad_token_id: int = 2
    """Raw id whose canonical id stands before a sequence starts."""
    seed: int = 0
    """Of the hash multipliers and the initial rows."""
    init_std: float = 0.02
    """Standard deviation of the initial rows."""

    def __post_init__(self) -> None:
        for name in ("layers", "vocab_size"):
            object.__setattr__(self, name, check_ints(name, getattr(self, name)))
        for name, least in {"max_ngram": 0, "heads": 0, "row_width": 0, "pad_token_id": 0, "seed": 0}.items():
            check_int(name, getattr(self, name), least, 2**63)
        if self.row_format not in get_args(RowFormat):
            raise ValueError(f"row_format is {self.row_format!r}; give one of {', '.join(get_args(RowFormat))}")
        check_float("init_std", self.init_std, 0.0, 1e30)
        if not self.layers or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0:
            raise ValueError(f"layers {self.layers}: give at least one layer, each once, from 0")
        if self.max_ngram < 2:
            raise ValueError(f"max_ngram {self.max_ngram}: the smallest order is 2")
        if self.heads < 1 or self.row_width < 1:
            raise ValueError(f"heads {self.heads}, row_width {self.row_width}: both must be at least 1")
        if len(self.vocab_size) != self.max_ngram - 1 or min(self.vocab_size) < 2:
            raise ValueError(
                f"vocab_size {self.vocab_size}: give rows per head (2 or more) for each order 2..{self.max_ngram}"
            )

    @property
    def orders(self) -> range:
        """2..N."""
        return range(2, self.max_ngram + 1)

    @property
    def heads_per_token(self) -> int:
        """(N-1) * K: rows read per token and layer."""
        return (self.max_ngram - 1) * self.heads

    @property
    def embed_width(self) -> int:
        """Values of a token's concatenated rows."""
        return self.heads_per_token * self.row_width

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        check_keys("EngramSpec", values, {field.name for field in fields(cls)})
        return cls(**values)


def check_ints(field: str, values: object) -> tuple[int, ...]:
    """The values as a tuple; raises ValueError, naming the field, unless they are integers."""
    if not isinstance(values, list | tuple):
        raise ValueError(f"{field} is {values!r}; give an array of integers")  # noqa: TRY004 - one error type for JSON
    for index, value in enumerate(values):
        check_int(f"{field}[{index}]", value, -(2**63), 2**63)
    return tuple(values)


PRESETS = {
    "paper": EngramSpec(layers=(1, 15), max_ngram=3, heads=8, vocab_size=(646_400, 646_400), row_width=64),
    "v41": EngramSpec(
        layers=(1, 14),
        max_ngram=4,
        heads=8,
        vocab_size=(16_000_000, 16_000_000, 16_000_000),
        row_width=256,
        row_format="fp8_e4m3_ue8m0",
    ),
}
"""Published shapes (docs/engram.md, 8), hashed over DeepSeek's tokenizer."""
