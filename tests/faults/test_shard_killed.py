"""kill -9 of real shards at random points under pushes: what was acknowledged is there after the restart, once."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from engrid.client import MemoryClient
from engrid.control.tables import create_tables
from tests.mortal import SPEC, MortalShard, Pushers, push_while

SHARDS = 2
slow = pytest.mark.faults
KILLS = [
    pytest.param(True, 6, id="durable, 6 kills"),
    pytest.param(False, 6, id="memory level too as records are written first, 6 kills"),
    pytest.param(True, 200, id="durable, 200 kills", marks=slow),
    pytest.param(False, 50, id="memory level too as records are written first, 50 kills", marks=slow),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("durable", "kills"), KILLS)
def test_every_acknowledged_push_survives_kill_9_exactly_once(tmp_path, durable, kills):
    """Each of two shards is killed at a moment of its own, so that steps are left half committed, while bases are made
    under way. The workers only push: that shards go and come back is the client's to deal with."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    short = ["--log-bytes", "12000"]
    with MortalShard(tmp_path, "s0", *short) as first, MortalShard(tmp_path, "s1", *short) as second:
        with MemoryClient(f"file:{tmp_path}") as client:
            create_tables(client, [SPEC], partitions_per_shard=2)
        with Pushers(tmp_path, durable=durable, seed=seed) as pushers, ThreadPoolExecutor(SHARDS) as pool:

            def kill(shard, after):
                time.sleep(after)
                shard.kill()
                shard.start()

            def kill_both():
                delays = [chance.uniform(0, 0.2) for _ in range(SHARDS)]
                list(pool.map(kill, (first, second), delays))

            for _ in range(kills // SHARDS):
                push_while(pushers, kill_both)
                pushers.check()
        assert list((first.state / "base").iterdir()), "no base was made under way"
