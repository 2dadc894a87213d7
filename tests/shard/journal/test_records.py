"""What a shard logs comes back equal; the format is the one written down."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrid.shard.journal.records import (
    AdoptRecord,
    BeginRunRecord,
    CommitRecord,
    LoadedRecord,
    PushPart,
    PushRecord,
    decode,
    encode,
)
from engrid.storage.log.segments import CorruptLogError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
PART = st.builds(
    PushPart,
    table=TEXT,
    partition=U32,
    seq=U64,
    row_ids=st.integers(0, 5).map(lambda rows: np.arange(rows, dtype="<i8").tobytes()),
    gradients=st.integers(0, 15).map(lambda values: np.arange(values, dtype="<f4").tobytes()),
)
RECORD = st.one_of(
    st.builds(AdoptRecord, placement=TEXT),
    st.builds(BeginRunRecord, run=TEXT, attempt=U64, workers=U32, tables=st.lists(TEXT, max_size=3), token=TEXT),
    st.builds(
        PushRecord,
        run=TEXT,
        attempt=U64,
        worker=U32,
        step=U64,
        learning_rate=st.floats(allow_nan=False),
        hold=st.booleans(),
        epoch=U64,
        parts=st.lists(PART, max_size=4),
    ),
    st.builds(CommitRecord, run=TEXT, attempt=U64, worker=U32, step=U64),
    st.builds(LoadedRecord, table=TEXT, partition=U32, step=U64, run=TEXT, attempt=U64, checkpoint=TEXT),
)
PUSH = PushRecord(
    run="r",
    attempt=1,
    worker=2,
    step=3,
    learning_rate=0.5,
    hold=True,
    epoch=4,
    parts=[PushPart(table="t", partition=5, seq=6, row_ids=b"IIIIIIII", gradients=b"GGGG")],
)
GOLDEN = [
    (AdoptRecord(placement="{}"), "0201 02000000 7b7d"),
    (
        BeginRunRecord(run="r", attempt=1, workers=2, tables=["a", "b"], token="mine"),
        "0202 01000000 72 0100000000000000 02000000 02000000 01000000 61 01000000 62 04000000 6d696e65 00000000000000",
    ),
    (
        PUSH,
        (
            "0203 01000000 72 0100000000000000 02000000 0300000000000000 000000000000e03f 01 0400000000000000 01000000"
            "01000000 74 05000000 0600000000000000 0800000000000000 0400000000000000 00000000000000"
            "4949494949494949 47474747 00000000"
        ),
    ),
    (
        CommitRecord(run="r", attempt=1, worker=2, step=3),
        "0204 01000000 72 0100000000000000 02000000 0300000000000000 0000000000",
    ),
    (
        LoadedRecord(table="t", partition=1, step=2, run="r", attempt=3, checkpoint="c"),
        "0205 01000000 74 01000000 0200000000000000 01000000 72 0300000000000000 01000000 63 000000",
    ),
]


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def joined(record) -> bytes:
    return b"".join(encode(record))


@given(RECORD)
def test_a_record_comes_back_equal(record):
    data = joined(record)
    assert decode(memoryview(data)) == record
    assert len(data) % 8 == 0


@pytest.mark.parametrize(("record", "golden"), GOLDEN, ids=[type(record).__name__ for record, _ in GOLDEN])
def test_golden_bytes(record, golden):
    assert joined(record).hex() == golden.replace(" ", "")
    assert decode(memoryview(bytes.fromhex(golden))) == record


def test_arrays_are_the_requests_own_buffers_and_views_of_the_payload():
    ids, gradients = np.arange(3, dtype="<i8"), np.ones((3, 5), "<f4")
    part = PushPart(table="t", partition=0, seq=1, row_ids=memoryview(ids), gradients=memoryview(gradients).cast("B"))
    push = PushRecord(run="r", attempt=1, worker=0, step=1, learning_rate=1.0, hold=False, epoch=1, parts=[part, part])
    pieces = encode(push)
    assert sum(piece is part.row_ids for piece in pieces) == 2
    assert sum(piece is part.gradients for piece in pieces) == 2
    payload = np.frombuffer(b"".join(pieces), np.uint8)
    back = decode(memoryview(payload))
    for each in back.parts:
        for piece, array in ((each.row_ids, ids), (each.gradients, gradients)):
            view = np.frombuffer(piece, array.dtype)
            assert np.shares_memory(view, payload)
            assert (view == array.ravel()).all()
        assert (address(np.frombuffer(each.row_ids, np.uint8)) - address(payload)) % 8 == 0


def test_a_newer_version_and_an_unknown_kind_are_refused_by_name():
    data = bytearray(joined(CommitRecord(run="r", attempt=1, worker=0, step=1)))
    data[0] = 3
    with pytest.raises(CorruptLogError, match=r"format version 3; this shard reads version 2\. Start the engrid"):
        decode(memoryview(data))
    data[:2] = 2, 9
    with pytest.raises(CorruptLogError, match="kind 9"):
        decode(memoryview(data))


@given(RECORD, st.data())
def test_a_record_that_breaks_off_is_refused(record, data):
    whole = joined(record)
    cut = data.draw(st.integers(0, max(0, len(whole) - 8)))
    with pytest.raises(CorruptLogError, match=f"a record of {cut} bytes breaks off at byte"):
        decode(memoryview(whole)[:cut])
