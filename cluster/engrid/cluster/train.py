"""`engrid train`: one Train call per compute worker, its progress shown."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from typing import Any

import grpc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engrid.rpc.channel import command_channel
from engrid.rpc.errors import from_rpc
from engrid.v1 import compute_pb2 as pb
from engrid.v1 import compute_pb2_grpc
from engrid.worker.config import TrainConfig

from . import interrupts
from .config import ClusterError, Record
from .ray_head import free_port
from .waiting import ShardWatch, with_cure

TRAIN_TIMEOUT = 24 * 3600.0
"""Seconds a training call may take."""
STOP_POLL = 0.2
STOP_TIMEOUT = 5.0
OTHERS_TIMEOUT = 2.0
"""Seconds that the other ranks have to fail too, after the first that was heard of."""


def run_training(
    record: Record,
    config: TrainConfig,
    on_progress: Callable[[pb.TrainProgress], None],
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Trains on all workers of the cluster; returns rank 0's result.

    on_progress gets what rank 0 reports. asked_to_stop: once it is true the workers end after the step under way and save
    it. Any way out of here, Ctrl-C too, cancels every worker's call.
    """
    if not record.workers:
        raise ClusterError("the cluster has no compute workers; bring it up with --workers 1 or more")
    workers = list(record.workers.items())
    identity = f"{config.run}-{uuid.uuid4().hex[:12]}"
    # Free on this machine; where worker 0 is on another and the port is taken there, the run fails at once.
    rendezvous = f"{workers[0][1].rpartition(':')[0]}:{free_port()}"
    with ExitStack() as stack:
        calls, stubs = [], []
        for rank, (_, address) in enumerate(workers):
            stub = compute_pb2_grpc.ComputeServiceStub(stack.enter_context(command_channel(address)))  # type: ignore[no-untyped-call]
            request = pb.TrainRequest(
                config=json.dumps(config.to_json()),
                rank=rank,
                workers=len(workers),
                rendezvous=rendezvous,
                identity=identity,
            )
            stubs.append(stub)
            calls.append(stub.Train(request, timeout=TRAIN_TIMEOUT))
        threads = stack.enter_context(ThreadPoolExecutor(len(calls)))
        for call in calls:
            stack.callback(call.cancel)
        ranks = [threads.submit(_follow, call, [on_progress] if call is calls[0] else []) for call in calls]
        _wait(ranks, asked_to_stop, lambda: _stop(stubs, identity))
        found = _errors_of(ranks)
        if found:
            rank, error = found[0]
            name, address = workers[rank]
            raise with_cure(record, config, from_rpc(error, f"{name} at {address}")) from error
        return ranks[0].result()


def _errors_of(ranks: Sequence[Future[dict[str, Any]]]) -> list[tuple[int, grpc.RpcError]]:
    """Ranks that failed, those that can say why first: the others fail after them, of a connection that was lost."""
    if any(rank.done() and rank.exception() for rank in ranks):
        wait(ranks, timeout=OTHERS_TIMEOUT)
    failed = ((index, rank.exception()) for index, rank in enumerate(ranks) if rank.done())
    found = [(index, error) for index, error in failed if isinstance(error, grpc.RpcError)]
    return sorted(found, key=lambda each: "gloo" in str(each[1]))


def _wait(ranks: Sequence[Future[dict[str, Any]]], asked: Callable[[], bool], stop: Callable[[], None]) -> None:
    """Returns once all have ended or one has failed; calls `stop` once when asked to."""
    stopped = False
    while True:
        ended, running = wait(ranks, timeout=STOP_POLL, return_when=FIRST_EXCEPTION)
        if not running or any(each.exception() for each in ended):
            return
        if not stopped and asked():
            stopped = True
            stop()


def _stop(stubs: Sequence[compute_pb2_grpc.ComputeServiceStub], identity: str) -> None:
    """Asks the workers to stop; they agree on the step among them, so one that hears of it is enough."""
    heard = False
    for stub in stubs:
        with suppress(grpc.RpcError):
            heard |= stub.StopTraining(pb.StopTrainingRequest(identity=identity), timeout=STOP_TIMEOUT).stopping
    if not heard:
        raise ClusterError("no worker could be asked to stop; the run is cut off")


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
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[rate]} tokens/s"),
        TimeRemainingColumn(),
        console=console,
    )


def train_with_progress(
    record: Record, config: TrainConfig, console: Console, title: str = "training", *, stoppable: bool = False
) -> dict[str, Any]:
    """run_training with a bar, which says so while a shard is waited for. stoppable: the first Ctrl-C saves, once a step is
    done; until then it ends at once."""
    with progress_bar(console) as bar, ShardWatch(record, console) as watch, ExitStack() as stack:
        task = bar.add_task(title, total=config.steps, loss="-", rate="-")
        workers = len(record.workers)
        watch.tell = lambda waiting: bar.update(task, description=f"{title}: {waiting}")
        asked = stack.enter_context(interrupts.first_asks()) if stoppable else lambda: False
        stepped = said = False

        def show(progress: pb.TrainProgress) -> None:
            nonlocal stepped
            watch.heard()
            if progress.notice:
                bar.console.print(progress.notice, style="dim", markup=False, highlight=False, soft_wrap=True)
            elif progress.phase:
                bar.update(task, description=f"{title}: {progress.phase}")
            elif progress.step and not progress.result:
                stepped = True
                rate = f"{progress.tokens_per_second * workers:,.0f}"
                bar.update(task, description=title, completed=progress.step, loss=f"{progress.loss:.3f}", rate=rate)
            elif progress.result:
                bar.update(task, description=title, completed=progress.step)

        def asked_to_stop() -> bool:
            nonlocal said
            if asked() and not stepped:
                raise KeyboardInterrupt  # there is nothing to save yet
            if asked() and not said:
                said = True
                bar.console.print("stopping after this step and saving it; Ctrl-C again ends at once", style="yellow")
            return asked()

        return run_training(record, config, show, asked_to_stop)
