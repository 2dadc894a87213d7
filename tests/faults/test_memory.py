"""A shard whose memory really runs out while a step is applied: the step is applied once, or the shard ends."""

import resource
from pathlib import Path

import numpy as np
import pytest

from engrid.client import ClientConfig, MemoryClient, TrainingRun
from engrid.control.tables import create_tables
from engrid.rpc.errors import EngridError
from tests.shards import shard_process, table

ROWS, PUSHED, WIDTH = 400_000, 300_000, 32


def address_space(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmSize"))


@pytest.mark.faults
@pytest.mark.parametrize("room", [120 << 20, 200 << 20, 280 << 20])
def test_a_step_that_found_no_memory_is_applied_once_there_is_some(tmp_path, room):
    """The shard can receive the second worker's gradients and not add them up."""
    config = ClientConfig(push_timeout=10)
    with shard_process(tmp_path) as (process, _), MemoryClient(f"file:{tmp_path}", config) as client:
        create_tables(client, [table(rows=ROWS, width=WIDTH, init_std=0.0)])
        runs = [TrainingRun(client, run="r", attempt=1, worker=worker, workers=2, tables=["t"]) for worker in (0, 1)]
        gradients = {"t": (np.arange(PUSHED), np.ones((PUSHED, WIDTH), np.float32))}
        runs[0].push(gradients, step=1, learning_rate=1.0)
        limit = address_space(process.pid) + room
        resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        try:
            runs[1].push(gradients, step=1, learning_rate=1.0)
        except EngridError:
            if process.poll() is not None:
                assert process.returncode != 0
                return
            resource.prlimit(process.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            runs[1].push(gradients, step=1, learning_rate=1.0)
        rows = np.ascontiguousarray(client.lookup("t", np.array([0, PUSHED - 1, PUSHED]), step=1)).view(np.float32)
        assert rows[:, 0].tolist() == [-2, -2, 0]
