"""Two workers in two processes train as one does on their joined batch."""

import dataclasses
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import grpc
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engrid.client import MemoryClient
from engrid.v1 import compute_pb2 as pb
from engrid.worker.saved_model import open_checkpoint
from engrid.worker.train.trainer import Batches
from tests.shards import local_shards
from tests.worker.conftest import (
    corpus_of,
    describe,
    everything,
    finish,
    local_worker,
    make_out,
    table_bytes,
    tiny_config,
    train_request,
    within,
    worker_process,
    worker_stub,
)

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two workers over one store, the second in a process of its own: (folder, stubs)."""
    folder = tmp_path_factory.mktemp("pair")
    with ExitStack() as stack:
        _, address = stack.enter_context(worker_process(folder))
        stack.enter_context(local_shards(folder, 2))
        first = stack.enter_context(local_worker(folder))
        second = stack.enter_context(worker_stub(address()))
        yield folder, (first, second)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(stubs, config, identity, only=None):
    """A Train call on each worker, or on one of them only, as ranks of one run."""
    ranks = {"identity": identity, "workers": len(stubs), "rendezvous": f"127.0.0.1:{free_port()}"}
    chosen = range(len(stubs)) if only is None else [only]
    return [stubs[rank].Train(train_request(config, rank=rank, **ranks), timeout=60) for rank in chosen]


def results(calls):
    with ThreadPoolExecutor(len(calls)) as threads:
        return [json.loads(messages[-1].result) for messages in threads.map(list, calls)]


def test_ranks_share_out_the_windows_of_one_worker(out):
    config = tiny_config(out, batch=3)
    corpus = corpus_of(config)
    joined = Batches(dataclasses.replace(config, batch=6), corpus, 0, 1)
    ranks = [Batches(config, corpus, rank, 2) for rank in range(2)]
    for step in (1, 2, 7):
        windows = np.concatenate([rank.at(step) for rank in ranks])
        assert windows.shape == (6, 25)
        assert sorted(map(tuple, windows)) == sorted(map(tuple, joined.at(step)))
        assert not np.array_equal(ranks[0].at(step), ranks[1].at(step))
    assert not np.array_equal(joined.at(1), joined.at(2))
    other = Batches(dataclasses.replace(config, batch=6, seed=1), corpus, 0, 1)
    assert not np.array_equal(joined.at(1), other.at(1))


@pytest.mark.parametrize("row_format", ["float32", "bfloat16"])
def test_two_ranks_give_the_losses_rows_and_weights_of_one_on_the_joined_batch(pair, tmp_path, row_format):
    folder, stubs = pair
    config = tiny_config(
        make_out(tmp_path / "two"), run=f"two-{row_format}", batch=2, evaluations=2, learning_rate=1e-3
    )
    engram = dataclasses.replace(config.model.engram, row_format=row_format)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, engram=engram))
    one = dataclasses.replace(config, out=str(make_out(tmp_path / "one")), run=f"one-{row_format}", batch=4)

    first, second = results(start(stubs, config, f"{config.run}-1"))
    alone = finish(one, folder=folder)

    assert first["losses"] == second["losses"], "the loss is the mean over the ranks"
    assert first["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert first["validation_loss"] == pytest.approx(alone["validation_loss"], abs=1e-4)
    assert "validation_loss" not in second
    with MemoryClient(f"file:{folder}") as client:
        for layer in engram.layers:
            ours, theirs = (rows_of(client, f"{run}.engram.{layer}", row_format) for run in (config.run, one.run))
            assert np.abs(ours - theirs).max() < (1e-5 if row_format == "float32" else 2**-6)
    weights = [
        load_file(tmp_path / run / "checkpoint" / "step-00000008" / "model.safetensors") for run in ("two", "one")
    ]
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=1e-5), name


def rows_of(client, table, row_format):
    spec, _ = client.connections.table(table)
    raw = table_bytes(client, spec, step=8)
    if row_format == "float32":
        return raw.view(np.float32)
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


@pytest.mark.faults
def test_two_ranks_killed_and_resumed_are_the_two_that_nobody_killed(tmp_path):
    """kill -9 of both while they train and save; bit for bit, as the sum over two ranks has one order."""
    saves = {"run": "two", "steps": 14, "batch": 2, "checkpoint_every": 3, "full_every": 2}
    whole = tiny_config(make_out(tmp_path / "whole"), **saves)
    broken = tiny_config(make_out(tmp_path / "broken"), **saves)
    folder = tmp_path / "run"
    with local_shards(folder, 2):
        with pair_of_processes(folder, "a") as (_, stubs):
            losses = results(start(stubs, whole, "whole-1"))[0]["losses"]
        with pair_of_processes(folder, "b") as (processes, stubs):
            calls = start(stubs, broken, "broken-1")
            assert any(message.step >= 8 for message in calls[0])
            for process in processes:
                process.kill()
            for call in calls:
                with pytest.raises(grpc.RpcError):
                    list(call)
        begun = open_checkpoint(tmp_path / "broken" / "checkpoint").step
        assert begun >= 3
        with pair_of_processes(folder, "c") as (_, stubs):
            ranks = results(start(stubs, dataclasses.replace(broken, resume=True), "ignored"))
    assert [rank["losses"] for rank in ranks] == [losses[begun:]] * 2
    assert everything(tmp_path / "broken") == everything(tmp_path / "whole")
    saved = open_checkpoint(tmp_path / "broken" / "checkpoint").manifest
    assert (saved.run, saved.attempt, saved.step) == ("broken-1", 2, 14)


@contextmanager
def pair_of_processes(folder, name):
    """Two workers, each in a process: (processes, stubs)."""
    with ExitStack() as stack:
        made = [stack.enter_context(worker_process(folder, f"{name}{rank}")) for rank in range(2)]
        stubs = [stack.enter_context(worker_stub(address())) for _, address in made]
        yield [process for process, _ in made], stubs


def test_rank_whose_peer_is_cancelled_fails_and_both_take_the_next_run(pair, tmp_path):
    _, stubs = pair
    config = tiny_config(make_out(tmp_path / "out"), run="torn", batch=2, steps=100_000)
    calls = start(stubs, config, "torn-1")
    for _, message in zip(range(6), calls[0], strict=False):
        assert not message.result
    calls[1].cancel()
    with pytest.raises(grpc.RpcError) as failed:
        for _ in calls[0]:
            pass
    assert failed.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    # It waits for its peer in the all-reduce, or for the rows of the step that the peer did not push.
    assert any(words in failed.value.details() for words in ("worker w0", "some worker has not pushed it"))
    assert within(20, lambda: not any(stub.Describe(pb.WorkerDescribeRequest()).training for stub in stubs))
    first, _ = results(start(stubs, dataclasses.replace(config, steps=4), "torn-2"))
    assert len(first["losses"]) == 4


@pytest.mark.parametrize("rank", [0, 1])
def test_waiting_for_a_worker_that_does_not_come_can_be_cancelled(pair, tmp_path, rank):
    _, stubs = pair
    config = tiny_config(make_out(tmp_path / "out"), run="alone", steps=4)
    (call,) = start(stubs, config, "alone-1", only=rank)
    assert within(20, lambda: list((tmp_path / "out").glob("corpus-*")))
    assert describe(stubs[rank]).training
    call.cancel()
    assert within(10, lambda: not describe(stubs[rank]).training)


def test_both_workers_stop_after_the_same_step_and_rank_0_saves_it(pair, tmp_path):
    _, stubs = pair
    config = tiny_config(make_out(tmp_path / "out"), run="stopped", batch=2, steps=100_000)
    calls = start(stubs, config, "stopped-1")
    for each in calls[1]:
        if each.step >= 3:
            break
    assert stubs[1].StopTraining(pb.StopTrainingRequest(identity="stopped-1"), timeout=5).stopping
    both = results(calls)
    assert both[0]["stopped"]
    assert both[0]["steps"] == both[1]["steps"] >= 3
    assert open_checkpoint(tmp_path / "out" / "checkpoint").step == both[0]["steps"]
