"""Shards that answer nonsense, and connections that break in the middle: a clear error, and no row delivered."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np
import pytest

from engrid.client import MemoryClient
from engrid.client.transport import GrpcTransport, Wanted
from engrid.control.tables import create_tables
from engrid.rpc.channel import MAX_MESSAGE_BYTES
from engrid.rpc.errors import EngridError, RequestTooLargeError, RowWidthMismatchError, ShardUnavailableError
from engrid.rpc.wire import decode_frame
from engrid.tables import initial_rows
from engrid.v1 import memory_pb2 as pb
from tests.proxy import proxy
from tests.shards import local_shards, table

ROWS = [b"a" * 24, b"b" * 16]
"""What a good shard would answer to WANTED."""
WANTED = [("t", np.arange(3), 8), ("u", np.arange(2), 8)]


@contextmanager
def shard_that_answers(*answers):
    """A real gRPC server whose n-th reply is answers[n](number), sent as it is, and good rows after the last; yields a
    transport to it."""

    def lookup(frames, context):
        for index, raw in enumerate(frames):
            number = decode_frame(raw).number
            yield answers[index](number) if index < len(answers) else reply(number)

    handlers = {"Lookup": grpc.stream_stream_rpc_method_handler(lookup)}
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_send_message_length", -1)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("engrid.v1.MemoryService", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    transport = GrpcTransport("bad", f"127.0.0.1:{port}", max_in_flight=8)
    try:
        yield transport
    finally:
        transport.close()
        server.stop(0).wait()


def reply(number, rows=ROWS):
    return pb.LookupReply(number=number, rows=rows).SerializeToString()


def ask(transport):
    """A call of WANTED and the list its rows are delivered to."""
    delivered = []
    wanted = Wanted(0, "", time.monotonic() + 10)
    call = transport.lookup(
        WANTED, wanted, epoch=1, deliver=lambda rows: delivered.extend(bytes(each) for each in rows)
    )
    return call, delivered


@pytest.mark.parametrize(
    "rows",
    [
        [ROWS[0] + b"x", ROWS[1]],
        [ROWS[0] + bytes(1 << 20), ROWS[1]],
        [*ROWS, b"x"],
        [ROWS[1], ROWS[0]],
        [ROWS[0], ROWS[1][:-1]],
        ROWS[:1],
        [],
    ],
    ids=[
        "a byte more",
        "a megabyte more",
        "a table more",
        "tables in another order",
        "a byte less",
        "a table less",
        "none",
    ],
)
def test_other_rows_than_were_asked_for(rows):
    with shard_that_answers(lambda number: reply(number, rows)) as transport:
        call, delivered = ask(transport)
        with pytest.raises(RowWidthMismatchError, match=r"shard bad at 127.0.0.1.*where \[24, 16\] were asked for"):
            call.wait()
        assert delivered == []
        call, delivered = ask(transport)
        call.wait()
        assert delivered == ROWS, "the stream goes on"


def damaged(number):
    return [
        b"\xff",
        reply(number)[:-1],
        reply(number)[:10],
        reply(number)[:2] + b"\x12\xff\xff\xff\x7f" + reply(number)[4:],
        reply(number) + b"\x1a\x02\xff\xff",
    ]


@pytest.mark.parametrize("kind", range(5))
def test_damaged_reply_fails_what_is_in_flight_and_the_next_request_opens_a_new_stream(kind):
    with shard_that_answers(lambda number: damaged(number)[kind]) as transport:
        calls = [ask(transport) for _ in range(3)]
        for call, delivered in calls:
            with pytest.raises(ShardUnavailableError, match=r"shard bad at .*a lookup reply is damaged.*closed"):
                call.wait()
            assert delivered == []


def test_reply_to_nobody_and_a_second_reply_are_passed_over():
    with shard_that_answers(lambda number: reply(number + 1000), reply) as transport:
        unanswered, nothing = ask(transport)
        call, delivered = ask(transport)
        call.wait()
        assert delivered == ROWS
        unanswered.cancel()
        assert nothing == []


def test_reply_over_the_message_limit():
    with shard_that_answers(lambda number: reply(number, [bytes(MAX_MESSAGE_BYTES + 1)])) as transport:
        call, delivered = ask(transport)
        with pytest.raises(RequestTooLargeError, match=r"shard bad at .*larger than max"):
            call.wait()
        assert delivered == []


@pytest.mark.parametrize("after", [1, 9, 100, 5_000, 100_000, 900_000])
def test_connection_reset_in_the_middle_of_a_reply(tmp_path, after):
    spec = table(rows=20_000, width=64)
    with local_shards(tmp_path, 1) as (shard,), MemoryClient(f"file:{tmp_path}") as admin:
        create_tables(admin, [spec])
        with proxy(shard.address) as between:
            transport = GrpcTransport("s0", between.address, max_in_flight=8)
            ids = np.arange(4000)
            whole = initial_rows(spec, 0, len(ids)).tobytes()
            assert rows_through(transport, ids) == whole
            between.left = after
            delivered = []
            calls = [
                transport.lookup(
                    [("t", ids, spec.row_bytes)],
                    Wanted(0, "", time.monotonic() + 10),
                    epoch=1,
                    deliver=lambda rows: delivered.append(bytes(rows[0])),
                )
                for _ in range(3)
            ]
            for call in calls:
                with pytest.raises(ShardUnavailableError, match=f"shard s0 at {between.address}"):
                    call.wait()
            assert delivered == [], "a reply that did not arrive whole"
            until = time.monotonic() + 10
            while True:  # a request made while the connection goes down may be lost with it
                try:
                    assert rows_through(transport, ids) == whole, "the next request opens a stream of its own"
                    break
                except ShardUnavailableError:
                    assert time.monotonic() < until
            transport.close()


def rows_through(transport, ids):
    delivered = []
    wanted = Wanted(0, "", time.monotonic() + 10)
    transport.lookup([("t", ids, 256)], wanted, epoch=1, deliver=lambda rows: delivered.extend(map(bytes, rows))).wait()
    return delivered[0]


@contextmanager
def peer_that_ends(how):
    """A server whose first streams end as `how(context)` says, and that is well from when `well` holds something on."""
    well = []

    def lookup(frames, context):
        for raw in frames:
            if not well:
                how(context)
            yield reply(decode_frame(raw).number)

    handlers = {"Lookup": grpc.stream_stream_rpc_method_handler(lookup)}
    server = grpc.server(ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("engrid.v1.MemoryService", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    transport = GrpcTransport("bad", f"127.0.0.1:{port}", max_in_flight=8)
    try:
        yield transport, well
    finally:
        transport.close()
        server.stop(0).wait()


def with_trailer(value):
    def end(context):
        context.set_trailing_metadata((("engrid-error-bin", value),))
        context.abort(grpc.StatusCode.UNAVAILABLE, "a proxy's own trailer")

    return end


@pytest.mark.parametrize(
    "trailer", [b"\xff\xff\xff", b"", b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x12\x01\xff"]
)
def test_a_trailer_that_is_no_error_of_ours_fails_the_calls_and_the_next_stream_serves(trailer):
    with peer_that_ends(with_trailer(trailer)) as (transport, well):
        calls = [ask(transport)[0] for _ in range(3)]
        for call in calls:
            with pytest.raises(EngridError):
                call.wait()
        well.append(True)
        call, delivered = ask(transport)
        call.wait()
        assert delivered == ROWS


@pytest.mark.parametrize("where", ["decode_reply", "from_rpc"])
def test_whatever_the_reader_meets_fails_all_that_is_in_flight(monkeypatch, where):
    """Also what nobody thought of: no thread dies with others waiting for it."""

    def fail(*_):
        raise ZeroDivisionError("nobody thought of it")

    with peer_that_ends(with_trailer(b"\xff")) as (transport, well):
        if where == "decode_reply":
            well.append(True)
        with monkeypatch.context() as patched:
            patched.setattr(f"engrid.client.transport.{where}", fail)
            calls = [ask(transport)[0] for _ in range(3)]
            for call in calls:
                with pytest.raises(ShardUnavailableError, match=r"shard bad at .*(nobody thought of it|lost before)"):
                    call.wait()
        well.append(True)
        until = time.monotonic() + 10
        while True:  # a stream that is about to end may take one more
            call, delivered = ask(transport)
            try:
                call.wait()
                break
            except ShardUnavailableError:
                assert time.monotonic() < until
        assert delivered == ROWS


def test_rows_that_cannot_be_placed_fail_their_call_alone():
    def deliver(_):
        raise ValueError("no room for them")

    with shard_that_answers() as transport:
        wanted = Wanted(0, "", time.monotonic() + 10)
        bad = transport.lookup(WANTED, wanted, epoch=1, deliver=deliver)
        good, delivered = ask(transport)
        with pytest.raises(ShardUnavailableError, match=r"could not be placed: ValueError.*no room for them"):
            bad.wait()
        good.wait()
        assert delivered == ROWS
