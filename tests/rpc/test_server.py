"""Calls of one kind do not keep another kind from being answered, whatever their clients do or leave undone."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from engrid.rpc.calls import at_most, deadline_of
from engrid.rpc.errors import (
    BadRequestError,
    CancelledError,
    DeadlineExceededError,
    InternalError,
    OutOfMemoryError,
    RequestTooLargeError,
    ShardUnavailableError,
    from_rpc,
)
from engrid.rpc.pools import Pool
from engrid.rpc.server import CONTROL, RpcServer, check_health
from tests.waiting import until


class Service:
    """Methods of bytes: Slow waits until it is let go, Replies gives 64 KiB for ever, Requests takes what comes, Fails raises
    what it was given, Says returns what it was sent."""

    def __init__(self):
        self.go = threading.Event()
        self.begun = self.ended = 0
        self.error = None

    def slow(self, request, context):
        self.begun += 1
        assert self.go.wait(30)
        return request

    def replies(self, request, context):
        self.begun += 1
        try:
            while True:
                yield bytes(1 << 16)
        finally:
            self.ended += 1

    def requests(self, messages, context):
        self.begun += 1
        try:
            return b"%d" % sum(map(len, messages))
        finally:
            self.ended += 1

    def fails(self, request, context):
        raise self.error

    def says(self, request, context):
        return request

    def add(self, server):
        server.add_registered_method_handlers(
            "test.Service",
            {
                "Slow": grpc.unary_unary_rpc_method_handler(self.slow),
                "Replies": grpc.unary_stream_rpc_method_handler(self.replies),
                "Requests": grpc.stream_unary_rpc_method_handler(self.requests),
                "Patient": grpc.stream_unary_rpc_method_handler(self.requests),
                "Fails": grpc.unary_unary_rpc_method_handler(self.fails),
                "Says": grpc.unary_unary_rpc_method_handler(self.says),
            },
        )


@contextmanager
def serving(*, patience=30.0, waiting=2, make_room=None):
    service = Service()
    slow = Pool(
        name="slow calls",
        methods=frozenset({"Slow", "Replies", "Requests", "Patient"}),
        threads=2,
        waiting=waiting,
        patience=patience,
        make_room=make_room,
    )
    control = Pool(name=CONTROL, methods=frozenset({"Fails", "Says"}), threads=2, waiting=64, patience=min(patience, 1))
    server = RpcServer(
        "127.0.0.1:0",
        [],
        service.add,
        owner="test server",
        pools=[slow, control],
        checks={"Says": at_most(100)},
        patient=frozenset({"Patient"}),
    )
    with grpc.insecure_channel(server.address) as channel:
        try:
            yield service, channel
        finally:
            service.go.set()
            server.stop(0)


def call(channel, method, request=b"x", timeout=10):
    try:
        return channel.unary_unary(f"/test.Service/{method}")(request, timeout=timeout)
    except grpc.RpcError as error:
        raise from_rpc(error, "test server") from error


def held(channel, count, method="Slow"):
    """Calls under way."""
    return [channel.unary_unary(f"/test.Service/{method}").future(b"x", timeout=60) for _ in range(count)]


def test_calls_of_another_kind_are_answered_while_all_threads_are_taken():
    with serving() as (service, channel):
        calls = held(channel, 4)
        until(lambda: service.begun == 2)
        assert call(channel, "Says", b"hello") == b"hello"
        assert check_health(channel, timeout=5)
        service.go.set()
        assert [each.result() for each in calls] == [b"x"] * 4, "two waited for a thread"
        assert service.begun == 4


def test_call_beyond_what_may_wait_is_refused_at_once_by_name():
    with serving() as (service, channel):
        calls = held(channel, 4)
        until(lambda: service.begun == 2)
        with pytest.raises(
            ShardUnavailableError, match="test server has its 2 slow calls under way and 2 more waiting"
        ):
            call(channel, "Slow")
        with pytest.raises(grpc.RpcError) as refused:
            list(channel.unary_stream("/test.Service/Replies")(b"x", timeout=10))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        service.go.set()
        assert [each.result() for each in calls] == [b"x"] * 4
        until(lambda: call(channel, "Slow") == b"x")


def test_a_thousand_refusals_leave_no_thread_behind():
    with serving() as (service, channel):
        _calls = held(channel, 4)
        until(lambda: service.begun == 2)
        threads = threading.active_count()
        refused = held(channel, 1000)
        assert {each.code() for each in refused} == {grpc.StatusCode.UNAVAILABLE}
        assert threading.active_count() <= threads + 4


def test_room_that_was_made_is_used():
    running = []

    def make_room():
        return bool(running) and running.pop().cancel()

    with serving(waiting=0, make_room=make_room) as (service, channel):
        calls = [channel.unary_stream("/test.Service/Replies")(b"x", timeout=60) for _ in range(2)]
        until(lambda: service.begun == 2)
        with pytest.raises(ShardUnavailableError, match="2 slow calls under way;"):
            call(channel, "Slow")
        service.go.set()
        running.append(calls[0])
        assert call(channel, "Slow") == b"x"


@pytest.mark.parametrize(
    ("method", "messages"), [("Replies", 1), ("Requests", 1), ("Requests", 0), ("Slow", 0), ("Says", 0)]
)
def test_client_that_neither_reads_nor_sends_is_cut_off(method, messages):
    release = threading.Event()

    def sent():
        yield from [b"x"] * messages
        release.wait(30)

    with serving(patience=0.4) as (service, channel):
        # What a client can open is not bound to the kind of the method: a stream that sends nothing is a unary call too.
        calls = [channel.stream_stream(f"/test.Service/{method}")(sent()) for _ in range(4)]
        if method == "Replies":
            until(lambda: service.ended == 4)
        for each in calls:
            with pytest.raises(grpc.RpcError):
                list(each)
            assert each.code() is grpc.StatusCode.CANCELLED
        until(lambda: service.ended == service.begun)
        service.go.set()
        assert call(channel, "Slow") == b"x", "its threads are free again"
        release.set()


def test_client_that_may_be_silent_is_left_alone():
    with serving(patience=0.2) as (_, channel):
        release = threading.Event()

        def sent():
            yield b"abc"
            release.wait(30)
            yield b"de"

        quiet = channel.stream_unary("/test.Service/Patient").future(sent(), timeout=30)
        loud = channel.stream_unary("/test.Service/Requests").future(iter(partial(release.wait, 30), True), timeout=30)
        assert loud.code() is grpc.StatusCode.CANCELLED, "so one look at all calls is over"
        release.set()
        assert quiet.result() == b"5"


def test_request_of_a_caller_that_gave_up_while_it_waited_is_not_carried_out():
    with serving(waiting=8) as (service, channel):
        _calls = held(channel, 2)
        until(lambda: service.begun == 2)
        with pytest.raises(DeadlineExceededError):
            call(channel, "Slow", timeout=0.2)
        (cancelled,) = held(channel, 1)
        cancelled.cancel()
        service.go.set()
        (last,) = held(channel, 1)
        assert last.result() == b"x"
        assert service.begun == 3


class Caller:
    """A caller's context, of which only this is asked."""

    def __init__(self, *, remaining, active=True):
        self.time_remaining, self.is_active = lambda: remaining, lambda: active


def test_deadline_is_the_callers_and_never_further_than_a_day():
    now = time.monotonic()
    assert now + 4 < deadline_of(Caller(remaining=5)) < now + 7
    for never in (None, float("inf"), 9.2e18):
        assert now < deadline_of(Caller(remaining=never)) < now + 100_000


def test_damaged_and_large_and_missing_requests_have_their_class():
    with serving() as (service, channel):
        assert call(channel, "Says", b"x" * 100) == b"x" * 100
        with pytest.raises(RequestTooLargeError, match="101 bytes, over the limit of 100"):
            call(channel, "Says", b"x" * 101)
        with pytest.raises(RequestTooLargeError, match="over the limit of 1048576"):
            call(channel, "Slow", bytes((1 << 20) + 1))
        with pytest.raises(grpc.RpcError, match="ended before its request came") as missing:
            channel.stream_unary("/test.Service/Says")(iter(()), timeout=10)
        assert isinstance(from_rpc(missing.value, "s"), BadRequestError)
        damaged = channel.unary_unary("/grpc.health.v1.Health/Check")
        with pytest.raises(grpc.RpcError, match="damaged") as refused:
            damaged(b"\xff", timeout=10)
        assert isinstance(from_rpc(refused.value, "s"), BadRequestError)
        assert service.begun == 0


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (BadRequestError("x" * 9000), BadRequestError, "more bytes"),
        (CancelledError("by us"), CancelledError, "by us"),
        (MemoryError(), OutOfMemoryError, "no memory is left"),
        (ZeroDivisionError("of ours"), InternalError, "ZeroDivisionError: of ours"),
        (RecursionError("y" * 9000), InternalError, "RecursionError"),
    ],
)
def test_whatever_a_handler_raises_arrives_as_a_class_of_ours(raised, kind, text, caplog):
    with serving() as (service, channel):
        service.error = raised
        with pytest.raises(kind, match=text):
            call(channel, "Fails")
        assert ("/test.Service/Fails failed" in caplog.text) == (kind is InternalError)


def test_watches_and_reflections_that_stay_open_leave_health_checks_alone():
    with serving() as (_, channel):
        health = health_pb2_grpc.HealthStub(channel)
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel)
        release = threading.Event()

        def asked():
            yield reflection_pb2.ServerReflectionRequest(list_services="")
            release.wait(30)

        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        open_calls = [watch, *(health.Watch(health_pb2.HealthCheckRequest()) for _ in range(40))]
        open_calls += [reflect.ServerReflectionInfo(asked()) for _ in range(40)]
        assert check_health(channel, timeout=5)
        release.set()
        for each in open_calls:
            each.cancel()


def test_many_at_once_are_all_answered_or_refused():
    with serving(waiting=0) as (service, channel), ThreadPoolExecutor(16) as pool:
        service.go.set()

        def ask(_):
            try:
                return call(channel, "Slow")
            except ShardUnavailableError:
                return None

        answers = list(pool.map(ask, range(400)))
        assert answers.count(b"x") == service.begun > 0
        assert set(answers) <= {b"x", None}
        until(lambda: ask(0) == b"x")
