"""ComputeService as a client sees it: what it says of itself, and the models it loads."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from engrid.rpc.server import check_health
from engrid.v1 import compute_pb2
from engrid.v1 import compute_pb2 as pb
from engrid.worker.saved_model import open_checkpoint
from engrid.worker.serve import models
from engrid.worker.server import pools
from tests.shards import local_shards
from tests.worker.conftest import (
    LINE,
    ask,
    copy_of,
    describe,
    finish,
    load,
    local_worker,
    make_out,
    refused,
    tiny_config,
    within,
)


def test_describe_names_the_worker_its_device_and_its_model(worker, trained):
    assert describe(worker) == pb.WorkerDescribeReply(name="w0", device="cpu")
    load(worker, trained.checkpoint)
    assert describe(worker) == pb.WorkerDescribeReply(
        name="w0", device="cpu", checkpoint=str(trained.checkpoint), models=[trained.saved.model_name]
    )


def test_health_and_reflection_answer(worker):
    assert check_health(worker.channel, timeout=5)
    stub = health_pb2_grpc.HealthStub(worker.channel)
    reply = stub.Check(health_pb2.HealthCheckRequest(service="engrid.v1.ComputeService"), timeout=5)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    reflected = ProtoReflectionDescriptorDatabase(worker.channel)
    assert "engrid.v1.ComputeService" in reflected.get_services()
    methods = reflected.FindFileContainingSymbol("engrid.v1.ComputeService").service[0].method
    assert [method.name for method in methods] == ["LoadModel", "Generate", "Train", "StopTraining", "Describe"]


def test_every_call_has_threads():
    methods = compute_pb2.DESCRIPTOR.services_by_name["ComputeService"].methods
    assert {method.name for method in methods} == set().union(*(pool.methods for pool in pools(1.0)))


def test_generate_before_a_model_is_loaded_is_refused(worker):
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "no model is loaded"):
        ask(worker)


def test_folder_without_a_checkpoint_is_not_found(worker, tmp_path):
    with refused(grpc.StatusCode.NOT_FOUND, f"{tmp_path / 'nowhere'} holds no checkpoint"):
        load(worker, tmp_path / "nowhere")
    assert describe(worker).checkpoint == ""


def test_versions_loaded_before_are_dropped_unless_another_worker_reads_them(worker, folder, store, tmp_path):
    def loaded():
        store.connections.refresh()
        return {spec.version for spec in store.placement.tables.values() if spec.version}

    found = []
    with local_worker(folder, "other") as other:
        for rate in (0.1, 0.2, 0.3, 0.4):
            out = make_out(tmp_path / f"out-{rate}")
            finish(tiny_config(out, steps=2, learning_rate=rate), folder=folder)
            load(worker, out / "checkpoint")
            if rate == 0.1:
                load(other, out / "checkpoint")
            found.append(open_checkpoint(out / "checkpoint").version)
            assert loaded() == {found[0], *found[-2:]}, "what the other reads, and the two models loaded last"
        assert ask(other, tokens=8)[-1].totals.new_tokens == 8
    load(worker, out / "checkpoint")
    assert loaded() == set(found[-2:])


def test_refused_load_leaves_the_model_that_was_there(worker, trained, tmp_path):
    load(worker, trained.checkpoint)
    expected = ask(worker, tokens=8)[-1].totals.new_tokens
    damaged = copy_of(trained.checkpoint, tmp_path / "damaged" / trained.checkpoint.name)
    (damaged / "model.safetensors").write_bytes(b"")
    with pytest.raises(grpc.RpcError, match=r"model\.safetensors is damaged"):
        load(worker, damaged)
    assert describe(worker).checkpoint == str(trained.checkpoint)
    assert ask(worker, tokens=8)[-1].totals.new_tokens == expected == 8


def other_model(tmp_path, **changes):
    """A checkpoint of a run of the same name, that says something else."""
    out = make_out(tmp_path / "other")
    finish(tiny_config(out, memory="off", steps=2, **changes))
    return out / "checkpoint"


def text_of(replies):
    return [token for reply in replies for token in reply.token_ids]


def test_each_of_two_callers_is_answered_by_the_model_it_loaded(worker, trained, tmp_path):
    """They load in turn and only then ask, at the same time, over one worker."""
    other = other_model(tmp_path)
    alone = {}
    for checkpoint in (trained.checkpoint, other):
        with local_worker(tmp_path / "run", f"alone-{len(alone)}") as single:
            alone[checkpoint] = text_of(ask(single, LINE[:5], model=load(single, checkpoint).model))
    assert alone[trained.checkpoint] != alone[other]
    names = {checkpoint: load(worker, checkpoint).model for checkpoint in (trained.checkpoint, other)}
    with ThreadPoolExecutor(4) as threads:
        asked = [*names, *reversed(names)] * 2
        answers = list(threads.map(lambda each: text_of(ask(worker, LINE[:5], model=names[each])), asked))
    assert answers == [alone[each] for each in asked]


def test_a_model_that_is_not_named_or_not_loaded_is_refused(worker, trained, tmp_path):
    name = load(worker, trained.checkpoint).model
    assert name == f"demo@{trained.saved.version}"
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "names no model"):
        list(worker.Generate(pb.GenerateRequest(prompt="# "), timeout=30))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "model demo@90-0 is not loaded here", name):
        ask(worker, model="demo@90-0")


def test_a_prompt_the_tokenizer_has_no_tokens_for_is_refused(worker, trained, monkeypatch):
    def refuse(tokenizer, text):
        raise ValueError(f"the tokenizer cannot encode {text}")

    load(worker, trained.checkpoint)
    monkeypatch.setattr("engrid.worker.serve.engine.encode", refuse)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "cannot encode"):
        ask(worker)


def test_the_model_used_longest_ago_goes_when_there_are_too_many(worker, trained, tmp_path):
    first, second = (load(worker, other_model(tmp_path / str(seed), seed=seed)).model for seed in (1, 2))
    ask(worker, model=first)
    third = load(worker, trained.checkpoint).model
    assert list(describe(worker).models) == [first, third]
    with refused(grpc.StatusCode.FAILED_PRECONDITION, f"model {second} is not loaded here"):
        ask(worker, model=second)
    assert ask(worker, model=first)[-1].totals.new_tokens == 3


def test_a_generation_under_way_outlives_its_model(worker, trained, tmp_path):
    name = load(worker, trained.checkpoint).model
    expected = text_of(ask(worker, tokens=200, model=name))
    call = worker.Generate(pb.GenerateRequest(prompt="# ", max_new_tokens=200, model=name), timeout=60)
    replies = [next(call)]
    for seed in (1, 2):
        load(worker, other_model(tmp_path / str(seed), seed=seed))
    assert name not in describe(worker).models
    assert text_of([*replies, *call]) == expected


def test_a_load_whose_caller_has_gone_is_not_begun(worker, trained, tmp_path, monkeypatch):
    """It waited for its turn behind one that takes long."""
    begun, go = [], threading.Event()

    def slow(path):
        begun.append(path)
        go.wait(20)
        return open_checkpoint(path)

    monkeypatch.setattr(models, "open_checkpoint", slow)
    first = worker.LoadModel.future(pb.LoadModelRequest(checkpoint=str(trained.checkpoint)), timeout=30)
    assert within(10, lambda: begun)
    second = worker.LoadModel.future(pb.LoadModelRequest(checkpoint=str(tmp_path)), timeout=30)
    time.sleep(0.2)
    second.cancel()
    time.sleep(3 * models.LOAD_POLL_SECONDS)
    go.set()
    assert first.result().step == 90
    assert ask(worker)[-1].totals.new_tokens == 3
    assert begun == [trained.checkpoint]


def test_rows_that_a_shard_lost_are_loaded_again_with_the_model(trained, tmp_path):
    folder = tmp_path / "run"
    with local_worker(folder, shared_memory=False, cache_bytes=0) as worker:
        with local_shards(folder, 1):
            load(worker, trained.checkpoint)
            expected = text_of(ask(worker, tokens=20))
        with local_shards(folder, 1):
            load(worker, trained.checkpoint)
            assert text_of(ask(worker, tokens=20)) == expected


def test_model_without_memory_needs_no_store(tmp_path):
    out = make_out(tmp_path / "out")
    finish(tiny_config(out, memory="off"))
    with local_worker(tmp_path / "empty") as worker:
        load(worker, out / "checkpoint")
        assert ask(worker)[-1].totals.new_tokens == 3


def test_model_with_memory_and_no_shards_says_so(trained, tmp_path):
    with (
        local_worker(tmp_path / "empty") as worker,
        refused(grpc.StatusCode.UNAVAILABLE, "no shard is registered"),
    ):
        load(worker, trained.checkpoint)
