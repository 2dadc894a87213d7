"""ComputeService as a client sees it: what it says of itself, and the models it loads."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from engrid.rpc.server import check_health
from engrid.v1 import compute_pb2 as pb
from engrid.worker.saved_model import open_checkpoint
from tests.worker.conftest import (
    ask,
    copy_of,
    describe,
    finish,
    load,
    local_worker,
    make_out,
    refused,
    tiny_config,
)


def test_describe_names_the_worker_its_device_and_its_model(worker, trained):
    assert describe(worker) == pb.WorkerDescribeReply(name="w0", device="cpu")
    load(worker, trained.checkpoint)
    assert describe(worker) == pb.WorkerDescribeReply(name="w0", device="cpu", checkpoint=str(trained.checkpoint))


def test_health_and_reflection_answer(worker):
    assert check_health(worker.channel, timeout=5)
    stub = health_pb2_grpc.HealthStub(worker.channel)
    reply = stub.Check(health_pb2.HealthCheckRequest(service="engrid.v1.ComputeService"), timeout=5)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    reflected = ProtoReflectionDescriptorDatabase(worker.channel)
    assert "engrid.v1.ComputeService" in reflected.get_services()
    methods = reflected.FindFileContainingSymbol("engrid.v1.ComputeService").service[0].method
    assert [method.name for method in methods] == ["LoadModel", "Generate", "Train", "Describe"]


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
        for rate in (0.1, 0.2, 0.3):
            out = make_out(tmp_path / f"out-{rate}")
            finish(tiny_config(out, learning_rate=rate), folder=folder)
            load(worker, out / "checkpoint")
            if rate == 0.1:
                load(other, out / "checkpoint")
            found.append(open_checkpoint(out / "checkpoint").version)
            assert loaded() == {found[0], found[-1]}
        assert ask(other, tokens=8)[-1].totals.new_tokens == 8
    load(worker, out / "checkpoint")
    assert loaded() == {found[-1]}


def test_refused_load_leaves_the_model_that_was_there(worker, trained, tmp_path):
    load(worker, trained.checkpoint)
    expected = ask(worker, tokens=8)[-1].totals.new_tokens
    damaged = copy_of(trained.checkpoint, tmp_path / "damaged" / trained.checkpoint.name)
    (damaged / "model.safetensors").write_bytes(b"")
    with pytest.raises(grpc.RpcError, match=r"model\.safetensors is damaged"):
        load(worker, damaged)
    assert describe(worker).checkpoint == str(trained.checkpoint)
    assert ask(worker, tokens=8)[-1].totals.new_tokens == expected == 8


def test_loading_another_model_replaces_the_first(worker, trained, tmp_path):
    load(worker, trained.checkpoint)
    out = make_out(tmp_path / "out")
    finish(tiny_config(out, memory="off"))
    reply = load(worker, out / "checkpoint")
    assert (reply.run, reply.step) == ("demo", 8)
    replies = ask(worker)
    assert replies[-1].totals.new_tokens == 3
    assert replies[-1].totals.rows_fetched == 0


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
