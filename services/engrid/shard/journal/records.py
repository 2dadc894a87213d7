"""What a shard logs: the messages its state machine took, to be handed to it again in the same order.

Gradients are logged, not the rows they lead to: replay makes the same rows, bit for bit, and rows of a hashed table with
their optimizer state are several times as many bytes.

    every record   version  kind  fields, in the order of the class, little-endian; text as u32 length and UTF-8
                    u8       u8    partition, worker, workers and counts u32, hold u8, learning rate f64, all else u64

    a push         version kind run attempt worker step learning_rate hold epoch
                   parts (u32), each: table partition seq, bytes of row ids, bytes of gradients
                   0 to 7 zeros, up to the next whole 8 bytes
                   the arrays as they came: row ids, gradients, zeros up to the next whole 8 bytes; the next part's ...

The arrays are written from the request's own buffers and read as views; they lie at whole 8 bytes, as numpy wants them.

Rejected: the protobuf message itself (parsing copies the arrays, writing joins them); JSON for the small fields (as much
code, and a number's type is then a matter of luck). A version is for the whole format, so that a shard started with an
older engrid stops at the first record it would misread.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from engrid.storage.disk import Piece
from engrid.storage.log.segments import CorruptLogError

VERSION = 2
_ADOPT, _BEGIN_RUN, _PUSH, _COMMIT, _LOADED = 1, 2, 3, 4, 5
_U8, _U32, _U64, _F64 = struct.Struct("<B"), struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<d")


@dataclass(frozen=True, kw_only=True)
class AdoptRecord:
    """A placement was adopted; `placement` is its JSON."""

    placement: str


@dataclass(frozen=True, kw_only=True)
class BeginRunRecord:
    """An attempt of a run was begun, or claimed."""

    run: str
    attempt: int
    workers: int
    tables: Sequence[str]
    token: str


@dataclass(frozen=True, kw_only=True)
class PushPart:
    """One partition's part of a push."""

    table: str
    partition: int
    seq: int
    row_ids: Piece = field(repr=False)
    """int64, little-endian."""
    gradients: Piece = field(repr=False)
    """float32, little-endian."""


@dataclass(frozen=True, kw_only=True)
class PushRecord:
    """A push was taken, at least one part of it new."""

    run: str
    attempt: int
    worker: int
    step: int
    learning_rate: float
    hold: bool
    epoch: int
    parts: Sequence[PushPart]


@dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """A worker committed a step."""

    run: str
    attempt: int
    worker: int
    step: int


@dataclass(frozen=True, kw_only=True)
class LoadedRecord:
    """A partition's rows were replaced by those of a checkpoint, which are not in the log."""

    table: str
    partition: int
    step: int
    run: str
    attempt: int
    checkpoint: str
    """Where the rows are."""


Record = AdoptRecord | BeginRunRecord | PushRecord | CommitRecord | LoadedRecord


def encode(record: Record) -> list[Piece]:
    """The record's payload in pieces; a push's arrays are its own buffers."""
    out = bytearray(_U8.pack(VERSION))
    match record:
        case AdoptRecord():
            out += _U8.pack(_ADOPT) + _text(record.placement)
        case BeginRunRecord():
            out += _U8.pack(_BEGIN_RUN) + _text(record.run) + _U64.pack(record.attempt) + _U32.pack(record.workers)
            out += _U32.pack(len(record.tables)) + b"".join(_text(table) for table in record.tables)
            out += _text(record.token)
        case CommitRecord():
            out += _U8.pack(_COMMIT) + _text(record.run) + _U64.pack(record.attempt)
            out += _U32.pack(record.worker) + _U64.pack(record.step)
        case LoadedRecord():
            out += _U8.pack(_LOADED) + _text(record.table) + _U32.pack(record.partition) + _U64.pack(record.step)
            out += _text(record.run) + _U64.pack(record.attempt) + _text(record.checkpoint)
        case PushRecord():
            return _encode_push(out, record)
    return [bytes(out + _zeros(len(out)))]


def _encode_push(out: bytearray, push: PushRecord) -> list[Piece]:
    out += _U8.pack(_PUSH) + _text(push.run) + _U64.pack(push.attempt) + _U32.pack(push.worker) + _U64.pack(push.step)
    out += _F64.pack(push.learning_rate) + _U8.pack(push.hold) + _U64.pack(push.epoch) + _U32.pack(len(push.parts))
    arrays: list[Piece] = []
    for part in push.parts:
        ids, gradients = memoryview(part.row_ids).nbytes, memoryview(part.gradients).nbytes
        out += _text(part.table) + _U32.pack(part.partition) + _U64.pack(part.seq)
        out += _U64.pack(ids) + _U64.pack(gradients)
        arrays += [part.row_ids, part.gradients, _zeros(ids + gradients)]
    return [bytes(out + _zeros(len(out))), *(piece for piece in arrays if len(piece))]


def decode(payload: memoryview) -> Record:
    """The record of a payload; a push's arrays are views of it. Raises CorruptLogError for what encode did not write."""
    reader = _Reader(payload)
    try:
        version = reader.number(_U8)
        if version != VERSION:
            raise CorruptLogError(
                f"a record of format version {version}; this shard reads version {VERSION}. Start the engrid that wrote it"
            )
        return _decode(reader)
    except (struct.error, UnicodeDecodeError) as error:
        raise CorruptLogError(f"a record of {len(payload)} bytes breaks off at byte {reader.at}: {error}") from error


def _decode(reader: _Reader) -> Record:
    kind = reader.number(_U8)
    if kind == _PUSH:
        return _decode_push(reader)
    if kind == _COMMIT:
        return CommitRecord(
            run=reader.text(), attempt=reader.number(_U64), worker=reader.number(_U32), step=reader.number(_U64)
        )
    if kind == _BEGIN_RUN:
        run, attempt, workers = reader.text(), reader.number(_U64), reader.number(_U32)
        tables = [reader.text() for _ in range(reader.number(_U32))]
        return BeginRunRecord(run=run, attempt=attempt, workers=workers, tables=tables, token=reader.text())
    if kind == _ADOPT:
        return AdoptRecord(placement=reader.text())
    if kind == _LOADED:
        return LoadedRecord(
            table=reader.text(),
            partition=reader.number(_U32),
            step=reader.number(_U64),
            run=reader.text(),
            attempt=reader.number(_U64),
            checkpoint=reader.text(),
        )
    raise CorruptLogError(f"a record of kind {kind}, which format version {VERSION} does not have")


def _decode_push(reader: _Reader) -> PushRecord:
    run, attempt, worker, step = reader.text(), reader.number(_U64), reader.number(_U32), reader.number(_U64)
    (learning_rate,) = _F64.unpack(reader.take(_F64.size))
    hold, epoch, count = bool(reader.number(_U8)), reader.number(_U64), reader.number(_U32)
    heads = [
        (reader.text(), reader.number(_U32), reader.number(_U64), reader.number(_U64), reader.number(_U64))
        for _ in range(count)
    ]
    parts = []
    for table, partition, seq, ids_bytes, gradients_bytes in heads:
        reader.align()
        row_ids, gradients = reader.take(ids_bytes), reader.take(gradients_bytes)
        parts.append(PushPart(table=table, partition=partition, seq=seq, row_ids=row_ids, gradients=gradients))
    return PushRecord(
        run=run,
        attempt=attempt,
        worker=worker,
        step=step,
        learning_rate=learning_rate,
        hold=hold,
        epoch=epoch,
        parts=parts,
    )


class _Reader:
    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.at = 0

    def take(self, count: int) -> memoryview:
        piece = self._data[self.at : self.at + count]
        if len(piece) < count:
            raise struct.error(f"{count} bytes should follow")
        self.at += count
        return piece

    def number(self, kind: struct.Struct) -> int:
        return int(kind.unpack(self.take(kind.size))[0])

    def text(self) -> str:
        return str(self.take(self.number(_U32)), "utf-8")

    def align(self) -> None:
        self.at += -self.at % 8


def _text(value: str) -> bytes:
    data = value.encode()
    return _U32.pack(len(data)) + data


def _zeros(length: int) -> bytes:
    return bytes(-length % 8)
