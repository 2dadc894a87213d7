"""Training is hardly kept waiting for its rows: a bound on the share of a step, as no other test sees a slower client.

Placing rows by strided copies once took the wait from 3 to 30 ms a step, and every other test was content. The share is a
ratio inside one run, which another machine or a busy one changes little.
"""

import asyncio
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from engrid.client import MemoryClient
from engrid.worker.config import TrainConfig
from engrid.worker.train.run import Place, train
from tests.shards import shard_process

BOUND = 0.02
"""Of a step's time, median over steps. Six good runs on 2 cores, busy with other work: 0.005 to 0.008; two of the commit
with the fault: 0.031 and 0.074."""


@pytest.fixture
def one_thread():
    """Several of torch would wait for each other where the cores are taken, and so hide a wait in longer steps."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.faults
def test_training_waits_for_its_rows_a_small_share_of_its_time(tmp_path, one_thread):
    """The demo's model on a package of the standard library, its two shards on the same cores."""
    text = str(Path(asyncio.__file__).parent)
    config = TrainConfig(run="guard", out=str(tmp_path / "out"), text=text, steps=15, evaluations=0, save=False)
    with ExitStack() as stack:
        for name in ("s0", "s1"):
            stack.enter_context(shard_process(tmp_path / "store", name))
        place = Place(identity="guard-1")
        *_, last = train(config, place, lambda: MemoryClient(f"file:{tmp_path / 'store'}"), "cpu")
    assert last.result["exposed_wait_share"] < BOUND, f"{1e3 * last.result['exposed_wait']:.1f} ms a step"
