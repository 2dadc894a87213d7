"""The client of Engrid's memory: rows by row id from many shards, gradients back. Needs numpy and grpc only.

with MemoryClient("file:/run/engrid") as memory:
    pending = memory.prefetch([RowLookup("engram.1", row_ids, keys)])
    ...                                    # compute meanwhile
    rows = pending.rows("engram.1")        # uint8 [T, heads, row_bytes]
"""

from .admin import create_tables, drop_tables, export_partition, load_partition, spread_placement
from .attempts import Attempt, claim_attempt
from .batch import Lookup, RowLookup
from .client import MemoryClient
from .config import ClientConfig
from .pending import Pending, Traffic
from .pins import Pin
from .training import TrainingRun
from .versions import prune_versions, publish_version, rollback_version

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
    "create_tables",
    "drop_tables",
    "export_partition",
    "load_partition",
    "prune_versions",
    "publish_version",
    "rollback_version",
    "spread_placement",
]
