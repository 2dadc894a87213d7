"""Calls of every method of a shard with input that nobody meant, and what must hold of them."""

from __future__ import annotations

import json
import random
from contextlib import suppress

import grpc
import numpy as np

from engrid.client import MemoryClient, TrainingRun
from engrid.control.checkpoints import CheckpointSave
from engrid.control.tables import create_tables
from engrid.rpc.channel import CHANNEL_OPTIONS
from engrid.rpc.errors import BadRequestError, InternalError, from_rpc
from engrid.rpc.server import check_health
from engrid.rpc.wire import encode_cancel, encode_request
from engrid.storage.checkpoint import Checkpoints
from engrid.storage.disk import LocalDisk
from engrid.storage.errors import CheckpointError
from engrid.storage.manifest import _digest
from engrid.tables import initial_rows
from engrid.v1 import memory_pb2 as pb
from engrid.v1 import memory_pb2_grpc
from tests.hostile import mutated_bytes, mutated_json
from tests.shards import table

CALL_SECONDS = 1.0
UNARY = (
    "Push",
    "Commit",
    "BeginRun",
    "Adopt",
    "Describe",
    "Pin",
    "SettleCheckpoint",
    "Restore",
    "CheckFolder",
    "Stats",
)
STREAMED = ("Export", "Checkpoint")


def _lookup(rng):
    names = ("t", "u", "", "\x00", "t" * rng.randint(1, 600), "m@1")
    ids = (0, 5, -1, 2**62, 999, 1000)
    tables = [
        (
            rng.choice(names),
            np.array([rng.choice(ids) for _ in range(rng.randint(0, 20))], np.int64),
            rng.choice((0, 32, 7)),
        )
        for _ in range(rng.randint(0, 5))
    ]
    return encode_request(
        tables,
        number=rng.choice((1, 2, 2**64 - 1)),
        epoch=rng.choice((0, 1, 2, 2**64 - 1)),
        timeout_us=rng.choice((0, 1000, 100_000, 2**64 - 1)),
        step=rng.choice((0, 0, 0, 1, 2**63)),
        run=rng.choice(("", "", "r", "é")),
    )


def _requests(folder, placement):
    """One good request of each method but Lookup."""
    part = pb.PartitionPush(table="t", partition=0, seq=2, row_ids=np.arange(3).tobytes(), gradients=bytes(96))
    push = pb.PushRequest(run="r", attempt=1, step=2, learning_rate=1.0, epoch=1, partitions=[part])
    checkpoint = pb.CheckpointRequest(run="r", attempt=1, step=10**6, tables=["t"], folder=folder, partial="x")
    return {
        "Push": push,
        "Commit": pb.CommitRequest(run="r", attempt=1, step=1, epoch=1),
        "BeginRun": pb.BeginRunRequest(run="z", attempt=1, workers=1, tables=["zz"], token="x"),
        "Adopt": pb.AdoptRequest(placement=json.dumps(placement.to_json()), check_only=True),
        "Describe": pb.DescribeRequest(),
        "Pin": pb.PinRequest(reader="a", tables=["m@1"], seconds=1.0),
        "SettleCheckpoint": pb.SettleCheckpointRequest(partial="x", published="y"),
        "Restore": pb.RestoreRequest(folder=folder, name="step-00000001", tables=["t"], attempt=1, wait=0.1),
        "CheckFolder": pb.CheckFolderRequest(folder=folder, file=".shared-" + "0" * 32),
        "Stats": pb.StatsRequest(),
        "Export": pb.ExportRequest(table="m@1"),
        "Checkpoint": checkpoint,
        "Load": pb.LoadChunk(table="t", partition=7, rows=b"x"),
    }


def call_with_anything(folder, address, seed, count):
    """`count` calls; each ends well or with an error of ours, and another client is served all the while."""
    rng = random.Random(seed)
    with (
        MemoryClient(f"file:{folder}") as client,
        grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel,
    ):
        if not client.connections.epoch:
            create_tables(client, [table(), table("u"), table("m@1", optimizer=None)])
        TrainingRun(client, run="r", tables=["t"])  # attempt 1, or the next where it is called again
        others = initial_rows(table("u"), 0, 1000).tobytes()
        requests = _requests(str(folder), client.placement)
        for number in range(count):
            method = "Lookup" if number % 2 else rng.choice(list(requests))
            try:
                _call(channel, rng, method, requests)
            except grpc.RpcError as error:
                arrived = from_rpc(error, "s0")
                assert not isinstance(arrived, InternalError), f"seed {seed}, call {number}, {method}: {arrived}"
            if number % 100 == 0:
                assert client.lookup("u", np.arange(1000), timeout=10).tobytes() == others
        assert client.lookup("u", np.arange(1000), timeout=10).tobytes() == others
        stub = memory_pb2_grpc.MemoryServiceStub(channel)
        assert stub.Describe(pb.DescribeRequest(), timeout=10).shard == "s0"


def _call(channel, rng, method, requests):
    path = f"/engrid.v1.MemoryService/{method}"
    if method == "Lookup":
        frames = [
            mutated_bytes(rng, _lookup(rng)) if rng.random() < 0.8 else rng.choice((_lookup(rng), encode_cancel(1)))
            for _ in range(rng.randint(1, 6))
        ]
        for raw in channel.stream_stream(path)(iter(frames), timeout=CALL_SECONDS):
            assert pb.LookupReply.FromString(raw).error.code != pb.INTERNAL
        return
    good = requests[method].SerializeToString()
    raw = mutated_bytes(rng, good) if rng.random() < 0.9 else rng.randbytes(rng.randint(0, 60))
    if method == "Load":
        channel.stream_unary(path)(iter([raw, mutated_bytes(rng, raw)]), timeout=CALL_SECONDS)
    elif method in STREAMED:
        list(channel.unary_stream(path)(raw, timeout=CALL_SECONDS))
    else:
        channel.unary_unary(path)(raw, timeout=CALL_SECONDS)


def adopt_anything(folder, address, seed, count):
    """`count` placements; each is adopted or refused as bad, and the shard says what it holds after each."""
    rng = random.Random(seed)
    with MemoryClient(f"file:{folder}") as client, grpc.insecure_channel(address) as channel:
        create_tables(client, [table(), table("m@1", optimizer=None)])
        good, stub = client.placement.to_json(), memory_pb2_grpc.MemoryServiceStub(channel)
        for number in range(count):
            raw = json.dumps(mutated_json(rng, good | {"epoch": 10 + number}))
            try:
                stub.Adopt(pb.AdoptRequest(placement=raw, check_only=number % 10 > 0), timeout=10)
            except grpc.RpcError as error:
                arrived = from_rpc(error, "s0")
                assert not isinstance(arrived, InternalError), f"seed {seed}, placement {number}: {arrived}: {raw}"
            except UnicodeError:
                continue
            assert stub.Describe(pb.DescribeRequest(), timeout=10).shard == "s0", f"seed {seed}, {number}: {raw}"


def restore_anything(folder, seed, count):
    """`count` manifests, most with a digest that fits; what is restored is what was saved, and all else is refused by name."""
    rng = random.Random(seed)
    saved = folder / "saved"
    with MemoryClient(f"file:{folder}") as client:
        create_tables(client, [table()])
        run = TrainingRun(client, run="r", attempt=1, worker=0, workers=1, tables=["t"])
        run.push({"t": (np.arange(1000), np.ones((1000, 8), np.float32))}, step=1, learning_rate=1.0)
        expected = client.lookup("t", np.arange(1000)).tobytes()
        name = CheckpointSave(client, saved, run="r", attempt=1, step=1, tables=["t"]).finish({}, {}).name
        path, checkpoints = saved / name / "manifest.json", Checkpoints(LocalDisk(saved))
        good = json.loads(path.read_bytes())
        stub = client.connections.transport("s0").stub
        request = pb.RestoreRequest(folder=str(saved), name=name, tables=["t"], attempt=2, wait=5)
        for number in range(count):
            bad = mutated_json(rng, good)
            if number % 3:
                bad.pop("digest", None)
                bad["digest"] = _digest(bad)
            path.write_text(json.dumps(bad))
            with suppress(CheckpointError):
                checkpoints.chain(name)
            if number % 5:
                continue
            error = _restore(stub, request)
            assert error is None or isinstance(error, BadRequestError), f"seed {seed}, manifest {number}: {error!r}"
            if error is None:
                assert client.lookup("t", np.arange(1000)).tobytes() == expected, f"seed {seed}, manifest {number}"


def _restore(stub, request):
    try:
        stub.Restore(request, timeout=20)
    except grpc.RpcError as error:
        return from_rpc(error, "s0")
    return None


_PLAIN = {
    "run": "r", "attempt": 1, "workers": 1, "step": 1, "learning_rate": 1.0, "epoch": 1, "reader": "a", "seconds": 1.0,
    "name": "step-00000001", "partial": "x", "wait": 0.1, "table": "t", "token": "x",
}  # fmt: skip
_TABLES = (["t"], ["t", "t"], ["m@1"], ["zz"], [""], ["t", "zz"])


def call_with_hardly_anything(address):
    """Every method with an empty message, with a plain one, and with tables that are unknown, sealed or named twice."""
    with grpc.insecure_channel(address) as channel:
        for method in pb.DESCRIPTOR.services_by_name["MemoryService"].methods:
            fields = {field.name for field in method.input_type.fields}
            plain = {name: value for name, value in _PLAIN.items() if name in fields}
            requests = [{}, plain]
            requests += [plain | {"tables": tables} for tables in _TABLES if "tables" in fields]
            requests += [plain | {"partition": 2**32 - 1}, plain | {"table": "m@1"}] if "partition" in fields else []
            for values in requests:
                raw = getattr(pb, method.input_type.name)(**values).SerializeToString()
                try:
                    call = channel.stream_stream(f"/engrid.v1.MemoryService/{method.name}")
                    list(call(iter([raw]), timeout=CALL_SECONDS))
                except grpc.RpcError as error:
                    arrived = from_rpc(error, "s0")
                    assert not isinstance(arrived, InternalError), f"{method.name}, {values}: {arrived}"
        assert check_health(channel, timeout=10)
