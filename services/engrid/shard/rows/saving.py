"""A snapshot swept to disk: the loop between snapshot.py, which knows no file, and storage, which knows no push."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engrid.shard.core.messages import PartitionKey
from engrid.storage.disk import Disk
from engrid.storage.partition import PartitionWriter, SavedPartition

from .partitions import PartitionRows


def save_snapshot(
    part: PartitionRows,
    disk: Disk,
    folder: str,
    key: PartitionKey,
    *,
    step: int,
    attempt: int,
    watermarks: Mapping[int, int],
) -> SavedPartition:
    """Sweeps the snapshot that `part` began into files under `folder`, durable when this returns.

    The snapshot is not settled: whether the checkpoint is published is known only when all shards have saved. Raises
    OSError or SnapshotGivenUpError; the pushes that wait go on then.
    """
    snapshot = part.snapshot
    assert snapshot is not None, f"{key[0]}[{key[1]}] has begun no snapshot"
    like = part.rows.arrays() | ({"ids": np.empty(0, np.int64)} if snapshot.incremental else {})
    writer = None
    try:
        writer = PartitionWriter(
            disk,
            folder,
            table=key[0],
            index=key[1],
            like=like,
            rows=snapshot.count(),
            block_rows=snapshot.chunk_rows,
        )
        while (chunk := snapshot.advance()) is not None:
            writer.append(chunk.arrays)
        base = part.touched.base if snapshot.incremental else ""
        return writer.finish(
            start=part.start, stop=part.stop, step=step, attempt=attempt, watermarks=watermarks, base=base
        )
    except OSError as error:
        snapshot.memory.give_up(f"{key[0]}[{key[1]}] could not be written: {error}")
        raise
    finally:
        if writer is not None:
            writer.close()
