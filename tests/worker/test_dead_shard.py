"""A shard that is gone or silent is an error by the deadline that names it: never zeros, never a hang."""

import os
import signal
import time
from contextlib import ExitStack

import grpc
import pytest

from engrid.v1 import compute_pb2 as pb
from tests.shards import shard_process
from tests.worker.conftest import describe, local_worker, tiny_config, train_request

pytestmark = pytest.mark.e2e

DEADLINE = 5.0
"""Seconds of a lookup (ClientConfig.timeout)."""


@pytest.fixture
def shards(folder):
    """Two shards, each a process: [(process, address), ...]."""
    with ExitStack() as stack:
        yield [stack.enter_context(shard_process(folder, name)) for name in ("s0", "s1")]


@pytest.fixture
def worker(folder, shards, trained):
    """Reads over gRPC."""
    with local_worker(folder, shared_memory=False, cache_bytes=0, push_timeout=3.0) as stub:
        stub.LoadModel(pb.LoadModelRequest(checkpoint=str(trained.checkpoint)), timeout=30)
        yield stub


def generate(worker, tokens=0):
    model = describe(worker).models[-1]
    return worker.Generate(pb.GenerateRequest(prompt="# ", max_new_tokens=tokens, model=model), timeout=30)


def assert_fails_naming(call, address, *codes):
    started = time.monotonic()
    replies = []
    with pytest.raises(grpc.RpcError) as failed:
        replies.extend(call)
    assert time.monotonic() - started < DEADLINE + 2
    assert failed.value.code() in codes, failed.value.details()
    assert f"s1 at {address}" in failed.value.details()
    assert not any(reply.HasField("totals") for reply in replies)
    return replies


def test_killed_shard_fails_generation_under_way_and_after_by_name(worker, shards):
    process, address = shards[1]
    call = generate(worker)
    next(call)
    process.kill()
    assert_fails_naming(call, address, grpc.StatusCode.UNAVAILABLE)
    replies = assert_fails_naming(generate(worker), address, grpc.StatusCode.UNAVAILABLE)
    assert not replies, "no token was made of missing rows"


def test_killed_shard_does_not_disturb_who_has_mapped_its_sealed_rows(folder, shards, trained):
    with local_worker(folder) as worker:
        worker.LoadModel(pb.LoadModelRequest(checkpoint=str(trained.checkpoint)), timeout=30)
        before = [reply.text for reply in generate(worker, 30)]
        for process, _ in shards:
            process.kill()
            process.wait()
        replies = list(generate(worker, 30))
        assert [reply.text for reply in replies] == before
        assert replies[-1].totals.rows_fetched == 0
        assert replies[-1].totals.rows_here > 0


def test_silent_shard_fails_generation_by_the_deadline_and_serves_again_after(worker, shards):
    process, address = shards[1]
    before = [reply.text for reply in generate(worker, 10)]
    os.kill(process.pid, signal.SIGSTOP)
    try:
        replies = assert_fails_naming(generate(worker), address, grpc.StatusCode.DEADLINE_EXCEEDED)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert not replies
    assert [reply.text for reply in generate(worker, 10)] == before


def test_killed_shard_fails_training_by_name_and_frees_the_worker(worker, shards, out):
    process, address = shards[1]
    call = worker.Train(train_request(tiny_config(out, run="other", steps=100_000)), timeout=60)
    for each in call:
        if each.step == 3:
            break
    process.kill()
    with pytest.raises(grpc.RpcError) as failed:
        list(call)
    assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
    assert f"s1 at {address}" in failed.value.details()
    off = tiny_config(out, memory="off")
    assert list(worker.Train(train_request(off), timeout=60))[-1].result
