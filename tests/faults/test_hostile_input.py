"""More of shard/test_hostile_input.py: other seeds each time, against a process whose memory and threads are looked at."""

import random
from pathlib import Path

import pytest

from tests.shard.hostile_calls import adopt_anything, call_with_anything, restore_anything
from tests.shards import shard_process

pytestmark = pytest.mark.faults
SEEDS = [random.SystemRandom().randrange(1 << 32) for _ in range(3)]


def held(process):
    """MiB and threads."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"])


@pytest.mark.parametrize("seed", SEEDS)
def test_thousands_of_messages(tmp_path, seed):
    with shard_process(tmp_path, "s0", "--state", tmp_path / "state", "--log-bytes", "1000000") as (process, address):
        call_with_anything(tmp_path, address, seed, 100)
        memory, _ = held(process)
        call_with_anything(tmp_path, address, seed + 1, 4000)
        assert held(process)[0] < memory + 64
        assert held(process)[1] < 120
        assert process.poll() is None
    with shard_process(tmp_path, "s0", "--state", tmp_path / "state") as (process, _):
        assert process.poll() is None, "it starts again from what it has kept"


@pytest.mark.parametrize("seed", SEEDS)
def test_thousands_of_placements(tmp_path, seed):
    with shard_process(tmp_path, "s0", "--state", tmp_path / "state") as (_, address):
        adopt_anything(tmp_path, address, seed, 3000)
    with shard_process(tmp_path, "s0", "--state", tmp_path / "state") as (process, _):
        assert process.poll() is None


@pytest.mark.parametrize("seed", SEEDS)
def test_thousands_of_manifests(tmp_path, seed):
    with shard_process(tmp_path):
        restore_anything(tmp_path, seed, 3000)
