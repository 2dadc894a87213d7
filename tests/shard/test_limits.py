"""What one client can make a shard allocate or keep: limits that hold before anything is allocated, on every call."""

import itertools
import threading
import time
import tracemalloc
from contextlib import contextmanager

import grpc
import numpy as np
import pytest

from engrid.client import MemoryClient, TrainingRun
from engrid.control.tables import create_tables
from engrid.rpc.channel import CHANNEL_OPTIONS
from engrid.rpc.errors import BadRequestError, RequestTooLargeError, ShardUnavailableError, from_rpc
from engrid.rpc.server import check_health
from engrid.rpc.wire import MAX_TABLES, decode_frame, decode_reply, encode_cancel, encode_request, varint
from engrid.shard.core.machine import MAX_NAME_BYTES, MAX_PINNED, MAX_READERS, ShardCore
from engrid.shard.grpc.servicer import MAX_PARTS, MAX_PLACEMENT_BYTES
from engrid.shard.grpc.stream import MAX_REQUEST_BYTES
from engrid.tables import TableSpec, initial_rows
from engrid.tables.spec import MAX_NAME
from engrid.v1 import memory_pb2 as pb
from engrid.v1 import memory_pb2_grpc
from tests.shards import local_shards, table
from tests.waiting import until


@contextmanager
def store(tmp_path, *specs, **config):
    """A shard with table t and these; yields its stub, a channel and a client."""
    with (
        local_shards(tmp_path, 1, **config) as (shard,),
        MemoryClient(f"file:{tmp_path}") as client,
        grpc.insecure_channel(shard.address, options=CHANNEL_OPTIONS) as channel,
    ):
        create_tables(client, [table(), *specs])
        yield memory_pb2_grpc.MemoryServiceStub(channel), channel, client


@contextmanager
def refused(kind, match):
    with pytest.raises(grpc.RpcError) as error:
        yield
    arrived = from_rpc(error.value, "s0")
    assert type(arrived) is kind, arrived
    assert match in str(arrived)


def framed(body):
    return b"\x0a" + varint(len(body)) + body


def lookup(number, ids=(1,), step=0, table="t"):
    return encode_request([(table, np.array(ids), 32)], number=number, epoch=1, timeout_us=10**8, step=step, run="")


def streamed(channel, *frames):
    replies = channel.stream_stream("/engrid.v1.MemoryService/Lookup")(iter(frames), timeout=20)
    return [pb.LookupReply.FromString(raw) for raw in replies]


@pytest.mark.parametrize(
    ("decode", "raw"),
    [
        (decode_frame, framed(b"\x2a\x00" * (4 << 20))),
        (decode_frame, framed(b"\x78\x01" * (4 << 20))),
        (decode_frame, b"\x10\x01" * (4 << 20)),
        (decode_frame, framed(b"\x2a" + varint(4 << 20) + b"\x18\x20" * (2 << 20))),
        (decode_frame, framed(b"\x2a" + varint((4 << 20) + 5) + b"\x0a" + varint(4 << 20) + b"t" * (4 << 20))),
        (decode_frame, framed(b"\x32" + varint(4 << 20) + b"r" * (4 << 20))),
        (decode_reply, b"\x12\x00" * (4 << 20)),
    ],
    ids=["tables", "unknown fields", "cancels", "widths", "a name", "a run", "a reply's tables"],
)
def test_frame_of_megabytes_costs_no_multiple_of_itself(decode, raw):
    tracemalloc.start()
    try:
        begun = time.thread_time()
        with pytest.raises((BadRequestError, RequestTooLargeError)):
            decode(raw)
        assert time.thread_time() - begun < 1, "nor much time in which nobody else is served"
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_as_many_tables_as_are_allowed_are_read():
    tables = [("t", np.arange(2), 8)] * MAX_TABLES
    raw = encode_request(tables, number=1, epoch=1, timeout_us=1, step=0, run="r" * 512)
    assert len(decode_frame(raw).tables) == MAX_TABLES
    with pytest.raises(RequestTooLargeError, match="lookup 1 asks for more than"):
        decode_frame(encode_request([*tables, tables[0]], number=1, epoch=1, timeout_us=1, step=0, run=""))


def test_lookup_that_is_too_large_is_refused_alone(tmp_path):
    padded = framed(lookup(2)[2:] + b"\x7a" + varint(MAX_REQUEST_BYTES) + bytes(MAX_REQUEST_BYTES))
    with store(tmp_path) as (_, channel, _client):
        first, second, third = streamed(channel, lookup(1), padded, lookup(3))
        assert (second.number, second.error.code) == (2, pb.REQUEST_TOO_LARGE)
        assert first.rows == third.rows == [initial_rows(table(), 1, 2).tobytes()]


def test_what_waits_behind_a_request_is_counted_as_it_came(tmp_path):
    waits = encode_request([("t", np.arange(1), 32)], number=1, epoch=1, timeout_us=10**8, step=1, run="")
    padded = [framed(lookup(n)[2:] + b"\x7a" + varint(6 << 20) + bytes(6 << 20)) for n in range(2, 10)]
    with store(tmp_path) as (_, channel, client):
        TrainingRun(client, run="r", attempt=1, worker=0, workers=1, tables=["t"])
        replies = streamed(channel, waits, *padded, encode_cancel(1))
        codes = {reply.number: reply.error.code for reply in replies}
        assert [codes[n] for n in range(2, 10)] == [0, 0, *[pb.REQUEST_TOO_LARGE] * 6], "each pins 6 MiB for one row"


def test_cancels_of_what_was_never_asked_for_are_forgotten(tmp_path):
    waits = encode_request([("t", np.arange(1), 32)], number=1, epoch=1, timeout_us=10**8, step=1, run="")
    strangers = [encode_cancel(10**6 + n) for n in range(5_000)]
    with store(tmp_path) as (_, channel, client):
        TrainingRun(client, run="r", attempt=1, worker=0, workers=1, tables=["t"])
        late = [encode_cancel(1), lookup(10**6)]
        replies = streamed(channel, lookup(7), encode_cancel(7), waits, *strangers, *late)
        assert [(reply.number, reply.error.code) for reply in replies] == [(7, 0), (1, pb.CANCELLED), (10**6, 0)]


def test_number_given_again_after_its_cancel_is_answered(tmp_path):
    with store(tmp_path) as (_, channel, _client):
        replies = streamed(channel, lookup(5), encode_cancel(5), lookup(5), encode_cancel(5))
        assert [reply.error.code for reply in replies] == [0, 0]


def test_export_gives_chunks_no_larger_than_a_reply(tmp_path):
    with store(tmp_path, table("big", rows=1 << 16, width=32), max_reply_bytes=1 << 20) as (stub, _, _client):
        for asked in (2**31, 2**32 - 1, 10_000, 1):
            chunks = stub.Export(pb.ExportRequest(table="big", rows_per_chunk=asked), timeout=20)
            sizes = [len(chunk.rows) for chunk in itertools.islice(chunks, 3)]
            assert sizes == [128 * min(asked, 8192)] * 3
            chunks.cancel()


def test_push_of_millions_of_empty_parts_is_not_parsed(tmp_path):
    with store(tmp_path) as (_, channel, _client):
        push = channel.unary_unary("/engrid.v1.MemoryService/Push")
        with refused(RequestTooLargeError, f"more than {MAX_PARTS} of field 6"):
            push(b"\x32\x00" * (1 << 20), timeout=20)
        with refused(BadRequestError, "push is damaged"):
            push(b"\x32\xff", timeout=20)


@pytest.mark.parametrize(
    "method", ["Commit", "BeginRun", "Describe", "Pin", "Stats", "Restore", "CheckFolder", "Export"]
)
def test_call_that_needs_little_takes_little(tmp_path, method):
    with store(tmp_path) as (_, channel, _client), refused(RequestTooLargeError, "over the limit of 1048576"):
        list(channel.unary_stream(f"/engrid.v1.MemoryService/{method}")(b"\x7a" + varint(2 << 20) + bytes(2 << 20)))


def test_many_names_in_one_request_are_not_parsed(tmp_path):
    with store(tmp_path) as (stub, _, _client):
        names = ["t"] * 20_000
        for call, request in (
            (stub.BeginRun, pb.BeginRunRequest(run="r", attempt=1, workers=1, tables=names)),
            (stub.Pin, pb.PinRequest(reader="r", tables=names, seconds=1)),
            (stub.Restore, pb.RestoreRequest(folder="/", name="step-00000001", tables=names, attempt=1)),
        ):
            with refused(RequestTooLargeError, "more than"):
                call(request, timeout=20)


def test_placement_is_bounded_and_nesting_is_damage(tmp_path):
    with store(tmp_path) as (stub, _, _client):
        with refused(RequestTooLargeError, "the placement has"):
            stub.Adopt(pb.AdoptRequest(placement="[" * (MAX_PLACEMENT_BYTES + 1)), timeout=20)
        for placement in ("[" * 100_000, '{"a":' * 50_000, "NaN", "", "1" * 10_000):
            with refused(BadRequestError, "not a placement"):
                stub.Adopt(pb.AdoptRequest(placement=placement), timeout=20)


def test_pins_are_bounded_in_names_readers_and_time():
    core = ShardCore("s0")
    core.pin("a", [f"t@{n}" for n in range(MAX_PINNED - 1)], 60.0, now=0.0)
    core.pin("b", ["t@1"], 1.0, now=0.0)
    core.pin("b", ["t@2"], 1.0, now=0.0)
    with pytest.raises(ShardUnavailableError, match="2 readers, and one of 1 more would pass its limits"):
        core.pin("c", ["t@1"], 1.0, now=0.0)
    core.pin("c", ["t@1"], 1.0, now=2.0)
    core.pin("a", [], 0.0, now=2.0)
    for n in range(MAX_READERS - 1):
        core.pin(f"r{n}", [], 60.0, now=2.0)
    with pytest.raises(ShardUnavailableError, match="readers"):
        core.pin("one more", [], 60.0, now=2.0)
    with pytest.raises(BadRequestError, match="600"):
        core.pin("a", ["t@1"], 601.0, now=3.0)
    for reader, name in (("a" * 513, "t@1"), ("a", "é" * 256 + "@1")):
        with pytest.raises(BadRequestError, match=f"at most {MAX_NAME_BYTES}"):
            core.pin(reader, [name], 1.0, now=100.0)


def test_describe_holds_with_as_many_pins_as_there_may_be(tmp_path):
    with store(tmp_path) as (stub, _, client):
        for reader in range(MAX_PINNED // 1024):
            names = [f"{'n' * 490}{reader}-{n}@v" for n in range(1024)]
            stub.Pin(pb.PinRequest(reader=str(reader), tables=names, seconds=600), timeout=20)
        with refused(ShardUnavailableError, "limit"):
            stub.Pin(pb.PinRequest(reader="x", tables=["t@1"], seconds=600), timeout=20)
        assert len(stub.Describe(pb.DescribeRequest(), timeout=20).pinned) == MAX_PINNED
        assert MemoryClient(client.placement.shards["s0"]).placement.epoch == client.placement.epoch


def test_names_that_are_kept_are_short(tmp_path):
    with pytest.raises(ValueError, match=f"at most {MAX_NAME}"):
        table("t" * 201)
    assert isinstance(table("t" * 200), TableSpec)
    with store(tmp_path) as (stub, _, _client):
        with refused(BadRequestError, "513 bytes"):
            stub.BeginRun(pb.BeginRunRequest(run="r" * 513, attempt=1, workers=1, tables=["t"], token="x"), timeout=20)
        with refused(BadRequestError, "513 bytes"):
            stub.Load(iter([pb.LoadChunk(table="t", run="r" * 513)]), timeout=20)


def test_rows_of_a_live_partition_are_held_for_one_load_at_a_time(tmp_path):
    release = threading.Event()

    def chunks():
        yield pb.LoadChunk(table="t", step=1)
        yield pb.LoadChunk(rows=bytes(16_000))
        release.wait(30)
        yield pb.LoadChunk(rows=bytes(16_000))

    with store(tmp_path) as (stub, _, client):
        first = stub.Load.future(chunks(), timeout=30)

        def second_is_refused():
            nonlocal first
            if first.done():  # the one that was refused, as the second came before it
                first = stub.Load.future(chunks(), timeout=30)
            with pytest.raises(grpc.RpcError) as error:
                stub.Load(iter([pb.LoadChunk(table="t", rows=b"x")]), timeout=20)
            return isinstance(from_rpc(error.value, "s0"), ShardUnavailableError)

        until(second_is_refused)
        release.set()
        assert first.result().rows == 1000
        assert not client.lookup("t", np.arange(1000)).any()
        assert stub.Load(chunks(), timeout=30).rows == 1000


@pytest.mark.parametrize("wait", [-1.0, float("nan"), float("inf"), 1e300])
def test_wait_that_is_no_time_is_refused(tmp_path, wait):
    with store(tmp_path) as (stub, _, _client):
        with refused(BadRequestError, "wait is"):
            list(stub.Checkpoint(pb.CheckpointRequest(run="r", attempt=1, step=1, tables=["t"], wait=wait), timeout=20))
        with refused(BadRequestError, "wait is"):
            stub.Restore(pb.RestoreRequest(name="step-00000001", tables=["t"], attempt=1, wait=wait), timeout=20)


def test_lookup_that_names_a_time_beyond_all_clocks_waits(tmp_path):
    ages = encode_request([("t", np.arange(1), 32)], number=1, epoch=1, timeout_us=2**64 - 1, step=1, run="")
    with store(tmp_path) as (_, channel, client):
        TrainingRun(client, run="r", attempt=1, worker=0, workers=1, tables=["t"])
        (reply,) = streamed(channel, ages, encode_cancel(1))
        assert reply.error.code == pb.CANCELLED


def test_unread_exports_and_idle_loads_keep_nobody_from_being_answered(tmp_path):
    release = threading.Event()

    def idle():
        yield pb.LoadChunk(table="t", step=1)
        release.wait(30)

    with store(tmp_path, table("big", rows=1 << 16, width=64), reply_timeout=0.6) as (stub, channel, client):
        exports = [stub.Export(pb.ExportRequest(table="big")) for _ in range(12)]
        loads = [stub.Load.future(idle()) for _ in range(12)]
        assert check_health(channel, timeout=5)
        assert stub.Describe(pb.DescribeRequest(), timeout=5).shard == "s0"
        run = TrainingRun(client, run="r", attempt=1, worker=0, workers=1, tables=["big"])
        run.push({"big": (np.arange(3), np.ones((3, 64), np.float32))}, step=1, learning_rate=1.0)
        assert len(client.lookup("t", np.arange(1000))) == 1000
        codes = {each.code() for each in loads}
        assert codes <= {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}

        def exported():
            try:
                return [len(each.rows) for each in stub.Export(pb.ExportRequest(table="t"), timeout=20)] == [32_000]
            except grpc.RpcError:  # refused, while the others' time is not over
                return False

        until(exported)
        release.set()
        for each in exports:
            each.cancel()
