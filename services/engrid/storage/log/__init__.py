"""An append-only log of records: segments, checksums, one sync for all that wait."""
