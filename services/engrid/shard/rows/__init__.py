"""The rows of partitions, live and sealed, and snapshots of them."""
