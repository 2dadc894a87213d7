"""Segments: how a log lies in its files, and what can be believed of them after a crash. See log.py for the idea.

    log/0000000000000001.log      named by the number of its first record

    segment header    "EngrLog" version    first       previous  crc
                       7         u8         u64         u32       u32        = 24 bytes
    record header     "EnRc"  previous  number  durable  length  payload crc  crc
                       4       u32       u64     u64      u64     u32          u32    = 40 bytes, then the payload

Little-endian, no padding: payloads of whole 8 bytes stay aligned to 8. `crc` is the CRC-32 of the header before it; as that holds the payload's, it stands for the
whole record. `previous` is the `crc` of the record before, so that a record left over from an earlier life of the file
is not taken for the next one. `durable` is the last record known to be on the disk when this one was written.

**The end, or damage?** What was not synced may survive a crash in any order, so behind a torn record there may be whole
ones. Where the first record n that is not intact was never durable, it was promised to nobody, and the log ends before
it. If it was durable, the disk has lost what was promised, and no start may hide that. Which of the two is told by the
headers behind: one with `durable` >= n was written after n was safe. A header can be believed without its payload.

What this cannot see: damage to the last records, behind which nothing was written after they became durable. To the log
that is a crash. Whoever knows better (a checkpoint, the watermarks of a client) must say so: `Log.recover(at_least=...)`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engrid.rpc.errors import ShardUnavailableError
from engrid.storage.disk import Disk, Piece

VERSION = 1
_SEGMENT_MAGIC, _RECORD_MAGIC = b"EngrLog", b"EnRc"
_SEGMENT = struct.Struct("<7sBQI")
_RECORD = struct.Struct("<4sIQQQI")
_CRC = struct.Struct("<I")
SEGMENT_HEADER_BYTES = _SEGMENT.size + _CRC.size
RECORD_HEADER_BYTES = _RECORD.size + _CRC.size
_WINDOW_BYTES = 4 << 20
"""Read at a time: small enough for the C library to hand the same memory out again (host/allocator.py)."""


class CorruptLogError(ShardUnavailableError):
    """The log lacks what was durable, or is of a newer version; the message names file and byte. Nothing was changed."""


@dataclass(frozen=True)
class Header:
    """A record's header, without what holds it together."""

    number: int
    durable: int
    length: int
    previous: int
    payload_crc: int
    crc: int


@dataclass(frozen=True)
class Damage:
    """The first record that is not intact, and where it should be."""

    number: int
    path: str
    offset: int
    what: str


def checksum(pieces: Sequence[Piece]) -> int:
    """CRC-32 of the pieces end to end. Releases the GIL for large ones."""
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
    return crc


def segment_name(first: int) -> str:
    """The file name of the segment that begins with record `first`."""
    return f"{first:016d}.log"


def encode_segment_header(first: int, previous: int) -> bytes:
    """previous: crc of record first - 1; 0 where there is none."""
    return _sealed(_SEGMENT.pack(_SEGMENT_MAGIC, VERSION, first, previous))


def encode_record_header(number: int, durable: int, length: int, previous: int, payload_crc: int) -> bytes:
    """The bytes before a payload. Their last 4 are the record's crc: see record_crc."""
    return _sealed(_RECORD.pack(_RECORD_MAGIC, previous, number, durable, length, payload_crc))


def record_crc(header: bytes) -> int:
    """What the next record has for `previous`."""
    return int(_CRC.unpack_from(header, len(header) - _CRC.size)[0])


def _sealed(header: bytes) -> bytes:
    return header + _CRC.pack(zlib.crc32(header))


def _decode_record_header(data: memoryview, offset: int) -> Header | None:
    if len(data) - offset < RECORD_HEADER_BYTES:
        return None
    magic, previous, number, durable, length, payload_crc = _RECORD.unpack_from(data, offset)
    (crc,) = _CRC.unpack_from(data, offset + _RECORD.size)
    if magic != _RECORD_MAGIC or crc != zlib.crc32(data[offset : offset + _RECORD.size]):
        return None
    return Header(number, durable, length, previous, payload_crc, crc)


class Scan:
    """One pass over all segments of a folder. Changes nothing.

    Once `records` is exhausted the other attributes say where the log ends. Not thread-safe.
    """

    def __init__(self, disk: Disk, folder: str) -> None:
        self._disk = disk
        self._folder = folder
        numbers = {name: int(name[:-4]) for name in disk.names(folder) if name.endswith(".log") and name[:-4].isdigit()}
        self.firsts = sorted(first for name, first in numbers.items() if name == segment_name(first))
        """First record of each segment, by its name."""
        self.last = self.firsts[0] - 1 if self.firsts else 0
        """The last intact record."""
        self.crc = 0
        """Its crc; of the record before the first segment where that is empty."""
        self.proven = 0
        """The highest `durable` of all intact records."""
        self.segment = -1
        """Index in firsts of the segment in which the intact log ends; -1: there is none."""
        self.end = 0
        """Offset in that segment at which it ends; 0: not even the segment's header is intact."""
        self.damage: Damage | None = None
        """None where the segments end with an intact record."""
        self._size = 0
        self._window = memoryview(b"")
        """Bytes of the current segment from _window_start on."""
        self._window_start = 0

    def path(self, index: int) -> str:
        """Of the segment of that index."""
        return f"{self._folder}/{segment_name(self.firsts[index])}"

    def records(self) -> Iterator[tuple[int, memoryview]]:
        """(number, payload) of each record until the end or the first damage. Payloads are views of megabytes read."""
        for index, first in enumerate(self.firsts):
            if first != self.last + 1:
                what = f"record {self.last + 1} is missing: the segment begins with record {first}"
                self.damage = Damage(self.last + 1, self.path(index), 0, what)
                return
            self.segment, self.end = index, 0
            self._size = self._disk.size(self.path(index))
            self._window, self._window_start = memoryview(b""), 0
            if not self._read_segment_header(first):
                return
            while self.end < self._size:
                payload = self._next_payload()
                if payload is None:
                    return
                yield self.last, payload

    def _read_segment_header(self, first: int) -> bool:
        expected_crc = self.crc if self.segment else None
        data = self._bytes(0, SEGMENT_HEADER_BYTES)
        if len(data) == SEGMENT_HEADER_BYTES:
            magic, version, named, previous = _SEGMENT.unpack_from(data)
            (crc,) = _CRC.unpack_from(data, _SEGMENT.size)
            intact = magic == _SEGMENT_MAGIC and crc == zlib.crc32(data[: _SEGMENT.size])
            if intact and version != VERSION:
                raise CorruptLogError(
                    f"{self.path(self.segment)} is a log of version {version}; this shard reads version {VERSION}. "
                    "Start the engrid that wrote it"
                )
            if intact and named == first and expected_crc in (None, previous):
                self.crc, self.end = previous, SEGMENT_HEADER_BYTES
                return True
        self._damaged("the segment's header is torn or damaged")
        return False

    def _next_payload(self) -> memoryview | None:
        header = _decode_record_header(self._bytes(self.end, RECORD_HEADER_BYTES), 0)
        if header is None:
            self._damaged("its header is torn or damaged")
            return None
        start = self.end + RECORD_HEADER_BYTES
        payload = self._bytes(start, header.length)
        if (header.number, header.previous) != (self.last + 1, self.crc):
            self._damaged(f"record {header.number} of another time stands in its place")
        elif len(payload) < header.length:
            self._damaged(f"{len(payload)} of its {header.length} bytes are there")
        elif zlib.crc32(payload) != header.payload_crc:
            self._damaged("its checksum does not fit")
        else:
            self.last, self.crc, self.end = header.number, header.crc, start + header.length
            self.proven = max(self.proven, header.durable)
            return payload
        return None

    def _bytes(self, start: int, length: int) -> memoryview:
        """Of the current segment; fewer where it ends before."""
        length = min(length, self._size - start)
        if start + length > self._window_start + len(self._window):
            self._window = memoryview(self._disk.read(self.path(self.segment), start, max(length, _WINDOW_BYTES)))
            self._window_start = start
        return self._window[start - self._window_start :][:length]

    def _damaged(self, what: str) -> None:
        number = self.last + 1
        self.damage = Damage(number, self.path(self.segment), self.end, f"record {number} is not intact: {what}")

    def refuse_if_durable(self) -> None:
        """Raises CorruptLogError where a header behind the damage says that the damaged record was durable."""
        damage = self.damage
        if damage is None:
            return
        for index, offset, header in self._headers_behind():
            if header.durable >= damage.number:
                raise CorruptLogError(
                    f"{damage.path}, byte {damage.offset}: {damage.what}. It was durable, as record {header.number} "
                    f"({self.path(index)}, byte {offset}) says; the log was left as it is. Put back an intact copy "
                    "of the file, or move the shard's state away and restore a checkpoint"
                )

    def _headers_behind(self) -> Iterator[tuple[int, int, Header]]:
        """Every believable header from the damage on, those of torn records included."""
        for index in range(max(0, self.segment), len(self.firsts)):
            data = self._disk.read(self.path(index))
            view = memoryview(data)
            offset = self.end if index == self.segment else 0
            while (offset := data.find(_RECORD_MAGIC, offset)) >= 0:
                header = _decode_record_header(view, offset)
                if header is None:
                    offset += 1
                    continue
                yield index, offset, header
                offset += RECORD_HEADER_BYTES + header.length
