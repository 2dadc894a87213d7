"""The client of Engrid's memory: rows by row id from many shards, gradients back. Needs numpy and grpc only.

with MemoryClient("file:/run/engrid") as memory:
    pending = memory.prefetch([RowLookup("engram.1", row_ids, keys)])
    ...                                    # compute meanwhile
    rows = pending.rows("engram.1")        # uint8 [T, heads, row_bytes]
"""

from .attempts import Attempt, claim_attempt
from .batch import Lookup, RowLookup
from .client import MemoryClient
from .config import ClientConfig
from .pending import Pending, Traffic
from .pins import Pin
from .training import TrainingRun

__all__ = [
    "Attempt",
    "ClientConfig",
    "Lookup",
    "MemoryClient",
    "Pending",
    "Pin",
    "RowLookup",
    "Traffic",
    "TrainingRun",
    "claim_attempt",
]
