"""What the benchmarks share: child processes, shards and their tables, and the machine's name."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engrid.client import MemoryClient
from engrid.control.tables import create_tables, load_partition
from engrid.tables import RowTable, TableSpec

ROOT = Path(__file__).parents[1]
BASELINES = Path(__file__).parent / "baselines"
WIDTH = 32
ROW_BYTES = 4 * WIDTH
FP8_ROW_BYTES = 264
FP8_WIDTH = 256
HEADS = 16
"""Rows one token reads: 2 orders of 8 heads, as the paper preset has."""
VERSIONED = ("grpcio", "numpy", "torch", "redis", "hiredis", "ray", "mooncake-transfer-engine-non-cuda", "numba")
LOAD_ROWS = 1 << 14
"""Rows in one message while a sealed table is loaded."""


def start(stack: ExitStack, command: list[str], expect: str) -> tuple[subprocess.Popen[str], str]:
    """Starts a child, stopped with the stack; returns it and the first line it prints, which must hold `expect`.

    It runs in the root of the checkout and in a process group of its own: Ctrl-C is for us, who then stop it.
    """
    child = stack.enter_context(
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", cwd=ROOT, process_group=0
        )
    )
    stack.callback(child.terminate)
    assert child.stdout is not None
    line = child.stdout.readline().strip()
    if expect not in line:
        raise SystemExit(f"{command[:4]} did not start: {line!r}")
    return child, line


def start_shards(stack: ExitStack, folder: str, count: int, *options: str, state: bool = False) -> list[int]:
    """Shards s0, s1, ... as processes of their own, in the file directory at `folder`; returns their pids.

    state: with a log, that of s0 in state_folder(folder, 0).
    """
    pids = []
    for index in range(count):
        shard = [
            sys.executable,
            "-P",
            "-m",
            "engrid.shard",
            "--name",
            f"s{index}",
            "--directory",
            f"file:{folder}",
            *options,
        ]
        if state:
            shard += ["--state", str(state_folder(folder, index))]
        pids.append(start(stack, shard, "serves at")[0].pid)
    return pids


def state_folder(folder: str, index: int) -> Path:
    return Path(folder, "state", f"s{index}")


def start_baseline(stack: ExitStack, name: str, *options: str) -> str:
    """A baseline's server; returns its address."""
    return start(stack, [sys.executable, str(BASELINES / f"{name}.py"), *options], "127.0.0.1")[1]


def bench_table(
    mib: int, *, name: str = "bench", row_bytes: int = ROW_BYTES, buckets: tuple[int, ...] = ()
) -> TableSpec:
    """A read-only table of about `mib` MiB, or of the buckets given. row_bytes: 264 for fp8, else float32 rows."""
    fp8 = row_bytes == FP8_ROW_BYTES
    buckets = buckets or ((mib << 20) // row_bytes // HEADS,) * HEADS
    return TableSpec(
        name=name,
        rows=sum(buckets),
        row_format="fp8_e4m3_ue8m0" if fp8 else "float32",
        width=FP8_WIDTH if fp8 else row_bytes // 4,
        seed=0,
        layer=0,
        init_std=1.0,
        optimizer=None,
        buckets=buckets,
    )


def load_sealed(client: MemoryClient, spec: TableSpec, local: RowTable) -> None:
    """Makes a sealed table over all shards and loads it with the rows of `local`, the whole table."""

    def chunks(begin: int, end: int) -> Iterator[bytes]:
        for first in range(begin, end, LOAD_ROWS):
            yield local.raw(first, min(first + LOAD_ROWS, end)).tobytes()

    create_tables(client, [spec])
    for part in client.placement.partitions[spec.name]:
        load_partition(client, spec.name, part.index, chunks(part.start, part.stop), step=0)


def cpu_seconds(pid: int) -> float:
    """User and system time a process has used so far, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def about() -> dict[str, str]:
    """When, where and with what."""
    models = [
        line
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        if line.startswith("model name")
    ]
    found = {}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": f"{os.cpu_count()} cores for all processes together",
        "load": f"{os.getloadavg()[0]:.1f} processes running in the minute before",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {number}" for name, number in found.items()),
    }
