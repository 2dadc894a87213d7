"""What changes the store: tables, versions and checkpoints. Needs neither torch nor Ray.

A reader or a trainer needs `engrid.client` alone; whoever makes tables, publishes or saves needs this beside it.
"""

from .tables import create_tables, drop_tables, export_partition, load_partition, spread_placement
from .versions import prune_versions, publish_version, rollback_version

__all__ = [
    "create_tables",
    "drop_tables",
    "export_partition",
    "load_partition",
    "prune_versions",
    "publish_version",
    "rollback_version",
    "spread_placement",
]
