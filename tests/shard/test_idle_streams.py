"""Clients that keep streams and do nothing with them keep nobody out, and notice nothing when a stream of theirs is ended."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from engrid.client import MemoryClient, TrainingRun
from engrid.control.tables import create_tables
from engrid.rpc.errors import ShardUnavailableError
from engrid.shard.grpc import servicer
from engrid.tables import initial_rows
from engrid.v1 import memory_pb2 as pb
from tests.shards import local_shards, table
from tests.waiting import until

ROWS = initial_rows(table(), 0, 10).tobytes()


@contextmanager
def store(tmp_path, **config):
    with local_shards(tmp_path, 1, **config) as (shard,), MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [table()])
        yield shard, client


def clients(stack, tmp_path, count):
    """Each with one stream open."""
    made = [stack.enter_context(MemoryClient(f"file:{tmp_path}")) for _ in range(count)]
    for each in made:
        each.lookup("t", np.arange(4))
    return made


def right(client):
    return client.lookup("t", np.arange(10), timeout=10).tobytes() == ROWS


def test_longest_idle_stream_makes_way_and_its_client_notices_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(servicer, "IDLE_SECONDS", 0.0)
    with store(tmp_path, max_streams=4) as (_, client), ExitStack() as stack:
        for _ in range(3):
            for each in clients(stack, tmp_path, 6):
                assert right(each)
        idle = clients(stack, tmp_path, 8)
        for each in idle * 3:
            assert right(each)
        assert client_streams(client)() <= 4


def test_stream_that_has_something_to_answer_does_not_make_way(tmp_path, monkeypatch):
    monkeypatch.setattr(servicer, "IDLE_SECONDS", 0.0)
    with store(tmp_path, max_streams=2) as (_, client), ExitStack() as stack:
        run = TrainingRun(client, run="r", attempt=1, worker=0, workers=1, tables=["t"])
        first, second, third = (stack.enter_context(MemoryClient(f"file:{tmp_path}")) for _ in range(3))
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(each.lookup, "t", np.arange(3), step=1, timeout=20) for each in (first, second)]
            streams = client_streams(client)
            until(lambda: streams() == 2)

            def refused():
                with pytest.raises(ShardUnavailableError, match="shard s0 has its 2 lookup streams under way"):
                    third.lookup("t", np.arange(3), timeout=5)
                return True

            assert refused()
            run.push({"t": (np.arange(3), np.zeros((3, 8), np.float32))}, step=1, learning_rate=1.0)
            assert all(len(each.result()) == 3 for each in waiting)
        assert right(third)
        assert right(first)


def client_streams(client):
    stub = client.connections.transport("s0").stub
    return lambda: stub.Stats(pb.StatsRequest(), timeout=5).streams


def test_stream_that_was_just_used_does_not_make_way(tmp_path):
    with store(tmp_path, max_streams=2) as (_, _client), ExitStack() as stack:
        clients(stack, tmp_path, 2)
        with pytest.raises(ShardUnavailableError, match="2 lookup streams under way"):
            clients(stack, tmp_path, 1)


def test_lookups_of_many_clients_over_few_streams_are_all_right(tmp_path, monkeypatch):
    """A stream is ended while its client sends on it, again and again."""
    monkeypatch.setattr(servicer, "IDLE_SECONDS", 0.0)
    with store(tmp_path, max_streams=3) as (_, _client), ExitStack() as stack:
        made = [stack.enter_context(MemoryClient(f"file:{tmp_path}")) for _ in range(6)]
        for _ in range(30):
            for each in made:
                assert right(each)


HOLD = """
import sys, time
import numpy as np
from engrid.client import MemoryClient
clients = [MemoryClient(f"file:{sys.argv[1]}") for _ in range(4)]
for each in clients:
    each.lookup("t", np.arange(4))
print("open", flush=True)
time.sleep(1000)
"""


def test_streams_of_a_frozen_process_are_closed(tmp_path):
    with store(tmp_path, keepalive=1.0) as (_, client):
        streams = client_streams(client)
        client.lookup("t", np.arange(4))
        holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
        try:
            assert holder.stdout.readline() == "open\n"
            assert streams() == 5
            os.kill(holder.pid, signal.SIGSTOP)
            until(lambda: streams() == 1)
            assert right(client), "one that answers keeps its stream"
        finally:
            holder.kill()
            holder.wait()
            holder.stdout.close()


def test_idle_client_of_a_live_process_keeps_its_stream(tmp_path):
    with store(tmp_path, keepalive=1.0) as (_, client):
        streams = client_streams(client)
        client.lookup("t", np.arange(4))
        stream = client.connections.transport("s0")._streams[False]
        time.sleep(2.5)  # what is tested is that nothing happens
        assert streams() == 1
        assert not stream.broken
