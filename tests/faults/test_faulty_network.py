"""Pushes over a network that loses, repeats and reorders one call in ten: every step counts once."""

import json
import os
import random
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

import tests.faulty_network as network
from engrid.client import MemoryClient, TrainingRun
from engrid.control.checkpoints import CheckpointSave, restore_tables
from engrid.control.tables import create_tables
from engrid.rpc.errors import FencedError, UnavailableError
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


def test_a_push_tried_again_after_a_resume_is_fenced_and_the_new_attempts_counts_once(tmp_path):
    """Both have a push that one shard took and the other, being dead, did not."""
    with ExitStack() as stack:
        shards = [stack.enter_context(MortalShard(tmp_path, name)) for name in ("s0", "s1")]
        client = stack.enter_context(MemoryClient(f"file:{tmp_path}"))
        create_tables(client, [SPEC], partitions_per_shard=2)
        begin = {"workers": 1, "durable": True, "seed": 1, "push_timeout": 0.5}
        old = stack.enter_context(Pushers(tmp_path, **begin))
        for _ in range(3):
            old.push()
        saved = CheckpointSave(client, tmp_path / "saved", run="r", attempt=1, step=3, tables=["t"]).finish({}, {})
        sum_saved = old.sum.copy()
        old.push()
        fail_while_dead(old, shards[1])

        restore_tables(client, tmp_path / "saved", saved, attempt=2)
        with pytest.raises(FencedError, match="attempt 1 of run r is fenced"):
            push_again_once_it_is_back(old)
        new = stack.enter_context(Pushers(tmp_path, **begin | {"seed": 2, "attempt": 2}))
        assert new.step == 3
        new.sum = sum_saved
        new.check()
        fail_while_dead(new, shards[0])
        with pytest.raises(FencedError):
            push_again_once_it_is_back(old)
        push_again_once_it_is_back(new)
        assert new.step == 4
        new.check()
        new.push()
        new.check()


def push_again_once_it_is_back(pushers):
    """A shard may need longer than one push is given."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return pushers.push_again()
        except UnavailableError:
            assert time.monotonic() < deadline


def fail_while_dead(pushers, shard):
    shard.kill()
    with pytest.raises(UnavailableError):
        pushers.push()
    shard.start()


def test_a_held_push_that_its_host_lost_is_pushed_again_before_it_is_committed(tmp_path, monkeypatch):
    """Between push and commit: at `memory` level a host that loses power loses the end of the log, the push in it."""
    with ExitStack() as stack:
        shards = [stack.enter_context(MortalShard(tmp_path, name)) for name in ("s0", "s1")]
        with MemoryClient(f"file:{tmp_path}") as client:
            create_tables(client, [SPEC], partitions_per_shard=2)
        pushers = stack.enter_context(Pushers(tmp_path, workers=1, durable=False, seed=3))
        for _ in range(3):
            pushers.push()
        log = shards[1].state / "log"
        sizes = {path: path.stat().st_size for path in log.iterdir()}
        real, losses = TrainingRun._commit, []

        def commit(run, step, requests):
            if not losses:
                shards[1].kill()
                for path, size in sizes.items():
                    losses.append(path.stat().st_size - size)
                    os.truncate(path, size)
                shards[1].start()
            real(run, step, requests)

        monkeypatch.setattr(TrainingRun, "_commit", commit)
        pushers.push()
        assert sum(losses) > 0, "the push was in the log"
        pushers.check()
        pushers.push()
        pushers.check()
        for shard in shards:
            shard.kill()
            shard.start()
        pushers.check()
