"""`engrid train`: one Train call per compute worker, its progress shown."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engrid.rpc.channel import command_channel
from engrid.rpc.errors import from_rpc
from engrid.v1 import compute_pb2 as pb
from engrid.v1 import compute_pb2_grpc
from engrid.worker.config import TrainConfig, demo_model
from engrid.worker.saved_model import FOLDER, open_checkpoint

from .config import ClusterError, Record
from .ray_head import free_port
from .waiting import ShardWatch, with_cure

TRAIN_TIMEOUT = 24 * 3600.0
"""Seconds a training call may take."""


def read_config(
    path: Path | None, *, out: str, run: str | None = None, resume: bool = False, **given: Any
) -> TrainConfig:
    """The configuration in a file, else that of the checkpoint to go on from, else the demo's; changed by what was given.

    None: not given. Raises CheckpointError where there is none to go on from.
    """
    if path:
        values = {"run": "default", **json.loads(path.read_text())}
    elif resume:
        values = dict(open_checkpoint(Path(out) / FOLDER).manifest.about["config"])
    else:
        values = TrainConfig(run=run or "default", out=out).to_json()
    given["run"] = run
    values |= {"out": out, "resume": resume} | {name: value for name, value in given.items() if value is not None}
    if values["memory"] == "off":
        values["model"] = {**values["model"], "engram": None}
    elif values["model"]["engram"] is None:
        values["model"]["engram"] = demo_model().to_json()["engram"]
    return TrainConfig.from_json(values)


def run_training(
    record: Record, config: TrainConfig, on_progress: Callable[[pb.TrainProgress], None]
) -> dict[str, Any]:
    """Trains on all workers of the cluster; returns rank 0's result.

    on_progress gets what rank 0 reports. Any way out of here, Ctrl-C too, cancels every worker's call.
    """
    if not record.workers:
        raise ClusterError("the cluster has no compute workers; bring it up with --workers 1 or more")
    workers = list(record.workers.items())
    identity = f"{config.run}-{uuid.uuid4().hex[:12]}"
    # Free on this machine; where worker 0 is on another and the port is taken there, the run fails at once.
    rendezvous = f"{workers[0][1].rpartition(':')[0]}:{free_port()}"
    with ExitStack() as stack:
        calls = []
        for rank, (_, address) in enumerate(workers):
            stub = compute_pb2_grpc.ComputeServiceStub(stack.enter_context(command_channel(address)))  # type: ignore[no-untyped-call]
            request = pb.TrainRequest(
                config=json.dumps(config.to_json()),
                rank=rank,
                workers=len(workers),
                rendezvous=rendezvous,
                identity=identity,
            )
            calls.append(stub.Train(request, timeout=TRAIN_TIMEOUT))
        threads = stack.enter_context(ThreadPoolExecutor(len(calls)))
        for call in calls:
            stack.callback(call.cancel)
        ranks = [threads.submit(_follow, call, [on_progress] if call is calls[0] else []) for call in calls]
        wait(ranks, return_when=FIRST_EXCEPTION)
        # Where one rank fails the others fail after it, with less to say.
        for (name, address), done in zip(workers, ranks, strict=True):
            error = done.exception() if done.done() else None
            if isinstance(error, grpc.RpcError):
                raise with_cure(record, config, from_rpc(error, f"{name} at {address}")) from error
        return ranks[0].result()


def _follow(
    call: Iterable[pb.TrainProgress], listeners: Sequence[Callable[[pb.TrainProgress], None]]
) -> dict[str, Any]:
    """Reads a rank's progress to its end; returns its result."""
    result: dict[str, Any] = {}
    for progress in call:
        for listen in listeners:
            listen(progress)
        if progress.result:
            result = json.loads(progress.result)
    return result


def progress_bar(console: Console) -> Progress:
    """Loss, tokens per second and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[rate]} tokens/s"),
        TimeRemainingColumn(),
        console=console,
    )


def train_with_progress(
    record: Record, config: TrainConfig, console: Console, title: str = "training"
) -> dict[str, Any]:
    """run_training with a bar, which says so while a shard is waited for."""
    with progress_bar(console) as bar, ShardWatch(record, console) as watch:
        task = bar.add_task(title, total=config.steps, loss="-", rate="-")
        workers = len(record.workers)
        watch.tell = lambda waiting: bar.update(task, description=f"{title}: {waiting}")

        def show(progress: pb.TrainProgress) -> None:
            watch.heard()
            if progress.phase:
                bar.update(task, description=f"{title}: {progress.phase}")
            elif progress.step and not progress.result:
                rate = f"{progress.tokens_per_second * workers:,.0f}"
                bar.update(task, description=title, completed=progress.step, loss=f"{progress.loss:.3f}", rate=rate)
            elif progress.result:
                bar.update(task, description=title, completed=config.steps)

        return run_training(record, config, show)
