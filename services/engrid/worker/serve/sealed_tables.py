"""A checkpoint's rows as sealed tables, which a model is served from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from engrid.client import MemoryClient, Pin
from engrid.control.tables import create_tables, load_partition, spread_placement
from engrid.control.versions import prune_versions, publish_version
from engrid.directory import EpochConflictError, Version
from engrid.rpc.errors import BadRequestError, ShardUnavailableError
from engrid.storage.checkpoint import Checkpoints
from engrid.storage.disk import LocalDisk
from engrid.tables import TableSpec
from engrid.worker.rows.tables import sealed_spec
from engrid.worker.saved_model import SavedRows

READ_BYTES = 64 << 20
"""Rows read at a time."""
SENT_BYTES = 1 << 20
MAKE_ATTEMPTS = 5


def serve_tables(saved: SavedRows, client: MemoryClient) -> Pin:
    """Puts the checkpoint's rows into sealed tables, over however many shards there are, and returns them pinned.

    Those that hold them already stay as they are; the live tables of the run are not touched. The tables come in the
    order of the layers. Raises CheckpointDamagedError before anything is made.
    """
    sealed = {spec.name: sealed_spec(spec, saved.version) for spec in saved.specs}
    client.connections.refresh()
    pin = client.pins.of_tables(version_of(saved))
    try:
        _load_sealed(saved, client, sealed)
    except BaseException:
        pin.release()
        raise
    return pin


def version_of(saved: SavedRows) -> Version:
    """What a checkpoint is published as."""
    names = tuple(sealed_spec(spec, saved.version).name for spec in saved.specs)
    return Version(saved.version, names, str(saved.path))


def publish(saved: SavedRows, client: MemoryClient, run: str) -> list[str]:
    """Makes the checkpoint's rows the run's current version, and drops what nobody needs any more; returns tables dropped.

    The checkpoint is held until its version is dropped, as the dense weights that belong to the version are in it alone.
    """
    with serve_tables(saved, client):
        with suppress(OSError):  # where we cannot write, no run removes it either
            saved.checkpoints.hold(saved.manifest.name)
        publish_version(client, run, version_of(saved))
        return prune(client, run)


def prune(client: MemoryClient, run: str) -> list[str]:
    """As prune_versions; checkpoints that were held for versions that are gone now may go."""
    before = _published_from(client)
    dropped = prune_versions(client, run)
    for path in before - _published_from(client):
        if path.parent.is_dir():
            Checkpoints(LocalDisk(path.parent)).release(path.name)
    return dropped


def _published_from(client: MemoryClient) -> set[Path]:
    client.connections.refresh()
    if not client.connections.epoch:
        return set()
    versions = [version for of in client.placement.versions.values() for version in of]
    return {Path(version.checkpoint) for version in versions if version.checkpoint}


def _load_sealed(saved: SavedRows, client: MemoryClient, sealed: Mapping[str, TableSpec]) -> None:
    wanted = {name: spec for name, spec in sealed.items() if not _is_loaded(spec, client)}
    if wanted:
        saved.checkpoints.check_rows(list(saved.chain))
        client.connections.refresh()
        _make_tables(client, list(wanted.values()))
        client.pins.renew()
        for name, spec in wanted.items():
            for part in client.placement.partitions[spec.name]:
                chunks = _row_chunks(saved, saved.manifest.tables[name], part.start, part.stop)
                load_partition(client, spec.name, part.index, chunks, step=saved.step, run=saved.manifest.run)


def _make_tables(client: MemoryClient, wanted: Sequence[TableSpec]) -> None:
    """Makes those that are not there; another worker may do the same at the same time."""
    for attempt in range(MAKE_ATTEMPTS):
        known = client.placement.tables if client.connections.epoch else {}
        missing = [spec for spec in wanted if spec.name not in known]
        try:
            if missing:
                create_tables(client, missing)
            else:
                spread_placement(client)
                return
        except (EpochConflictError, BadRequestError):
            if attempt + 1 == MAKE_ATTEMPTS:
                raise
        client.connections.refresh()


def _is_loaded(spec: TableSpec, client: MemoryClient) -> bool:
    client.connections.refresh()
    if not client.connections.epoch or client.placement.tables.get(spec.name) != spec:
        return False
    try:
        return client.connections.serves(spec.name)
    except ShardUnavailableError:
        return False  # it may be back elsewhere, without its rows


def _row_chunks(saved: SavedRows, spec: TableSpec, start: int, stop: int) -> Iterator[bytes]:
    """Rows [start, stop) as they are after the last of the chain."""
    read_rows, sent_rows = (max(1, size // spec.row_bytes) for size in (READ_BYTES, SENT_BYTES))
    for first in range(start, stop, read_rows):
        rows = np.empty((min(read_rows, stop - first), spec.row_bytes), np.uint8)
        into: dict[str, Any] = {"rows": rows}
        saved.checkpoints.restore_arrays(list(saved.chain), spec.name, first, first + len(rows), into)
        for at in range(0, len(rows), sent_rows):
            yield rows[at : at + sent_rows].tobytes()
