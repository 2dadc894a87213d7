"""`engrid status`: what the directory, the shards and the workers say. Needs no Ray."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from engrid.client import MemoryClient
from engrid.directory import DirectoryError, Placement, folder_source, masked, open_directory
from engrid.rpc.channel import command_channel
from engrid.rpc.server import check_health
from engrid.v1 import compute_pb2, compute_pb2_grpc, memory_pb2, memory_pb2_grpc

from .config import ClusterError, Record

TIMEOUT = 2.0
"""Seconds a shard or worker has to answer."""
GIB = 1 << 30


def show_status(run_dir: Path, console: Console, *, watch: bool) -> None:
    """Prints the state once, or every second until Ctrl-C. Raises ClusterError where nothing is up."""
    look = _Look(run_dir)
    if not watch:
        console.print(look.tables())
        return
    with Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            live.update(look.tables(), refresh=True)
            time.sleep(1.0)


@dataclass
class _Shard:
    """What a shard answered; `problem` where it did not."""

    about: memory_pb2.DescribeReply = field(default_factory=memory_pb2.DescribeReply)
    stats: memory_pb2.StatsReply = field(default_factory=memory_pb2.StatsReply)
    problem: str = ""


class _Look:
    """Looks again and again, and remembers the counts of the last look for the rates."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._before: dict[str, tuple[float, int]] = {}

    def tables(self) -> Group:
        directory, shards, workers = members(self._run_dir)
        answers = ask_shards(shards)
        parts = [self._shards(directory, shards, answers), _placed(answers)]
        if workers:
            parts.append(_workers(workers))
        return Group(*parts)

    def _shards(self, directory: str, shards: Mapping[str, str], answers: Mapping[str, _Shard]) -> Table:
        table = _table(f"shards ({masked(directory)})", "shard", "address", "epoch", "GiB", "of", "rows read", "rows/s")
        for name, address in shards.items():
            shard = answers[name]
            if shard.problem:
                table.add_row(name, address, Text(shard.problem, style="red"))
                continue
            placement = _placement(shard)
            table.add_row(
                name,
                address,
                str(placement.epoch if placement else 0),
                f"{shard.about.bytes / GIB:.2f}",
                f"{shard.about.bytes_limit / GIB:.2f}",
                f"{shard.stats.rows:,}",
                self._rate(name, shard.stats.rows),
            )
        return table

    def _rate(self, name: str, rows: int) -> str:
        now = time.monotonic()
        then, earlier = self._before.get(name, (now, rows))
        self._before[name] = (now, rows)
        return f"{(rows - earlier) / (now - then):,.0f}" if now > then else "-"


def members(run_dir: Path) -> tuple[str, dict[str, str], dict[str, str]]:
    """The directory, and the addresses of shards and workers: of `engrid up`, or of shards started by hand.

    A shard of `engrid up` that was started again by hand is at the address it registered.
    """
    record = Record.load(run_dir)
    if record is not None and record.ready:
        return record.directory, shards_of(record), record.workers
    if record is not None and record.kept:
        raise ClusterError(
            f"nothing is up in {run_dir}, which keeps the rows of {len(record.shards)} shards; go on with: engrid up "
            f"--shards {len(record.shards)} --run-dir {shlex.quote(str(run_dir))}"
        )
    source = folder_source(run_dir)
    directory = open_directory(source)
    try:
        shards = {name: shard.address for name, shard in directory.shards().items()}
    finally:
        directory.close()
    if not shards:
        raise ClusterError(
            f"nothing is up in {run_dir}; start it with: engrid up --run-dir {shlex.quote(str(run_dir))}"
        )
    return source, shards, {}


def shards_of(record: Record) -> dict[str, str]:
    """Where the shards of a cluster are: as registered, else, or where the directory cannot be read, as started."""
    try:
        directory = open_directory(record.directory)
        try:
            found = directory.shards()
        finally:
            directory.close()
    except DirectoryError:
        return record.shards
    return {name: found[name].address if name in found else address for name, address in record.shards.items()}


@contextmanager
def memory_of(run_dir: Path) -> Iterator[MemoryClient]:
    """A client of what is up in the run directory; raises ClusterError at once where a shard does not answer."""
    directory, shards, _ = members(run_dir)
    require_answers(run_dir, shards)
    with MemoryClient(directory) as client:
        yield client


def away(shards: Mapping[str, str], *, timeout: float) -> list[str]:
    """Names of the shards that do not answer their health check in time."""
    with ThreadPoolExecutor(32) as threads:
        lives = threads.map(lambda address: answers(address, timeout=timeout), shards.values())
        return [name for name, alive in zip(shards, lives, strict=True) if not alive]


def answers(address: str, *, timeout: float) -> bool:
    """Whether the process at host:port says it serves, within `timeout` seconds."""
    with command_channel(address) as channel:
        try:
            return check_health(channel, timeout=timeout)
        except grpc.RpcError:
            return False


def ask_shards(shards: Mapping[str, str]) -> dict[str, _Shard]:
    """What each answers, all asked at once: a hung one costs its own time only."""
    with ThreadPoolExecutor(32) as threads:
        return dict(zip(shards, threads.map(_ask_shard, shards.values()), strict=True))


def require_answers(run_dir: Path, shards: Mapping[str, str]) -> None:
    """Raises ClusterError naming the shards that do not answer, for a command that would wait for them."""
    problems = {name: each.problem for name, each in ask_shards(shards).items() if each.problem}
    if problems:
        named = ", ".join(f"{name} at {shards[name]} ({problem})" for name, problem in problems.items())
        record = Record.load(run_dir)
        again = "; ".join(record.start_again(name) for name in problems) if record and record.ready else "engrid shard"
        raise ClusterError(
            f"no answer from {named}; start it again, and stop it first where its process hangs: {again}"
        )


def live_tables(shards: Mapping[str, str]) -> dict[str, int]:
    """The live tables in the shards, as far as these answer, with the least step a partition stands at."""
    found: dict[str, int] = {}
    for shard in ask_shards(shards).values():
        placement = _placement(shard)
        for part in shard.about.partitions if placement else ():
            if part.table in placement.tables and not placement.tables[part.table].version:  # type: ignore[union-attr]
                found[part.table] = min(part.step, found.get(part.table, part.step))
    return dict(sorted(found.items()))


def _ask_shard(address: str) -> _Shard:
    with command_channel(address) as channel:
        stub = memory_pb2_grpc.MemoryServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            about = stub.Describe(memory_pb2.DescribeRequest(), timeout=TIMEOUT)
            stats = stub.Stats(memory_pb2.StatsRequest(), timeout=TIMEOUT)
        except grpc.RpcError as error:
            return _Shard(problem=_reason(error))
    return _Shard(about, stats)


def _placement(shard: _Shard) -> Placement | None:
    return Placement.from_json(json.loads(shard.about.placement)) if shard.about.placement else None


def _placed(answers: Mapping[str, _Shard]) -> Table:
    """The tables of the newest placement any shard knows, and the steps their partitions stand at."""
    table = _table("tables", "table", "rows", "format", "row bytes", "partitions", "step")
    known = [placement for shard in answers.values() if (placement := _placement(shard))]
    if not known:
        return table
    newest = max(known, key=lambda placement: placement.epoch)
    for name, spec in newest.tables.items():
        steps = {part.step for shard in answers.values() for part in shard.about.partitions if part.table == name}
        table.add_row(
            name,
            f"{spec.rows:,}",
            spec.row_format,
            str(spec.row_bytes),
            str(len(newest.partitions[name])),
            "-".join(str(step) for step in sorted({min(steps), max(steps)})) if steps else "?",
        )
    return table


def _workers(workers: Mapping[str, str]) -> Table:
    table = _table("compute workers", "worker", "address", "device", "doing", "checkpoint")
    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(_ask_worker, workers.values()))
    for (name, address), about in zip(workers.items(), answers, strict=True):
        if isinstance(about, str):
            table.add_row(name, address, Text(about, style="red"))
        else:
            doing = "training" if about.training else "idle"
            table.add_row(name, address, about.device, doing, about.checkpoint or "-")
    return table


def _ask_worker(address: str) -> Any:
    """Its description, or what is wrong with it."""
    with command_channel(address) as channel:
        stub = compute_pb2_grpc.ComputeServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            return stub.Describe(compute_pb2.WorkerDescribeRequest(), timeout=TIMEOUT)
        except grpc.RpcError as error:
            return _reason(error)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        words = column in ("shard", "worker", "table", "address", "format", "device", "doing", "checkpoint")
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    return table


def _reason(error: grpc.RpcError) -> str:
    return "no answer" if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else "not reachable"
