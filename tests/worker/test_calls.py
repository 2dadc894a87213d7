"""A worker is found alive and says what it does, however many calls of it are under way or left lying."""

import threading

import grpc
import pytest

from engrid.rpc.channel import open_channel
from engrid.rpc.server import check_health
from engrid.v1 import compute_pb2 as pb
from engrid.v1 import compute_pb2_grpc
from engrid.worker.config import WorkerConfig
from engrid.worker.server import WorkerServer


@pytest.fixture
def channel(tmp_path):
    server = WorkerServer(WorkerConfig(name="w0", directory=f"file:{tmp_path}", reply_timeout=0.3))
    with open_channel(server.address) as opened:
        yield opened
    server.stop(0)


@pytest.mark.parametrize("method", ["Generate", "Train", "LoadModel"])
def test_calls_that_stall_keep_no_other_kind_from_being_answered(channel, method):
    release = threading.Event()

    def nothing():
        release.wait(30)
        yield from ()

    calls = [channel.stream_stream(f"/engrid.v1.ComputeService/{method}")(nothing()) for _ in range(60)]
    assert check_health(channel, timeout=5)
    assert compute_pb2_grpc.ComputeServiceStub(channel).Describe(pb.WorkerDescribeRequest(), timeout=5).name == "w0"
    codes = set()
    for call in calls:
        with pytest.raises(grpc.RpcError) as ended:
            list(call)
        codes.add(ended.value.code())
    assert codes == {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}, "ended in time, or refused at once"
    release.set()


def test_error_text_of_any_length_arrives_with_its_status(channel):
    stub = compute_pb2_grpc.ComputeServiceStub(channel)
    with pytest.raises(grpc.RpcError) as refused:
        stub.LoadModel(pb.LoadModelRequest(checkpoint="/nowhere/" + "n\u00e9" * 5000), timeout=10)
    assert refused.value.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION)
    assert "more bytes" in refused.value.details()
    with pytest.raises(grpc.RpcError) as damaged:
        list(stub.Train(pb.TrainRequest(config="[" * 100_000), timeout=10))
    assert damaged.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
