"""A client that asks and does not read: the shard serves the others, holds little for it, and is rid of it in time."""

import itertools
import threading
import time
from contextlib import contextmanager

import grpc
import numpy as np
import pytest

from engrid.client import MemoryClient, TrainingRun
from engrid.control.tables import create_tables
from engrid.rpc.channel import open_channel
from engrid.rpc.wire import encode_cancel, encode_request
from engrid.shard.config import ShardConfig
from engrid.shard.grpc.stream import MAX_QUEUED, MAX_QUEUED_BYTES, MAX_REFUSED
from engrid.v1 import memory_pb2 as pb
from engrid.v1 import memory_pb2_grpc
from tests.shards import local_shards, table

SPEC = table(rows=20_000, width=64)
REQUEST = np.arange(4000)
"""A reply of a megabyte."""


@contextmanager
def store(tmp_path, **config):
    """One shard in this process with SPEC in it; yields its address and a client."""
    with local_shards(tmp_path, 1, **config) as (shard,), MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [SPEC])
        yield shard.address, client


@contextmanager
def lookup_stream(address, frames):
    """A Lookup call of which nothing is read unless the caller does."""
    with open_channel(address) as channel:
        call = channel.stream_stream("/engrid.v1.MemoryService/Lookup")(frames)
        try:
            yield call
        finally:
            call.cancel()


def request(number, step=0, ids=REQUEST):
    return encode_request([("t", ids, 256)], number=number, epoch=1, timeout_us=10**8, step=step, run="")


def endless(release):
    """Requests for more than any window holds, and then an open stream."""
    yield from (request(number) for number in range(1, 200))
    release.wait()


def stats(address):
    with open_channel(address) as channel:
        return memory_pb2_grpc.MemoryServiceStub(channel).Stats(pb.StatsRequest(), timeout=10)


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_client_that_does_not_read_is_cut_off_and_the_others_are_served_meanwhile(tmp_path):
    release = threading.Event()
    with store(tmp_path, reply_timeout=1.5) as (address, client):
        client.lookup("t", np.arange(5))
        threads = threading.active_count()
        with lookup_stream(address, endless(release)) as first, lookup_stream(address, endless(release)) as second:
            until(lambda: stats(address).streams == 3)
            while stats(address).streams == 3:
                assert len(client.lookup("t", REQUEST, timeout=1)) == len(REQUEST)
                assert threading.active_count() < threads + 20
            until(lambda: stats(address).streams == 2)  # small and bulk of the client that reads
            for call in (first, second):
                with pytest.raises(grpc.RpcError) as ended:
                    list(call)
                assert ended.value.code() is grpc.StatusCode.CANCELLED
        release.set()
        assert stats(address).errors == 2
        assert len(client.lookup("t", REQUEST)) == len(REQUEST), "a stream that is read outlives the bound"


def test_little_is_gathered_for_a_client_that_does_not_read(tmp_path):
    release = threading.Event()
    with store(tmp_path) as (address, _), lookup_stream(address, endless(release)):
        gathered = [-1, stats(address).lookups]
        while gathered[-1] == 0 or gathered[-1] != gathered[-2]:
            time.sleep(0.3)
            gathered.append(stats(address).lookups)
        assert gathered[-1] < 40, "of 199 megabytes asked for"
        release.set()


def test_slow_client_that_reads_is_served_to_the_end(tmp_path):
    frames = (request(number) for number in range(1, 31))
    with store(tmp_path, reply_timeout=1.6) as (address, _), lookup_stream(address, frames) as replies:
        taken = 0
        for raw in replies:
            taken += pb.LookupReply.FromString(raw).number == taken + 1
            time.sleep(0.08)
        assert taken == 30


def test_stalled_streams_do_not_keep_others_out_for_ever(tmp_path):
    release = threading.Event()
    with store(tmp_path, reply_timeout=1, max_streams=2) as (address, client):
        with lookup_stream(address, endless(release)), lookup_stream(address, endless(release)):
            until(lambda: stats(address).streams == 2)
            until(lambda: stats(address).streams == 0)
            assert len(client.lookup("t", REQUEST)) == len(REQUEST)
        release.set()


def behind_one_that_waits(tmp_path, frames):
    """What a stream answers to a request for a step that nobody pushes, and then these; numbers and errors of the
    replies, and how the stream ended."""
    waits = encode_request([("trained", np.arange(3), 32)], number=1, epoch=2, timeout_us=10**8, step=1, run="")
    found = []
    with store(tmp_path) as (address, client):
        create_tables(client, [table("trained")])
        TrainingRun(client, run="r", attempt=1, worker=0, workers=1, tables=["trained"])
        with lookup_stream(address, itertools.chain([waits], frames)) as call:
            try:
                for raw in call:
                    answer = pb.LookupReply.FromString(raw)
                    found.append((answer.number, answer.error.code))
            except grpc.RpcError as ended:
                return found, ended
    return found, None


def test_requests_behind_one_that_waits_are_bounded_in_bytes(tmp_path):
    megabyte = np.zeros(1 << 17, np.int64)
    frames = [request(number, ids=megabyte) for number in range(2, 22)]
    found, ended = behind_one_that_waits(tmp_path, [*frames, encode_cancel(1)])
    assert ended is None
    assert found[0] == (1, pb.CANCELLED)
    assert sorted(number for number, _ in found) == list(range(1, 22)), "each is answered once"
    fit = MAX_QUEUED_BYTES // len(frames[0])
    assert [number for number, _ in found[1 : 21 - fit]] == list(range(2 + fit, 22))
    assert {code for _, code in found[1:]} == {pb.REQUEST_TOO_LARGE}


def test_client_that_goes_on_asking_and_takes_no_refusal_is_cut_off(tmp_path):
    frames = (request(number, ids=np.arange(3)) for number in itertools.count(2))
    found, ended = behind_one_that_waits(tmp_path, frames)
    assert ended.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"{MAX_QUEUED} requests" in ended.details()
    assert len(found) <= 1 + MAX_QUEUED + MAX_REFUSED


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_bound_must_be_positive(seconds):
    with pytest.raises(ValueError, match="reply_timeout"):
        ShardConfig(name="s", directory="file:d", reply_timeout=seconds)
