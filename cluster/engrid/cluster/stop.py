"""Takes a cluster down: what the record says, and nothing else. Ends by itself, also where Ray or a shard hangs."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from engrid.directory import DirectoryError, ShardRecord, open_directory, process_lives, this_host

from .config import ClusterError, Record
from .interrupts import uninterrupted
from .ray_calls import connected
from .ray_head import is_alive, processes_with, ray_environment, stop_head
from .run_lock import changing
from .status import live_tables

CONNECT_SECONDS = 40.0
STOP_SECONDS = 10.0
"""What actors have to close; then they are ended."""


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """What was stopped, and what became of its rows."""

    parts: list[str] = field(default_factory=list)
    """Shards, workers, Ray; empty where no cluster was up."""
    tables: dict[str, int] = field(default_factory=dict)
    """Live tables that were in the shards, and the step each stood at."""
    kept: bool = False
    """Whether the rows are there for the next `engrid up`."""
    discarded_kept: bool = False
    """Whether rows kept by an earlier `down` were discarded."""
    by_hand: dict[str, int] = field(default_factory=dict)
    """Shards that were started again by hand and go on, with their processes."""


def down(run_dir: Path, *, keep_rows: bool = False) -> Stopped:
    """Stops the cluster of a run directory. keep_rows: the shards' state folders stay, and the next `up` goes on from them."""
    if not run_dir.is_dir():
        return Stopped()
    with uninterrupted(), changing(run_dir, "engrid down"):
        return stop_record(run_dir, keep_rows=keep_rows)


def stop_record(run_dir: Path, *, keep_rows: bool) -> Stopped:
    """As `down`, for a command that holds the run directory."""
    with uninterrupted():
        record = Record.load(run_dir)
        if record is None:
            return Stopped()
        if keep_rows:
            _check_keepable(record)
        if record.kept and keep_rows:
            return Stopped(kept=True)
        tables = live_tables(record.shards) if record.ready else {}
        if record.ray_temp is not None:
            _stop_ours(record, record.ray_temp, keep_rows=keep_rows)
        elif not record.kept:
            _stop_joined(run_dir, record, keep_rows=keep_rows)
        by_hand = _started_by_hand(record)
        if keep_rows:
            _keep(record, run_dir)
        else:
            _discard(record, run_dir, by_hand)
        return Stopped(
            parts=[*record.actors, *(["Ray"] if record.ray_temp else [])],
            tables=tables,
            kept=keep_rows,
            discarded_kept=(record.kept or record.from_kept) and not keep_rows,
            by_hand={name: shard.pid for name, shard in by_hand.items()},
        )


def _check_keepable(record: Record) -> None:
    hosts = {address.rpartition(":")[0] for address in record.shards.values()}
    if len(hosts) > 1:
        raise ClusterError(
            f"the shards are on {len(hosts)} hosts, each with its rows on its own disk, and Ray may place them on others the "
            "next time; save a checkpoint instead: engrid checkpoint save. Nothing was stopped"
        )


def _keep(record: Record, run_dir: Path) -> None:
    record.changed(
        run_dir,
        kept=True,
        from_kept=False,
        ready=False,
        ray_address=None,
        ray_pid=None,
        ray_temp=None,
        actors=[],
        workers={},
    )


def _discard(record: Record, run_dir: Path, by_hand: dict[str, ShardRecord]) -> None:
    state = record.state(run_dir)
    for folder in state.iterdir() if state.is_dir() else ():
        if folder.name not in by_hand:
            shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        state.rmdir()
    Record.path(run_dir).unlink()


def _started_by_hand(record: Record) -> dict[str, ShardRecord]:
    """Shards of ours that run though all that Ray had started is stopped."""
    try:
        directory = open_directory(record.directory)
        try:
            registered = directory.shards()
        finally:
            directory.close()
    except (DirectoryError, ValueError):
        return {}
    return {
        name: shard
        for name, shard in registered.items()
        if name in record.shards and shard.host == this_host() and process_lives(shard.pid)
    }


def _stop_joined(run_dir: Path, record: Record, *, keep_rows: bool) -> None:
    try:
        _stop_actors(record, keep_rows=keep_rows)
    except ClusterError as error:
        raise ClusterError(
            f"{error}. Nothing was stopped; if that Ray is gone for good, so are its actors: remove "
            f"{Record.path(run_dir)}"
        ) from error


def _stop_ours(record: Record, temp: str, *, keep_rows: bool) -> None:
    if record.ray_pid and is_alive(record.ray_pid):
        with suppress(ClusterError):  # a Ray that does not answer is stopped by its processes
            _stop_actors(record, keep_rows=keep_rows)
    stop_head(record.ray_pid, temp)
    if left := processes_with(temp):
        raise ClusterError(f"processes {sorted(left)} of our Ray could not be stopped; kill them by hand")


def _stop_actors(record: Record, *, keep_rows: bool) -> None:
    if not record.ray_address or not record.actors:
        return
    environment = ray_environment(record.ray_temp)
    with connected(record.ray_address, record.namespace, environment, seconds=CONNECT_SECONDS) as ray:
        ray.call(
            "stop",
            STOP_SECONDS + 20.0,
            "stopping shards and workers",
            actors=record.actors,
            keep_rows=keep_rows,
            timeout=STOP_SECONDS,
        )
