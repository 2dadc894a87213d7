"""What is written by hand is what protobuf writes, and what protobuf cannot read is refused."""

from contextlib import suppress

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrid.client import MemoryClient
from engrid.control.tables import create_tables
from engrid.rpc.channel import open_channel
from engrid.rpc.errors import BadRequestError
from engrid.rpc.wire import decode_frame, decode_reply, encode_cancel, encode_error, encode_request, new_reply
from engrid.tables import initial_rows
from engrid.v1 import memory_pb2 as pb
from engrid.v1 import memory_pb2_grpc
from tests.shards import local_shards, table

numbers = st.integers(0, 2**64 - 1)
ids = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20)
tables = st.lists(st.tuples(st.text(max_size=10), ids, st.integers(0, 2**32 - 1)), max_size=3)


@given(tables, numbers, numbers, numbers, numbers, st.text(max_size=200))
def test_request_is_read_alike_by_protobuf_and_by_us(tables, number, epoch, timeout_us, step, run):
    arrays = [(name, np.array(rows, np.int64), row_bytes) for name, rows, row_bytes in tables]
    raw = encode_request(arrays, number=number, epoch=epoch, timeout_us=timeout_us, step=step, run=run)
    stock = pb.LookupFrame.FromString(raw).request
    assert (stock.number, stock.epoch, stock.timeout_us, stock.step, stock.run) == (
        number,
        epoch,
        timeout_us,
        step,
        run,
    )
    assert [each.table for each in stock.tables] == [name for name, _, _ in tables]
    for each, (_, rows, row_bytes) in zip(stock.tables, arrays, strict=True):
        assert each.row_ids == rows.astype("<i8").tobytes()
        assert each.row_bytes == row_bytes
    for source in (raw, pb.LookupFrame(request=stock).SerializeToString()):
        ours = decode_frame(source)
        assert (ours.number, ours.epoch, ours.timeout_us, ours.step, ours.run) == (number, epoch, timeout_us, step, run)
        assert [(t.table, bytes(t.row_ids), t.row_bytes) for t in ours.tables] == [
            (t.table, t.row_ids, t.row_bytes) for t in stock.tables
        ]
        assert ours.cancel is None


@given(numbers)
def test_cancel_is_read_alike(number):
    assert pb.LookupFrame.FromString(encode_cancel(number)).cancel == number
    assert decode_frame(pb.LookupFrame(cancel=number).SerializeToString()).cancel == number


@given(numbers, st.lists(st.binary(max_size=300), max_size=4))
def test_reply_is_read_alike(number, rows):
    raw, views = new_reply(number, [len(each) for each in rows])
    for view, each in zip(views, rows, strict=True):
        view[:] = np.frombuffer(each, np.uint8)
    stock = pb.LookupReply.FromString(raw)
    assert (stock.number, list(stock.rows)) == (number, rows)
    assert raw == pb.LookupReply(number=number, rows=rows).SerializeToString() or not number
    for source in (raw, stock.SerializeToString()):
        ours = decode_reply(source)
        assert (ours.number, [bytes(view) for view in ours.rows], ours.error) == (number, rows, None)


def test_error_is_read_alike():
    error = pb.Error(code=pb.WRONG_EPOCH, message="moved", epoch=7)
    assert decode_reply(encode_error(5, error)).error == error
    assert decode_reply(encode_error(5, error)).number == 5


@given(st.binary(max_size=60))
def test_whatever_bytes_come_are_read_or_refused(raw):
    """No other exception escapes."""
    for decode in (decode_frame, decode_reply):
        with suppress(BadRequestError):
            decode(raw)


def test_frame_cut_short_anywhere_is_refused_or_says_less():
    whole = encode_request([("t", np.arange(4), 32)], number=300, epoch=2, timeout_us=10**6, step=5, run="a run")
    for size in range(1, len(whole)):
        with pytest.raises(BadRequestError, match="damaged"):
            decode_frame(whole[:size])


def test_fields_of_a_newer_peer_are_passed_over():
    frame = encode_request([("t", np.arange(2), 8)], number=1, epoch=1, timeout_us=1, step=0, run="")
    newer = b"\xa2\x06\x03abc" + b"\xa8\x06\x05" + b"\xb5\x06abcd" + b"\xb9\x06abcdefgh"
    assert decode_frame(newer + frame + newer).tables == decode_frame(frame).tables


@pytest.fixture
def store(tmp_path):
    with local_shards(tmp_path, 1) as (shard,), MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [table()])
        yield shard.address, client


def test_stock_protobuf_client_is_answered(store):
    address, _ = store
    rows = np.array([3, 999, 3])
    request = pb.LookupRequest(number=9, epoch=1, timeout_us=5_000_000)
    request.tables.add(table="t", row_ids=rows.astype("<i8").tobytes(), row_bytes=32)
    unknown = pb.LookupRequest(number=10, epoch=1, timeout_us=5_000_000)
    unknown.tables.add(table="u")
    with open_channel(address) as channel:
        frames = iter([pb.LookupFrame(request=request), pb.LookupFrame(cancel=77), pb.LookupFrame(request=unknown)])
        first, second = memory_pb2_grpc.MemoryServiceStub(channel).Lookup(frames, timeout=10)
    assert first.number == 9
    assert list(first.rows) == [initial_rows(table(), 0, 1000)[rows].tobytes()]
    assert (second.number, second.error.code, list(second.rows)) == (10, pb.UNKNOWN_TABLE, [])


@pytest.mark.parametrize("damage", [b"\xff", b"\x0a\x05ab", b"\x00\x01", b"\x0a\x02\x2a\x7f"])
def test_damaged_frame_ends_the_stream_with_its_reason_and_the_shard_serves_on(store, damage):
    address, client = store
    with open_channel(address) as channel:
        replies = channel.stream_stream("/engrid.v1.MemoryService/Lookup")(iter([damage]), timeout=10)
        with pytest.raises(grpc.RpcError) as ended:
            list(replies)
    assert ended.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "a lookup request is damaged" in ended.value.details()
    assert len(client.lookup("t", np.arange(1000))) == 1000
