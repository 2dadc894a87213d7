"""What a checkpoint costs: the pushes that run beside its sweep, and loading it against reading its files.

    python benchmarks/checkpoint.py [--rows 400000] [--folder DIR]

Both are ratios within one run. The page cache is dropped from the files (POSIX_FADV_DONTNEED) before each cold read.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from engrid.shard.rows import PartitionRows
from engrid.shard.saving import save_snapshot
from engrid.shard.snapshot import ImageMemory
from engrid.storage.checkpoint import Checkpoints
from engrid.storage.disk import LocalDisk
from engrid.storage.manifest import Manifest
from engrid.storage.partition import SavedPartition
from engrid.tables import OptimizerSpec, RowTable, TableSpec

PUSH_ROWS = 8192
ROUNDS = 5


def drop_cache(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_all(folder: Path) -> int:
    """Sequentially, into one buffer."""
    buffer, count = bytearray(8 << 20), 0
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while read := file.readinto(buffer):
                count += read
    return count


class Pushes:
    """Pushes of random rows, `pause_s` apart as training's are; the time of each."""

    def __init__(self, part: PartitionRows, pause_s: float) -> None:
        self.part, self.pause_s, self.step = part, pause_s, 0
        rng = np.random.default_rng(0)
        rows, width = part.stop - part.start, part.rows.spec.width
        self.ids = [np.unique(rng.integers(0, rows, PUSH_ROWS)) for _ in range(16)]
        self.grads = rng.standard_normal((PUSH_ROWS, width)).astype(np.float32)

    def run(self, stop: threading.Event) -> list[float]:
        times = []
        while not stop.is_set():
            self.step += 1
            ids = self.ids[self.step % 16]
            start = time.perf_counter()
            self.part.apply(self.step, 0.001, [(ids, self.grads[: len(ids)])])
            times.append(time.perf_counter() - start)
            time.sleep(self.pause_s)
        return times


def beside(pushes: Pushes, work: threading.Event) -> tuple[list[float], threading.Thread]:
    times: list[float] = []
    thread = threading.Thread(target=lambda: times.extend(pushes.run(work)))
    thread.start()
    return times, thread


def cost_of_a_sweep(part: PartitionRows, checkpoints: Checkpoints, root: Path, pause_s: float) -> dict[str, float]:
    pushes, alone, during, sweeps, peaks = Pushes(part, pause_s), [], [], [], []
    for number in range(ROUNDS):
        for swept in (False, True):
            stop = threading.Event()
            memory = ImageMemory(1 << 30)
            folder = checkpoints.begin(f"step-{number:08d}", "cost")
            if swept:
                part.begin_snapshot(memory)
            times, thread = beside(pushes, stop)
            start = time.perf_counter()
            if swept:
                save_snapshot(part, checkpoints.disk, folder, ("t", 0), step=1, attempt=1, watermarks={})
                sweeps.append(time.perf_counter() - start)
                peaks.append(memory.peak_bytes)
            else:
                time.sleep(sweeps[-1] if sweeps else 1.0)
            stop.set()
            thread.join()
            part.settle_snapshot()
            (during if swept else alone).extend(times)
            shutil.rmtree(root / folder)
    quiet, busy = statistics.fmean(alone), statistics.fmean(during)
    return {
        "pause_ms": 1e3 * pause_s,
        "push_alone_ms": 1e3 * quiet,
        "push_while_swept_ms": 1e3 * busy,
        "push_ratio": busy / quiet,
        "step_ratio": (busy + pause_s) / (quiet + pause_s),
        "pushes_while_swept": len(during) / ROUNDS,
        "images_peak_MB": max(peaks) / 1e6,
        "sweep_MB_per_s": part.rows.nbytes / statistics.median(sweeps) / 1e6,
    }


def loading(part: PartitionRows, checkpoints: Checkpoints, root: Path) -> dict[str, float]:
    folder = checkpoints.begin("step-00000001", "bench")
    part.begin_snapshot(ImageMemory(1 << 30))
    saved: SavedPartition = save_snapshot(part, checkpoints.disk, folder, ("t", 0), step=1, attempt=1, watermarks={})
    part.settle_snapshot()
    spec = part.rows.spec
    checkpoints.publish(folder, Manifest(run="r", attempt=1, step=1, base="", tables={"t": spec}, partitions=[saved]))
    chain = checkpoints.chain("step-00000001")
    target = RowTable(spec)
    reads, loads = [], []
    for _ in range(ROUNDS):
        drop_cache(root)
        start = time.perf_counter()
        count = read_all(root)
        reads.append(count / (time.perf_counter() - start))
        drop_cache(root)
        start = time.perf_counter()
        checkpoints.restore(chain, target)
        loads.append(count / (time.perf_counter() - start))
    start = time.perf_counter()
    checkpoints.restore(chain, target)
    warm = count / (time.perf_counter() - start)
    for name, array in part.rows.arrays().items():
        assert array.tobytes() == target.arrays()[name].tobytes()
    start = time.perf_counter()
    assert not checkpoints.verify("step-00000001")
    return {
        "MB": count / 1e6,
        "cold_read_MB_per_s": statistics.median(reads) / 1e6,
        "cold_load_MB_per_s": statistics.median(loads) / 1e6,
        "load_vs_disk": statistics.median(loads) / statistics.median(reads),
        "warm_load_MB_per_s": warm / 1e6,
        "warm_verify_MB_per_s": count / (time.perf_counter() - start) / 1e6,
    }


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rows", type=int, default=400_000)
    arguments.add_argument("--folder", default=None, help="where the checkpoint is written; default: a temporary one")
    options = arguments.parse_args()
    spec = TableSpec(
        name="t",
        rows=options.rows,
        row_format="float32",
        width=64,
        seed=0,
        layer=0,
        init_std=0.02,
        optimizer=OptimizerSpec(kind="adam"),
    )
    part = PartitionRows(0, spec.rows, RowTable(spec))
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        checkpoints = Checkpoints(LocalDisk(Path(root)))
        for pause_s in (0.0, 0.05):
            print(json.dumps(cost_of_a_sweep(part, checkpoints, Path(root), pause_s)))
        print(json.dumps(loading(part, checkpoints, Path(root))))


if __name__ == "__main__":
    main()
