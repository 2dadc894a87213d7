"""Clients in processes of their own, and what a row costs in CPU time on all sides.

    python -m benchmarks.load DIRECTORY TABLE --tokens 512 --steps 32

is one client: it prints `ready`, and for each line `SECONDS` it is sent reads uniform ids so long and prints the rows it
got, the time that took and the CPU time it used, as JSON. Processes, not threads: threads would share one GIL, and what
would be measured is that.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks.common import cpu_seconds, start
from benchmarks.measure import IN_FLIGHT, Sample, drive, rate, rows_of, uniform_steps
from benchmarks.paths import Engrid
from engrid.client import ClientConfig, MemoryClient
from engrid.host.allocator import keep_buffers


@dataclass(frozen=True)
class Load:
    """What clients together did."""

    rows_per_second: float
    rows_per_cpu_second: float
    """Over the CPU time of clients and shards."""


class Clients:
    """Client processes that read the same table, at the same time."""

    def __init__(self, stack: ExitStack, count: int, folder: str, table: str, *, tokens: int, steps: int) -> None:
        command = [sys.executable, "-m", "benchmarks.load"]
        options = (f"file:{folder}", table, "--tokens", str(tokens), "--steps", str(steps))
        self._children = [
            start(stack, [*command, *options, "--seed", str(seed)], "ready")[0] for seed in range(1, count + 1)
        ]

    def run(self, seconds: float, shards: list[int]) -> Load:
        """shards: pids, for their CPU time."""
        before = sum(map(cpu_seconds, shards))
        for child in self._children:
            assert child.stdin is not None
            child.stdin.write(f"{seconds}\n")
            child.stdin.flush()
        done = []
        for child in self._children:
            assert child.stdout is not None
            line = child.stdout.readline()
            if not line:
                raise SystemExit("a client process of the benchmark ended early")
            done.append(json.loads(line))
        cpu = sum(each["cpu"] for each in done) + sum(map(cpu_seconds, shards)) - before
        for child in self._children:
            assert child.stdout is not None
            if child.stdout.readline().strip() != "compared":
                raise SystemExit("a client process of the benchmark got rows it had not asked for")
        rates = sum(each["rows"] / each["seconds"] for each in done)
        return Load(rates, sum(each["rows"] for each in done) / max(cpu, 1e-3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("table")
    for name in ("--tokens", "--steps", "--seed"):
        parser.add_argument(name, type=int, required=True)
    given = parser.parse_args()
    keep_buffers()
    with MemoryClient(given.directory, ClientConfig(shared_memory=False, cache_bytes=0)) as client:
        spec = client.placement.tables[given.table]
        path, sample = Engrid(client, given.table), Sample(rows_of(spec))
        steps = uniform_steps(spec, given.tokens, given.steps, given.seed)
        rate(path, steps, 0.0, sample)
        print("ready", flush=True)
        for line in sys.stdin:
            cpu = time.process_time()
            rows, took = drive(path, steps, float(line), sample, IN_FLIGHT)
            print(json.dumps({"rows": rows, "seconds": took, "cpu": time.process_time() - cpu}), flush=True)
            sample.compare()
            print("compared", flush=True)


if __name__ == "__main__":
    main()
