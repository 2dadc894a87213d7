"""A shard that is back is found at once: nobody holds back for longer than a tenth of a second."""

import threading
import time

import numpy as np

from engrid.client import MemoryClient, TrainingRun, asking
from engrid.control.tables import create_tables
from engrid.rpc.channel import CHANNEL_OPTIONS
from tests.mortal import MortalShard
from tests.shards import table


def test_no_pause_between_two_tries_is_longer_than_100_ms():
    options = dict(CHANNEL_OPTIONS)
    assert options["grpc.initial_reconnect_backoff_ms"] <= options["grpc.max_reconnect_backoff_ms"] <= 100
    assert asking.SHORTEST_PAUSE <= asking.LONGEST_PAUSE <= 0.1


def test_a_push_that_has_waited_long_is_soon_done_once_its_shard_is_back(tmp_path):
    """Of three times the best: a busy machine makes some slow. Held back for up to a second, three are never so quick."""
    with MortalShard(tmp_path) as shard, MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [table(init_std=0.0)])
        run = TrainingRun(client, run="r", tables=["t"])
        waited = []
        for _ in range(3):
            shard.kill()
            done = []

            def push(done=done):
                run.push({"t": ([1], np.ones((1, 8), np.float32))}, step=run.step + 1, learning_rate=1.0)
                done.append(time.monotonic())

            pushing = threading.Thread(target=push)
            pushing.start()
            shard.start()
            back = time.monotonic()
            pushing.join(30)
            waited.append(done[0] - back)
        assert min(waited) < 0.4, waited
        assert (client.lookup("t", [1], step=3, dtype=np.float32) == -3).all()
