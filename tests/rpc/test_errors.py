"""The error table is complete, and an error arrives as what was raised."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrid.rpc import errors
from engrid.rpc.errors import TABLE, EngridError, bounded, from_message, from_rpc, to_message
from engrid.v1 import memory_pb2 as pb


def leaves(kind):
    below = [sub for sub in kind.__subclasses__() if sub.__module__ == errors.__name__]
    return [leaf for sub in below for leaf in leaves(sub)] if below else [kind]


def test_every_error_class_has_exactly_one_row():
    assert sorted(row.error.__name__ for row in TABLE) == sorted(leaf.__name__ for leaf in leaves(EngridError))


def test_every_code_has_exactly_one_row():
    codes = [code for code in pb.ErrorCode.values() if code != pb.ERROR_CODE_UNSPECIFIED]
    assert sorted(row.code for row in TABLE) == sorted(codes)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.error.__name__)
def test_message_round_trip_keeps_class_and_text(row):
    assert row.status is not grpc.StatusCode.OK
    back = from_message(to_message(row.error("thing: what to do")))
    assert type(back) is row.error
    assert str(back) == "thing: what to do"


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (errors.WrongEpochError("x", epoch=7), "epoch"),
        (errors.ExpectedError("x", expected=7), "expected"),
        (errors.StepNotReachedError("x", expected=7), "expected"),
        (errors.FencedError("x", attempt=7), "attempt"),
    ],
)
def test_numbers_travel(error, number):
    assert getattr(from_message(to_message(error)), number) == 7


@pytest.mark.parametrize(("number", "travels"), [(-1, 0), (2**64 - 1, 2**64 - 1), (2**70, 2**64 - 1)])
def test_number_that_does_not_fit_is_no_other_error(number, travels):
    back = from_message(to_message(errors.WrongEpochError("x", epoch=number)))
    assert (type(back), back.epoch) == (errors.WrongEpochError, travels)


def test_code_of_a_newer_peer_is_still_an_error():
    assert "newer peer" in str(from_message(pb.Error(code=999, message="x")))


@pytest.fixture(scope="module")
def failing_call():
    """A real call that fails with the error put in; returns what arrived."""
    put_in = []

    def fail(_, context):
        errors.abort(context, put_in[-1])

    handlers = {"Fail": grpc.unary_unary_rpc_method_handler(fail)}
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/test/Fail")

        def arrived(error):
            put_in.append(error)
            with pytest.raises(grpc.RpcError) as failed:
                call(b"", timeout=10)
            return from_rpc(failed.value, "shard s0")

        yield arrived
    server.stop(0)


TEXTS = {
    "long": "table t: " + "x" * 100_000 + " give another",
    "no ASCII": "é\u4e2d\U0001f600" * 5000,
    "lines": "a\r\nb\n\n\tc\0" * 2000,
    "half a character": "name \ud800 of a table" * 500,
    "percent": "%" * 5000,
    "empty": "",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.error.__name__)
def test_class_arrives_whatever_the_text(failing_call, row, text):
    back = failing_call(row.error(text))
    assert type(back) is row.error
    assert str(back) == bounded(text)


@given(st.text(alphabet=st.characters(exclude_categories=())), st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_text_is_cut_in_its_middle_and_numbers_stay(failing_call, text, times, epoch):
    text = f"begin {text * times} end"
    back = failing_call(errors.WrongEpochError(text, epoch=epoch))
    assert (type(back), back.epoch) == (errors.WrongEpochError, epoch)
    assert str(back).startswith("begin ")
    assert str(back).endswith(" end")
    assert len(str(back).encode()) <= errors.MOST_TEXT
    assert ("more bytes" in str(back)) == (len(text.encode("utf-8", "backslashreplace")) > errors.MOST_TEXT)


def test_trailer_that_is_none_of_ours_leaves_the_status():
    class Foreign(grpc.RpcError):
        def trailing_metadata(self):
            return ((errors.TRAILER, b"\xff\xff"),)

        def code(self):
            return grpc.StatusCode.NOT_FOUND

        def details(self):
            return "what it said"

    back = from_rpc(Foreign(), "shard s0")
    assert (type(back), str(back)) == (errors.UnknownTableError, "shard s0: what it said")
