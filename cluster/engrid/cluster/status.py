"""`engrid status`: what the directory, the shards and the workers say. Needs no Ray."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from engrid.directory import Placement, open_directory
from engrid.rpc.channel import command_channel
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
        answers = {name: _ask_shard(address) for name, address in shards.items()}
        parts = [self._shards(directory, shards, answers), _placed(answers)]
        if workers:
            parts.append(_workers(workers))
        return Group(*parts)

    def _shards(self, directory: str, shards: Mapping[str, str], answers: Mapping[str, _Shard]) -> Table:
        table = _table(f"shards ({directory})", "shard", "address", "epoch", "GiB", "of", "rows read", "rows/s")
        for name, address in shards.items():
            shard = answers[name]
            if shard.problem:
                table.add_row(name, address, f"[red]{shard.problem}[/red]")
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
    """The directory's URL, and the addresses of shards and workers: of `engrid up`, or of shards started by hand."""
    record = Record.load(run_dir)
    if record is not None and record.ready:
        return record.directory, record.shards, record.workers
    url = f"file:{run_dir.resolve()}"
    directory = open_directory(url)
    try:
        shards = {name: shard.address for name, shard in directory.shards().items()}
    finally:
        directory.close()
    if not shards:
        raise ClusterError(f"nothing is up in {run_dir}; start it with: engrid up --run-dir {run_dir}")
    return url, shards, {}


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
    for name, address in workers.items():
        with command_channel(address) as channel:
            stub = compute_pb2_grpc.ComputeServiceStub(channel)  # type: ignore[no-untyped-call]
            try:
                about: Any = stub.Describe(compute_pb2.WorkerDescribeRequest(), timeout=TIMEOUT)
            except grpc.RpcError as error:
                table.add_row(name, address, f"[red]{_reason(error)}[/red]")
                continue
        table.add_row(name, address, about.device, "training" if about.training else "idle", about.checkpoint or "-")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        words = column in ("shard", "worker", "table", "address", "format", "device", "doing", "checkpoint")
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    return table


def _reason(error: grpc.RpcError) -> str:
    return "no answer" if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else "not reachable"
