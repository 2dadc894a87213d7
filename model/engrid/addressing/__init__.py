"""From token ids to row ids: canonical ids, hashing, lookups (docs/engram.md, 1 to 5). numpy alone, but for the tokenizer's
library in `canonical`."""

from .hashing import LayerHash, NgramHasher
from .lookup import DEAD, Lookup
from .spec import PRESETS, EngramSpec

__all__ = ["DEAD", "PRESETS", "EngramSpec", "LayerHash", "Lookup", "NgramHasher"]
