"""Pushes over a network that loses, repeats and reorders one call in ten: every step counts once."""

import json
import random
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

import tests.faulty_network as network
from engrid.client import MemoryClient, create_tables
from tests.mortal import SPEC, MortalShard, Pushers, push_while

PROXY_HOST = "127.0.0.2"
"""A shard listens at 127.0.0.1 and tells others this one, where the faulty network listens on the same port."""
RATE = 0.1


class Network:
    """The faulty network before one shard."""

    def __init__(self, shard, seed):
        command = [sys.executable, Path(network.__file__), "--listen", f"{PROXY_HOST}:{shard.port}"]
        command += ["--shard", f"127.0.0.1:{shard.port}", "--rate", str(RATE), "--seed", str(seed)]
        self._process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)
        assert "passes on" in self._process.stdout.readline()

    def end(self):
        """How often it did what."""
        self._process.terminate()
        told = self._process.communicate(timeout=10)[0]
        return json.loads(told)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def troubled(tmp_path):
    """Two shards behind faulty networks, and workers that try the same push again until it is acknowledged."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    with ExitStack() as stack:
        names = ("s0", "s1")
        options = ("--advertise-host", PROXY_HOST, "--log-bytes", "20000")
        shards = [stack.enter_context(MortalShard(tmp_path, name, *options)) for name in names]
        networks = [stack.enter_context(Network(shard, seed + at)) for at, shard in enumerate(shards)]
        with MemoryClient(f"file:{tmp_path}") as client:
            create_tables(client, [SPEC], partitions_per_shard=2)
        pushers = stack.enter_context(
            Pushers(tmp_path, durable=True, seed=seed, push_timeout=0.4, tries=50),
        )
        yield shards, networks, pushers


@pytest.mark.parametrize("steps", [40, pytest.param(300, marks=[pytest.mark.faults, pytest.mark.timeout(600)])])
def test_sums_are_exact_over_a_network_that_loses_repeats_and_reorders(troubled, steps):
    _, networks, pushers = troubled
    for _ in range(steps):
        pushers.push()
        if pushers.step % 10 == 0:
            pushers.check()
    time.sleep(network.LONGEST_ECHO)
    pushers.check()
    done = {}
    for each in networks:
        for what, times in each.end().items():
            done[what] = done.get(what, 0) + times
    assert min(done.get(what, 0) for what in ("request lost", "reply lost", "twice", "again later", "overtaken")) > 0
    assert pushers.failed, "no push ran out of time and was tried again"


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=[pytest.mark.faults, pytest.mark.timeout(600)])])
def test_a_push_tried_again_after_its_shard_was_killed_counts_once(troubled, kills):
    """What was asked of the killed shard comes to the new one late, twice or never."""
    shards, _, pushers = troubled
    chance = random.Random(kills)
    for _ in range(kills):
        shard = chance.choice(shards)

        def kill(shard=shard):
            time.sleep(chance.uniform(0, 0.1))
            shard.kill()
            shard.start()

        push_while(pushers, kill)
        pushers.check()
