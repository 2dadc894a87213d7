"""The measurements behind the marks of training and durability; each part starts what it needs and stops it.

Pushes are of 8,192 distinct rows of 64 float32 values with Adam. `memory` is the level at which a push is answered once
it is in the shard's log, `durable` once the log is on disk; both have the log on the file system of the temporary folder.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import ROOT, start_shards, state_folder
from benchmarks.data_marks import Figures
from benchmarks.measure import Scale
from engrid.client import MemoryClient, TrainingRun
from engrid.control.tables import create_tables
from engrid.rpc.frames import Floats, Ids
from engrid.shard.journal.journal import Journal
from engrid.storage.disk import LocalDisk
from engrid.tables import OptimizerSpec, RowTable, TableSpec
from engrid.worker.config import TrainConfig
from engrid.worker.train.run import Place, train

PUSH_ROWS = 8192
WIDTH = 64
ROW_BYTES = 8 + 4 * WIDTH
"""Of a pushed row: its id and its gradient."""
CONCURRENT = 8
"""Workers that push at once where the log is measured, each with a run of its own."""
DISK_BYTES = 256 << 20
NO_BASES = str(1 << 40)
"""Bytes of log before a shard writes its rows: a base would fall into some repeats and not into others."""
REPLAY_SECONDS = 3.0
"""Of pushes to replay, so that making the table is a small part of the start."""
TRAIN_STEPS = 12


def adam_table(name: str, rows: int) -> TableSpec:
    return TableSpec(
        name=name,
        rows=rows,
        row_format="float32",
        width=WIDTH,
        seed=0,
        layer=0,
        init_std=0.02,
        optimizer=OptimizerSpec(kind="adam"),
    )


def table_rows(scale: Scale) -> int:
    return 20_000 if scale.quick else 400_000


def some_pushes(rows: int, seed: int) -> list[tuple[Ids, Floats]]:
    rng = np.random.default_rng(seed)
    size = min(PUSH_ROWS, rows)
    return [
        (np.sort(rng.choice(rows, size, replace=False)), rng.standard_normal((size, WIDTH), np.float32))
        for _ in range(8)
    ]


class Pusher:
    """One worker of a run of its own, over a table of its own."""

    def __init__(self, stack: ExitStack, folder: str, name: str, rows: int, *, durable: bool, seed: int = 0) -> None:
        client = stack.enter_context(MemoryClient(f"file:{folder}"))
        self._run = TrainingRun(client, run=name, attempt=1, worker=0, workers=1, tables=[name], durable=durable)
        self._name, self._pushes, self.step = name, some_pushes(rows, seed), 0

    def push(self, seconds: float) -> int:
        """Rows pushed."""
        done, ends = 0, time.perf_counter() + seconds
        while time.perf_counter() < ends:
            done += self.push_step()
        return done

    def push_step(self) -> int:
        """Rows of the next step."""
        self.step += 1
        gradients = self._pushes[self.step % len(self._pushes)]
        return self._run.push({self._name: gradients}, step=self.step, learning_rate=0.001)


def rows_per_second(work: Callable[[float], int], seconds: float) -> float:
    begun = time.perf_counter()
    return work(seconds) / (time.perf_counter() - begun)


def pushes(stack: ExitStack, scale: Scale, figures: Figures) -> None:
    """Through gRPC into one shard process, in turn with torch in this one.

    torch has one thread, with which it is faster here than with two, and is spared the sorting of distinct rows.
    """
    stack.callback(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(1)
    rows = table_rows(scale)
    logged, unlogged = (stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(2))
    start_shards(stack, logged, 1, state=True)
    start_shards(stack, unlogged, 1)
    pushers = {}
    for folder in (logged, unlogged):
        with MemoryClient(f"file:{folder}") as client:
            create_tables(client, [adam_table("t", rows)])
        pushers[folder] = Pusher(stack, folder, "t", rows, durable=False)
    weight = torch.nn.Parameter(torch.zeros(rows, WIDTH))
    optimizer = torch.optim.SparseAdam([weight], lr=0.001)
    given = [(torch.from_numpy(ids)[None], torch.from_numpy(values)) for ids, values in some_pushes(rows, 0)]

    def local(seconds: float) -> int:
        done, ends = 0, time.perf_counter() + seconds
        while time.perf_counter() < ends:
            for ids, values in given:
                weight.grad = torch.sparse_coo_tensor(
                    ids, values, weight.shape, is_coalesced=True, check_invariants=False
                )
                optimizer.step()
                done += len(values)
        return done

    for work in (pushers[logged].push, pushers[unlogged].push, local):
        work(scale.seconds / 2)
    for _ in range(scale.repeats):
        torch_rate = rows_per_second(local, scale.seconds)
        rate = rows_per_second(pushers[logged].push, scale.seconds)
        figures.add("push_vs_local", rate / torch_rate)
        figures.add("push_mrows", rate / 1e6)
        figures.add("sparse_adam_mrows", torch_rate / 1e6)
        figures.add("push_without_log_vs_local", rows_per_second(pushers[unlogged].push, scale.seconds) / torch_rate)


def disk_bytes_per_second(folder: str, size: int) -> float:
    """Sequential writes of 1 MiB and one fdatasync behind them."""
    path, block = Path(folder, "disk"), os.urandom(1 << 20)
    with path.open("wb", buffering=0) as file:
        begun = time.perf_counter()
        for _ in range(size >> 20):
            file.write(block)
        os.fdatasync(file.fileno())
        spent = time.perf_counter() - begun
    path.unlink()
    return size / spent


def durability(stack: ExitStack, scale: Scale, figures: Figures) -> None:
    """Several workers at once at each level, the disk itself, and a start that replays what they pushed."""
    rows = table_rows(scale) // CONCURRENT
    pool = stack.enter_context(ThreadPoolExecutor(CONCURRENT))
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    start_shards(stack, folder, 1, "--log-bytes", NO_BASES, state=True)
    names = {level: [f"{level}{at}" for at in range(CONCURRENT)] for level in ("memory", "durable")}
    with MemoryClient(f"file:{folder}") as client:
        create_tables(client, [adam_table(name, rows) for level in names.values() for name in level])
    pushers = {
        level: [Pusher(stack, folder, name, rows, durable=level == "durable", seed=at) for at, name in enumerate(each)]
        for level, each in names.items()
    }

    def all_at_once(level: str) -> Callable[[float], int]:
        return lambda seconds: sum(pool.map(lambda pusher: pusher.push(seconds), pushers[level]))

    for level in pushers:
        all_at_once(level)(scale.seconds / 2)
    for _ in range(scale.repeats):
        memory = rows_per_second(all_at_once("memory"), scale.seconds)
        durable = rows_per_second(all_at_once("durable"), scale.seconds)
        disk = disk_bytes_per_second(folder, DISK_BYTES // 16 if scale.quick else DISK_BYTES) / ROW_BYTES
        figures.add("durable_vs_bound", durable / min(memory, disk))
        figures.add("memory_mrows", memory / 1e6)
        figures.add("durable_mrows", durable / 1e6)
        figures.add("disk_mrows", disk / 1e6)
    replay(scale, figures)


def replay(scale: Scale, figures: Figures) -> None:
    """One worker's pushes at `memory`, and then a start from the log they left, initial rows included."""
    rows = table_rows(scale)
    for at in range(scale.repeats):
        with ExitStack() as each:
            folder = each.enter_context(tempfile.TemporaryDirectory())
            start_shards(each, folder, 1, "--log-bytes", NO_BASES, state=True)
            with MemoryClient(f"file:{folder}") as client:
                create_tables(client, [adam_table("t", rows)])
            pusher = Pusher(each, folder, "t", rows, durable=False, seed=at)
            pusher.push(scale.seconds / 4)
            begun, before = time.perf_counter(), pusher.step
            pusher.push(scale.seconds * REPLAY_SECONDS)
            live = (pusher.step - before) * min(PUSH_ROWS, rows) / (time.perf_counter() - begun)
            begun = time.perf_counter()
            journal = Journal("s0", LocalDisk(state_folder(folder, 0)))
            spent = time.perf_counter() - begun
            begun = time.perf_counter()
            RowTable(adam_table("t", rows))
            making = time.perf_counter() - begun
            assert journal.core.reached("t") == pusher.step
            assert journal.log is not None
            journal.log.close()
            replayed = pusher.step * min(PUSH_ROWS, rows)
            figures.add("replay_vs_live", replayed / spent / live)
            figures.add("replay_mrows", replayed / spent / 1e6)
            figures.add("replay_without_initial_rows_vs_live", replayed / max(1e-9, spent - making) / live)


def training(stack: ExitStack, scale: Scale, figures: Figures) -> None:
    """The demo model's first steps with rows in two shards and with rows in this process, in turn.

    torch has all cores, as a worker's has: with one thread the shards would use cores that the in-process rows cannot.
    """
    folder, out = (stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(2))
    start_shards(stack, folder, 2)
    steps = 2 if scale.quick else TRAIN_STEPS
    config = demo_config(scale, run="marks", out=out, steps=steps)

    def rate(memory: str, number: int) -> float:
        place = Place(identity=f"{memory}{number}")
        result = last_result(
            train(replace(config, memory=memory), place, lambda: MemoryClient(f"file:{folder}"), "cpu")
        )
        return float(result["tokens_per_second"])

    for number in range(scale.repeats):
        remote, local = rate("remote", number), rate("in_process", number)
        figures.add("train_vs_local", remote / local)
        figures.add("train_tokens_per_second", remote)


def demo_config(scale: Scale, **options: Any) -> TrainConfig:
    """The demo's training and nothing beside it; in a smoke run a small one on our own source."""
    config = TrainConfig(evaluations=0, save=False, replace=True, **options)
    if not scale.quick:
        return config
    assert config.model.engram is not None
    small = replace(config.model, engram=replace(config.model.engram, vocab_size=(500, 1500)))
    return replace(config, batch=2, length=32, model=small, text=(str(ROOT / "services"),))


def last_result(progress: Iterator) -> dict:
    *_, last = progress
    assert last.result is not None
    return last.result
