"""The error table is complete, and an error arrives as what was raised."""

import grpc
import pytest

from engrid.rpc import errors
from engrid.rpc.errors import TABLE, EngridError, from_message, to_message
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


def test_code_of_a_newer_peer_is_still_an_error():
    assert "newer peer" in str(from_message(pb.Error(code=999, message="x")))
