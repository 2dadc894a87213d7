"""The measurements behind the marks of checkpoints: what a save costs the steps beside it, and loading against reading.

All through two shards: begun between two steps, written while pushes go on, restored into live tables with a log and without.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks.common import start_shards
from benchmarks.data_marks import Figures
from benchmarks.measure import Scale
from benchmarks.train_marks import Pusher, adam_table, demo_config, table_rows
from engrid.client import MemoryClient
from engrid.control.checkpoints import CheckpointSave, restore_tables
from engrid.control.tables import create_tables
from engrid.storage.manifest import Manifest
from engrid.worker.saved_model import FOLDER
from engrid.worker.train.run import Place, train

TABLE = "t"
PAUSE_S = 0.05
"""Between pushes: of a model that leaves the cores of the shards alone."""
SAVE_EVERY = 40
"""Steps of the demo model from one checkpoint to the next: enough that some run beside none."""
READ_BYTES = 8 << 20


def checkpoints(stack: ExitStack, scale: Scale, figures: Figures) -> None:
    """Of a table with Adam, 307 MB with its state."""
    folder, root = (stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(2))
    start_shards(stack, folder, 2, state=True)
    client = stack.enter_context(MemoryClient(f"file:{folder}"))
    create_tables(client, [adam_table(TABLE, table_rows(scale))])
    pusher = Pusher(stack, folder, TABLE, table_rows(scale), durable=False)
    beside_a_save(pusher, client, Path(root), 0.0)
    for _ in range(scale.repeats):
        figures.add("checkpoint_push_slowdown", beside_a_save(pusher, client, Path(root), PAUSE_S))
        figures.add("checkpoint_push_slowdown_back_to_back", beside_a_save(pusher, client, Path(root), 0.0))
    manifest = save_at(pusher, client, Path(root)).finish({}, {})
    saved = some_rows(client, scale)
    pusher.push_step()
    assert some_rows(client, scale) != saved
    loading(client, Path(root), manifest, saved, scale, figures, "load_with_log")
    without = stack.enter_context(tempfile.TemporaryDirectory())
    start_shards(stack, without, 2)
    client = stack.enter_context(MemoryClient(f"file:{without}"))
    loading(client, Path(root), manifest, saved, scale, figures, "load")


def beside_a_save(pusher: Pusher, client: MemoryClient, root: Path, pause: float) -> float:
    """Time of a step, its pause included, while a checkpoint is begun and written, over the time of one alone."""
    begun = time.perf_counter()
    save = save_at(pusher, client, root)
    writing = threading.Thread(target=save.finish, args=({}, {}))
    writing.start()
    steps = steps_while(pusher, pause, writing.is_alive)
    saved = time.perf_counter() - begun
    writing.join()
    begun, last = time.perf_counter(), pusher.step + steps
    steps_while(pusher, pause, lambda: pusher.step < last)
    return saved / (time.perf_counter() - begun)


def steps_while(pusher: Pusher, pause: float, more: Callable[[], bool]) -> int:
    """At least one; returns how many."""
    before = pusher.step
    while pusher.step == before or more():
        pusher.push_step()
        time.sleep(pause)
    return pusher.step - before


def save_at(pusher: Pusher, client: MemoryClient, root: Path) -> CheckpointSave:
    return CheckpointSave(client, root, run=TABLE, attempt=1, step=pusher.step, tables=[TABLE])


def loading(
    client: MemoryClient, root: Path, manifest: Manifest, saved: bytes, scale: Scale, figures: Figures, name: str
) -> None:
    """Reading the files and restoring them, neither with any of them in the page cache."""
    files = root / manifest.name
    for attempt in range(2, scale.repeats + 2):
        drop_cache(files)
        begun = time.perf_counter()
        count = read_all(files)
        read = time.perf_counter() - begun
        drop_cache(files)
        begun = time.perf_counter()
        restore_tables(client, root, manifest, attempt=attempt)
        loaded = time.perf_counter() - begun
        assert some_rows(client, scale) == saved, "the rows restored are not the rows saved"
        figures.add(f"{name}_vs_disk", read / loaded)
        figures.add(f"{name}_mb_per_s", count / loaded / 1e6)


def training_while_saving(stack: ExitStack, scale: Scale, figures: Figures) -> None:
    """The demo model, which fills both cores, with a checkpoint of all rows every few steps.

    What a step takes on the average from one checkpoint to the next, over one that none is begun or written beside: while it
    is, it lies in a folder whose name has a dot.
    """
    folder, out = (stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(2))
    start_shards(stack, folder, 2, state=True)
    every = 10 if scale.quick else SAVE_EVERY
    config = demo_config(
        scale, run="saved", out=out, steps=every * (scale.repeats + 1), checkpoint_every=every, full_every=1, keep=1
    )
    steps: list[tuple[int, float, bool]] = []
    begun, saving = time.perf_counter(), False
    for progress in train(config, Place(identity="saved"), lambda: MemoryClient(f"file:{folder}"), "cpu"):
        assert not progress.phase.startswith("a checkpoint was not saved"), progress.phase
        if progress.step is not None:
            now, before = time.perf_counter(), saving
            saving = any(Path(out, FOLDER).glob(".*"))
            steps.append((progress.step.step, now - begun, before or saving))
            begun = time.perf_counter()
    for first in range(every, every * scale.repeats + 1, every):
        cycle = [(seconds, beside) for step, seconds, beside in steps if first <= step < first + every]
        alone = [seconds for seconds, beside in cycle if not beside]
        during = [seconds for seconds, beside in cycle if beside]
        if alone and during:
            figures.add("checkpoint_step_slowdown", statistics.fmean([*alone, *during]) / statistics.fmean(alone))
            figures.add("checkpoint_step_slowdown_beside", statistics.fmean(during) / statistics.fmean(alone))
            figures.add("steps_beside_a_checkpoint", len(during))


def some_rows(client: MemoryClient, scale: Scale) -> bytes:
    """Every hundredth row."""
    return client.lookup(TABLE, np.arange(0, table_rows(scale), 100)).tobytes()


def drop_cache(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: Path) -> int:
    """Bytes read, sequentially, into one buffer."""
    buffer, count = bytearray(READ_BYTES), 0
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while read := file.readinto(buffer):
                count += read
    return count
