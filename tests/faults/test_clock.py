"""A wall clock that is set back changes nothing: pins, deadlines and the log go by the monotonic clock or by none."""

import subprocess
import sys
import time

import numpy as np
import pytest

from engrid.client import MemoryClient
from engrid.control.tables import create_tables
from engrid.rpc.errors import PinnedError, StepNotReachedError
from engrid.v1 import memory_pb2 as pb
from tests.mortal import SPEC, Pushers, free_port
from tests.shards import load_initial, table

FALLING_CLOCK = """
import itertools, time
hours = itertools.count()
wall = time.time
time.time = lambda: wall() - 3600 * next(hours)
time.time_ns = lambda: int(time.time() * 1e9)
from engrid.shard.__main__ import main
main()
"""
"""A shard whose clock goes back an hour whenever it is read."""


@pytest.fixture
def start_shard(tmp_path):
    """Starts the shard, or kills it and starts it again."""
    options = ["--name", "s0", "--directory", f"file:{tmp_path}", "--state", str(tmp_path / "state")]
    options += ["--listen", f"127.0.0.1:{free_port()}", "--log-bytes", "20000"]
    started = []

    def end():
        while started:
            process = started.pop()
            process.kill()
            process.communicate()

    def start():
        end()
        started.append(
            subprocess.Popen([sys.executable, "-c", FALLING_CLOCK, *options], stdout=subprocess.PIPE, text=True)
        )
        assert "serves at" in started[-1].stdout.readline()

    yield start
    end()


def test_pushes_and_restarts_under_a_falling_clock(tmp_path, start_shard):
    start_shard()
    with MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [SPEC])
    with Pushers(tmp_path, durable=True, seed=8) as pushers:
        for _ in range(3):
            for _ in range(20):
                pushers.push()
            start_shard()
            pushers.check()


def test_deadlines_and_pins_end_in_time_under_a_falling_clock(tmp_path, start_shard):
    start_shard()
    sealed = table("sealed@1", optimizer=None)
    with MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [SPEC])
        load_initial(client, sealed)
        begun = time.monotonic()
        with pytest.raises(StepNotReachedError):
            client.lookup("t", np.arange(5), step=1, timeout=0.5)
        assert 0.3 < time.monotonic() - begun < 3
        stub = client.connections.transport("s0").stub
        stub.Pin(pb.PinRequest(reader="reader", tables=[sealed.name], seconds=1.0))
        with pytest.raises(PinnedError):
            create_tables(client, [sealed], replace=True)
        time.sleep(1.1)
        create_tables(client, [sealed], replace=True)
