"""The hot messages, encoded and decoded by hand in the very wire format of memory.proto.

A protobuf object with a bytes field copies the field when it is set, again when it is serialised, and again when it is
parsed. Here a request is joined once, a reply is a `bytes` object of its final size into which the rows are gathered
directly, and what is decoded are views. A stock protobuf client or server understands every byte (a test lets one talk
to us), and fields that a newer peer adds are passed over.

What a peer can make us allocate is bounded before it is: a frame of megabytes may hold millions of empty tables, and each
would become an object of a hundred times its bytes.

    LookupFrame    0A len LookupRequest                              |  10 number          a cancel
    LookupRequest  08 number  10 epoch  18 timeout_us  20 step  (2A len TableIds)*  32 len run
    TableIds       0A len table  12 len ids (8 bytes each)  18 row_bytes
    LookupReply    08 number  20 step  (12 len rows)*                |  08 number  1A len Error

Rejected: FlatBuffers or a frame of our own (as fast, and no stock client could talk to us); writing rows into a
bytearray (gRPC takes `bytes` alone, so it would be copied once more).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from engrid.v1 import memory_pb2 as pb

from .errors import BadRequestError, RequestTooLargeError
from .frames import Bytes, Ids

_VARINT, _FIXED64, _LEN, _FIXED32 = 0, 1, 2, 5
MAX_TABLES = 1024
"""Tables in one request; the rows of so many in one reply."""
MAX_NAME_BYTES = 512
"""Bytes of the name of a table or a run, in UTF-8."""
_OTHER_FIELDS = 64
"""Fields of a message besides its tables, those of a newer peer included."""
_BYTES_HEADER = bytes.__basicsize__ - 1
"""Bytes of a bytes object before its contents."""

_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype = ctypes.py_object
_new_bytes.argtypes = [ctypes.c_char_p, ctypes.c_ssize_t]


@dataclass
class TableRequest:
    """One table of a request."""

    table: str = ""
    row_ids: memoryview = field(default_factory=lambda: memoryview(b""))
    """8 bytes each."""
    row_bytes: int = 0


@dataclass
class Request:
    """A LookupRequest, or the number of one to cancel."""

    number: int = 0
    epoch: int = 0
    timeout_us: int = 0
    step: int = 0
    tables: list[TableRequest] = field(default_factory=list)
    run: str = ""
    cancel: int | None = None
    frame_bytes: int = 0
    """Of the message it came in, which its row ids keep in memory."""
    given_up: bool = False
    """By its client, after it was sent."""


@dataclass
class Reply:
    """A LookupReply: rows as views of the message, or an error."""

    number: int = 0
    rows: list[memoryview] = field(default_factory=list)
    error: pb.Error | None = None
    step: int = 0


def varint(value: int) -> bytes:
    """An unsigned integer in base 128, low groups first."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_request(
    tables: Sequence[tuple[str, Ids, int]], *, number: int, epoch: int, timeout_us: int, step: int, run: str
) -> bytes:
    """A LookupFrame with a request; tables: (table, int64 row ids, bytes of a row)."""
    pieces: list[bytes | memoryview] = [b"\x08", varint(number), b"\x10", varint(epoch), b"\x18", varint(timeout_us)]
    if step:
        pieces += (b"\x20", varint(step))
    for table, ids, row_bytes in tables:
        name = table.encode()
        raw = np.ascontiguousarray(ids, "<i8").data.cast("B") if len(ids) else memoryview(b"")
        head = b"\x0a" + varint(len(name)) + name + b"\x12" + varint(raw.nbytes)
        tail = b"\x18" + varint(row_bytes)
        pieces += (b"\x2a", varint(len(head) + raw.nbytes + len(tail)), head, raw, tail)
    if run:
        name = run.encode()
        pieces += (b"\x32", varint(len(name)), name)
    return b"".join((b"\x0a", varint(sum(map(len, pieces))), *pieces))


def encode_cancel(number: int) -> bytes:
    """A LookupFrame that gives a request up."""
    return b"\x10" + varint(number)


def new_reply(number: int, sizes: Sequence[int], step: int = 0) -> tuple[bytes, list[Bytes]]:
    """A LookupReply whose rows are still to be written: per table of `sizes` bytes, a writable view into it.

    The views may be written until the reply is handed to gRPC, and not after.
    """
    heads = [b"\x12" + varint(size) for size in sizes]
    start = b"\x08" + varint(number)
    if step:
        start += b"\x20" + varint(step)
    total = len(start) + sum(map(len, heads)) + sum(sizes)
    reply: bytes = _new_bytes(None, total)
    # A bytes object that nobody else has seen yet may be written: so does CPython itself in b"".join.
    whole = np.ctypeslib.as_array((ctypes.c_ubyte * total).from_address(id(reply) + _BYTES_HEADER))
    views, at = [], len(start)
    whole[:at] = np.frombuffer(start, np.uint8)
    for head, size in zip(heads, sizes, strict=True):
        whole[at : at + len(head)] = np.frombuffer(head, np.uint8)
        at += len(head)
        views.append(whole[at : at + size])
        at += size
    return reply, views


def encode_error(number: int, error: pb.Error) -> bytes:
    """A LookupReply that says why there are no rows."""
    return pb.LookupReply(number=number, error=error).SerializeToString()


def decode_frame(raw: bytes) -> Request:
    """Raises BadRequestError for what is no LookupFrame, RequestTooLargeError for one that asks for too many tables."""
    request = Request(frame_bytes=len(raw))
    with _Damaged("lookup request"):
        for number, value in _fields(memoryview(raw)):
            if number == 1:
                _decode_request(_view(value), request)
            elif number == 2:
                request.cancel = _integer(value)
    return request


def _decode_request(raw: memoryview, request: Request) -> None:
    for number, value in _fields(raw, MAX_TABLES + _OTHER_FIELDS):
        match number:
            case 1:
                request.number = _integer(value)
            case 2:
                request.epoch = _integer(value)
            case 3:
                request.timeout_us = _integer(value)
            case 4:
                request.step = _integer(value)
            case 5:
                if len(request.tables) == MAX_TABLES:
                    raise RequestTooLargeError(
                        f"lookup {request.number} asks for more than {MAX_TABLES} tables; ask for them in several requests"
                    )
                request.tables.append(_decode_table(_view(value)))
            case 6:
                request.run = _name(value)


def _decode_table(raw: memoryview) -> TableRequest:
    table = TableRequest()
    for number, value in _fields(raw):
        match number:
            case 1:
                table.table = _name(value)
            case 2:
                table.row_ids = _view(value)
            case 3:
                table.row_bytes = _integer(value)
    return table


def decode_reply(raw: bytes) -> Reply:
    """Raises BadRequestError for what is no LookupReply."""
    reply = Reply()
    with _Damaged("lookup reply"):
        for number, value in _fields(memoryview(raw), MAX_TABLES + _OTHER_FIELDS):
            match number:
                case 1:
                    reply.number = _integer(value)
                case 2:
                    reply.rows.append(_view(value))
                case 4:
                    reply.step = _integer(value)
                case 3:
                    reply.error = pb.Error.FromString(bytes(_view(value)))
    return reply


class _Damaged:
    """Whatever goes wrong in parsing is one error."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        # DecodeError is protobuf's own; UnicodeDecodeError is a ValueError.
        if isinstance(error, ValueError | IndexError) or (kind is not None and kind.__name__ == "DecodeError"):
            raise BadRequestError(f"a {self._what} is damaged: {error}") from error


def check_fields(raw: bytes, what: str, most: Mapping[int, int]) -> None:
    """Raises RequestTooLargeError where a protobuf message has more of a field than `most`, by number, or 64 of the others.

    Looks at the outermost fields alone and allocates nothing. Raises BadRequestError where it is damaged.
    """
    left = dict(most)
    with _Damaged(what):
        for number, _ in _fields(memoryview(raw), sum(most.values()) + _OTHER_FIELDS):
            if number in left:
                left[number] -= 1
                if left[number] < 0:
                    raise RequestTooLargeError(f"a {what} has more than {most[number]} of field {number}; send fewer")


def _fields(raw: memoryview, most: int = _OTHER_FIELDS) -> Iterator[tuple[int, int | memoryview]]:
    """Field number and value of each field of a message; IndexError or ValueError where it is cut short, or has more fields
    than `most`."""
    at, end = 0, len(raw)
    while at < end:
        most -= 1
        if most < 0:
            raise ValueError(f"more fields than any {len(raw)} bytes of ours hold")
        tag, at = _read_varint(raw, at)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise ValueError(f"field number 0 at byte {at}")
        if wire == _VARINT:
            value, at = _read_varint(raw, at)
            yield number, value
            continue
        if wire == _LEN:
            size, at = _read_varint(raw, at)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > end:
            raise ValueError(f"field {number} announces {size} bytes, {end - at} are left")
        yield number, raw[at : at + size]
        at += size


def _read_varint(raw: memoryview, at: int) -> tuple[int, int]:
    value = raw[at]
    at += 1
    if value < 0x80:
        return value, at
    value &= 0x7F
    for shift in range(7, 70, 7):
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise ValueError(f"a number of more than 10 bytes ends at byte {at}")


def _integer(value: int | memoryview) -> int:
    if isinstance(value, memoryview):
        raise ValueError("bytes where a number belongs")  # noqa: TRY004 - one error for damage
    return value


def _name(value: int | memoryview) -> str:
    raw = _view(value)
    if len(raw) > MAX_NAME_BYTES:
        raise ValueError(f"a name of {len(raw)} bytes, over the limit of {MAX_NAME_BYTES}")
    return str(raw, "utf-8")


def _view(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")  # noqa: TRY004 - one error for damage
    return value
