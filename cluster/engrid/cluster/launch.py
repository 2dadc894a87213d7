"""Brings a cluster up. Ray places, starts and stops the processes; nothing else.

Everything is written to the record before it is started, so `down` after a crash in the middle of `up` finds all
of it, and stops exactly that. Whoever changes a run directory holds its lock.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from engrid.client import MemoryClient
from engrid.control.tables import spread_placement
from engrid.directory import CorruptDirectoryError, FolderSource, ShardRecord, masked, open_directory, read_source

from .capacity import memory_here, memory_joined
from .config import ClusterConfig, ClusterError, Record
from .extras import require
from .ray_calls import RayCalls, connected
from .ray_head import free_port, new_temp, ray_environment, start_head, wait_for_head
from .run_lock import changing
from .status import answers
from .stop import stop_record

HEALTH_SECONDS = 1.0
"""How long a shard that is registered already has to show that it lives."""


def up(config: ClusterConfig, say: Callable[[str], None] = lambda _: None) -> Record:
    """Starts shards and workers, on a Ray of our own or on the one at config.address; returns when all are healthy.

    Raises ClusterError naming the part that failed, after stopping what was started.
    """
    require("ray", *(["torch", "tokenizers", "safetensors"] if config.workers and not config.address else []))
    with changing(config.run_dir, "engrid up"):
        kept = _kept(config, say)
        registered = check_directory_free(config.directory)
        record = replace(kept, kept=False, from_kept=True) if kept else _new_record(config)
        deadline = time.monotonic() + config.timeout
        try:
            record = (_join_ray if config.address else _start_ray)(config, record, say, deadline)
            record = _start_actors(config, record, registered, say, deadline)
            _wait_healthy(record, deadline)
            if kept is not None:
                _announce(record)
            return record.changed(config.run_dir, ready=True, from_kept=False)
        except BaseException:
            stop_record(config.run_dir, keep_rows=kept is not None)
            raise


def _new_record(config: ClusterConfig) -> Record:
    return Record(
        identity=uuid.uuid4().hex[:8],
        directory=config.directory,
        run_dir=os.path.abspath(config.run_dir),  # noqa: PTH100 - keeps links
    )


def _kept(config: ClusterConfig, say: Callable[[str], None]) -> Record | None:
    """The record to go on from; None for a new cluster. What an `up` that was cut off has left is stopped first.

    Raises ClusterError where a cluster is up, or where this one cannot go on from what is kept.
    """
    record = Record.load(config.run_dir)
    if record is not None and not record.ready and not record.kept:
        say("stopping what an engrid up that was cut off has left")
        stop_record(config.run_dir, keep_rows=record.from_kept)
        record = Record.load(config.run_dir)
    if record is not None:
        _check_kept(config, record)
    return record


def _check_kept(config: ClusterConfig, kept: Record) -> None:
    if not kept.kept:
        raise ClusterError(
            f"a cluster is up in {config.run_dir} already; stop it with: engrid down --run-dir {config.run_dir}"
        )
    if config.shards < len(kept.shards) or _place(config.directory) != _place(kept.directory):
        raise ClusterError(
            f"{config.run_dir} keeps the rows of {len(kept.shards)} shards and directory {masked(kept.directory)}; give as "
            f"many --shards and that directory, or discard them with: engrid down --run-dir {config.run_dir}"
        )


def _place(directory: str) -> str:
    found = read_source(directory)
    return os.path.realpath(found.path) if isinstance(found, FolderSource) else directory


def check_directory_free(source: str) -> Mapping[str, ShardRecord] | None:
    """The shards registered, none of which answers; None where the directory cannot be read as one.

    Raises ClusterError where shards of another cluster serve from this directory: ours would take their place.
    """
    directory = open_directory(source)
    try:
        registered = directory.shards()
    except CorruptDirectoryError:
        return None
    finally:
        directory.close()
    with ThreadPoolExecutor(16) as threads:
        alive = list(threads.map(lambda each: answers(each.address, timeout=HEALTH_SECONDS), registered.values()))
    for shard, lives in zip(registered.values(), alive, strict=True):
        if lives:
            raise ClusterError(
                f"directory {masked(source)} is in use: shard {shard.name} serves at {shard.address}; stop that cluster, or "
                "give another --run-dir, or another ?prefix= in --redis"
            )
    return registered


def _join_ray(config: ClusterConfig, record: Record, say: Callable[[str], None], deadline: float) -> Record:
    assert config.address is not None
    say(f"joining the Ray at {config.address}")
    record = replace(record, ray_address=config.address)
    with calls_of(record, seconds=deadline - time.monotonic()) as ray:
        offers = ray.call("offers", 30.0, "reading what Ray's nodes offer")
    memory_mib = memory_joined(config, offers["nodes"], offers["available"])
    return record.changed(config.run_dir, memory_mib=memory_mib)


def _start_ray(config: ClusterConfig, record: Record, say: Callable[[str], None], deadline: float) -> Record:
    memory_mib = memory_here(config)
    say("starting Ray")
    temp, port = new_temp(), free_port()
    record = replace(record, memory_mib=memory_mib, host="127.0.0.1")
    record = record.changed(config.run_dir, ray_address=f"127.0.0.1:{port}", ray_temp=temp)
    pid = start_head(temp, port, memory_mib=memory_mib * config.shards, workers=config.workers)
    record = record.changed(config.run_dir, ray_pid=pid)
    wait_for_head(temp, pid, port, deadline)
    return record


def calls_of(record: Record, *, seconds: float) -> AbstractContextManager[RayCalls]:
    """A connection to the record's Ray, which must come about in so many seconds."""
    assert record.ray_address is not None
    return connected(record.ray_address, record.namespace, ray_environment(record.ray_temp), seconds=max(1.0, seconds))


def _start_actors(
    config: ClusterConfig,
    record: Record,
    registered: Mapping[str, ShardRecord] | None,
    say: Callable[[str], None],
    deadline: float,
) -> Record:
    shards = [f"shard-{index}" for index in range(config.shards)]
    workers = [f"worker-{index}" for index in range(config.workers)]
    with calls_of(record, seconds=deadline - time.monotonic()) as ray:
        record = record.changed(config.run_dir, actors=[*shards, *workers])
        _forget_shards(config.directory, registered, keep_placement=bool(record.shards))
        say(f"starting {config.shards} memory shards and {config.workers} compute workers")
        left = max(1.0, deadline - time.monotonic())
        addresses = ray.call(
            "start",
            left + 5.0,
            "starting shards and workers",
            shards=shards,
            workers=workers,
            directory=config.directory,
            state=str(record.state(config.run_dir)),
            memory_mib=record.memory_mib,
            checkpoints=[str(folder.resolve()) for folder in config.checkpoints or (Path.cwd(),)],
            host=record.host,
            timeout=left,
        )
    return record.changed(
        config.run_dir,
        shards={name: addresses[name] for name in shards},
        workers={name: addresses[name] for name in workers},
    )


def _forget_shards(source: str, registered: Mapping[str, ShardRecord] | None, *, keep_placement: bool) -> None:
    """A directory left by an earlier cluster names shards that are gone.

    Raises DirectoryChangedError where others registered since they were looked at: they may live.
    """
    directory = open_directory(source)
    try:
        if keep_placement:
            for name in registered or {}:
                directory.unregister(name)
        else:
            directory.clear(registered=registered)
    finally:
        directory.close()


def _wait_healthy(record: Record, deadline: float) -> None:
    for name, address in {**record.shards, **record.workers}.items():
        if not answers(address, timeout=max(1.0, deadline - time.monotonic())):
            raise ClusterError(f"{name} at {address} does not answer its health check in time")


def _announce(record: Record) -> None:
    """Tells the shards, which have the rows they had, where the others are now."""
    with MemoryClient(record.directory) as client:
        if client.connections.epoch:
            spread_placement(client)
