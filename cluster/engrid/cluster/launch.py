"""Brings a cluster up and takes it down. Ray places, starts and stops the processes; nothing else.

Everything is written to the record before it is started, so `down` after a crash in the middle of `up` finds all
of it, and stops exactly that.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from engrid.directory import CorruptDirectoryError, open_directory
from engrid.rpc.channel import command_channel
from engrid.rpc.server import check_health

from .capacity import memory_here, memory_joined
from .config import COMPUTE_RESOURCE, MEMORY_RESOURCE, ClusterConfig, ClusterError, Record
from .interrupts import uninterrupted
from .ray_head import free_port, is_alive, new_temp, processes_with, start_head, stop_head, use_token, wait_for_head

MIB = 1 << 20
STOP_SECONDS = 10.0
CONNECT_SECONDS = 5.0
HEALTH_SECONDS = 1.0
"""How long a shard that is registered already has to show that it lives."""


def up(config: ClusterConfig, say: Callable[[str], None] = lambda _: None) -> Record:
    """Starts shards and workers, on a Ray of our own or on the one at config.address; returns when all are healthy.

    Raises ClusterError naming the part that failed, after stopping what was started.
    """
    if Record.load(config.run_dir) is not None:
        raise ClusterError(
            f"a cluster is up in {config.run_dir} already; stop it with: engrid down --run-dir {config.run_dir}"
        )
    check_directory_free(config.directory)
    record = Record(identity=uuid.uuid4().hex[:8], directory=config.directory)
    try:
        record = _join_ray(config, record) if config.address else _start_ray(config, record, say)
        record = _start_actors(config, record, say)
        _wait_healthy(config, record)
        return record.changed(config.run_dir, ready=True)
    except BaseException:
        down(config.run_dir)
        raise


def check_directory_free(url: str) -> None:
    """Raises ClusterError where shards of another cluster serve from this directory: ours would take their place."""
    directory = open_directory(url)
    try:
        registered = directory.shards()
    except CorruptDirectoryError:
        return
    finally:
        directory.close()
    for shard in registered.values():
        if answers(shard.address, timeout=HEALTH_SECONDS):
            raise ClusterError(
                f"directory {url} is in use: shard {shard.name} serves at {shard.address}; stop that cluster, or give "
                "another --run-dir, or another ?prefix= in --redis"
            )


def _join_ray(config: ClusterConfig, record: Record) -> Record:
    assert config.address is not None
    with connected(replace(record, ray_address=config.address)) as ray:
        memory_mib = memory_joined(config, ray.nodes(), ray.available_resources())
    return record.changed(config.run_dir, ray_address=config.address, memory_mib=memory_mib)


def _start_ray(config: ClusterConfig, record: Record, say: Callable[[str], None]) -> Record:
    memory_mib = memory_here(config)
    say("starting Ray")
    temp, port = new_temp(), free_port()
    record = record.changed(
        config.run_dir, ray_address=f"127.0.0.1:{port}", ray_temp=temp, memory_mib=memory_mib, host="127.0.0.1"
    )
    pid = start_head(temp, port, memory_mib=memory_mib * config.shards, workers=config.workers)
    record = record.changed(config.run_dir, ray_pid=pid)
    wait_for_head(temp, pid, port, time.monotonic() + config.timeout)
    return record


@contextmanager
def connected(record: Record) -> Iterator[Any]:
    """A driver's connection to the record's Ray, closed at the end. Yields the ray module.

    Ray reads its environment when it is imported: a process connects to one Ray of ours.
    """
    assert record.ray_address is not None
    check_listens(record.ray_address)
    if record.ray_temp is not None:
        os.environ.update(use_token(record.ray_temp))
    import ray

    ours = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=record.ray_address, namespace=record.namespace, log_to_driver=False, logging_level=logging.ERROR
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {record.ray_address}: {error}. If it takes a token, set RAY_AUTH_MODE=token"
        ) from error
    try:
        _handle_sigterm(ours)  # Ray puts its own in place of it, and none when it shuts down
        yield ray
    finally:
        ray.shutdown()
        _handle_sigterm(ours)


def _handle_sigterm(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def check_listens(ray_address: str) -> None:
    """Raises ClusterError at once where nothing listens at host:port; Ray would try for minutes."""
    host, colon, port = ray_address.rpartition(":")
    if not colon or not port.isdigit():
        return  # auto, or a form that Ray knows
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(f"no Ray cluster answers at {ray_address}: {error}") from error


def _start_actors(config: ClusterConfig, record: Record, say: Callable[[str], None]) -> Record:
    from .actors import ComputeActor, ShardActor

    shards = [f"shard-{index}" for index in range(config.shards)]
    workers = [f"worker-{index}" for index in range(config.workers)]
    with connected(record) as ray:
        record = record.changed(config.run_dir, actors=[*shards, *workers])
        _forget_directory(config)
        say(f"starting {config.shards} memory shards and {config.workers} compute workers")
        actors = {
            name: _options(ray, ShardActor, name, {MEMORY_RESOURCE: record.memory_mib}).remote(
                name, config.directory, record.state(config.run_dir), record.memory_mib * MIB, record.host
            )
            for name in shards
        }
        gpu = 1 if ray.available_resources().get("GPU", 0) >= config.workers else 0
        for name in workers:
            options = _options(ray, ComputeActor, name, {COMPUTE_RESOURCE: 1}, gpus=gpu)
            actors[name] = options.remote(name, config.directory, record.host)
        addresses = _addresses(ray, actors, config.timeout)
    return record.changed(
        config.run_dir,
        shards={name: addresses[name] for name in shards},
        workers={name: addresses[name] for name in workers},
    )


def _options(ray: Any, kind: type, name: str, resources: dict[str, float], gpus: int = 0) -> Any:
    return ray.remote(kind).options(
        name=name,
        lifetime="detached",
        max_restarts=0,
        num_cpus=0,
        num_gpus=gpus,
        resources=resources,
        max_concurrency=4,
    )


def _addresses(ray: Any, actors: dict[str, Any], timeout: float) -> dict[str, str]:
    asked = {name: actor.address.remote() for name, actor in actors.items()}
    deadline, found = time.monotonic() + timeout, {}
    for name, reply in asked.items():
        try:
            found[name] = str(ray.get(reply, timeout=max(0.1, deadline - time.monotonic())))
        except ray.exceptions.GetTimeoutError as error:
            raise ClusterError(
                f"{name} did not start within {timeout:g} s; is there a node with room for it?"
            ) from error
        except ray.exceptions.RayError as error:
            raise ClusterError(f"{name} did not start: {error}") from error
    return found


def _forget_directory(config: ClusterConfig) -> None:
    """A directory left by an earlier cluster names shards that are gone."""
    directory = open_directory(config.directory)
    try:
        directory.clear()
    finally:
        directory.close()


def _wait_healthy(config: ClusterConfig, record: Record) -> None:
    deadline = time.monotonic() + config.timeout
    for name, address in {**record.shards, **record.workers}.items():
        if not answers(address, timeout=max(0.1, deadline - time.monotonic())):
            raise ClusterError(f"{name} at {address} does not answer its health check within {config.timeout:g} s")


def answers(address: str, *, timeout: float) -> bool:
    """Whether the process at host:port says it serves, within `timeout` seconds."""
    with command_channel(address) as channel:
        try:
            return check_health(channel, timeout=timeout)
        except grpc.RpcError:
            return False


def down(run_dir: Path) -> list[str]:
    """Stops what the record says, and nothing else; returns what that was. Empty where no cluster is up."""
    with uninterrupted():
        record = Record.load(run_dir)
        if record is None:
            return []
        stopped = list(record.actors)
        if record.ray_temp is None:
            _stop_joined(run_dir, record)
        else:
            _stop_ours(record, record.ray_temp)
            stopped.append("Ray")
        shutil.rmtree(record.state(run_dir), ignore_errors=True)
        Record.path(run_dir).unlink()
        return stopped


def _stop_joined(run_dir: Path, record: Record) -> None:
    try:
        _stop_actors(record)
    except ClusterError as error:
        raise ClusterError(
            f"{error}. Nothing was stopped; if that Ray is gone for good, so are its actors: remove "
            f"{Record.path(run_dir)}"
        ) from error


def _stop_ours(record: Record, temp: str) -> None:
    if record.ray_pid and is_alive(record.ray_pid):
        with suppress(ClusterError):  # a Ray that does not answer is stopped by its processes
            _stop_actors(record)
    stop_head(record.ray_pid, temp)
    if left := processes_with(temp):
        raise ClusterError(f"processes {sorted(left)} of our Ray could not be stopped; kill them by hand")


def _stop_actors(record: Record) -> None:
    if not record.ray_address or not record.actors:
        return
    with connected(record) as ray:
        stopping = []
        for name in record.actors:
            try:
                actor = ray.get_actor(name)
            except ValueError:
                continue
            stopping.append((actor, actor.stop.remote()))
        if stopping:
            ray.wait([stop for _, stop in stopping], num_returns=len(stopping), timeout=STOP_SECONDS)
        for actor, _ in stopping:
            ray.kill(actor)
