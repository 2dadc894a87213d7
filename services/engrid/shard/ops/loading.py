"""Rows of a whole partition that come in chunks over the wire: received and checked, then put in their place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from engrid.rpc.errors import RowWidthMismatchError
from engrid.shard.core.messages import PartitionKey
from engrid.shard.rows.partitions import PartitionRows, SealedPartition
from engrid.v1 import memory_pb2 as pb


def receive(part: PartitionRows, key: PartitionKey, chunks: Iterable[pb.LoadChunk]) -> list[bytes]:
    """All rows of a live partition, in pieces that need not end at a row's end. Nothing is changed yet.

    Raises RowWidthMismatchError where too few or too many come.
    """
    row_bytes = part.rows.spec.row_bytes
    expected = (part.stop - part.start) * row_bytes
    received, pieces = 0, []
    for chunk in chunks:
        received += len(chunk.rows)
        if received > expected:
            break
        pieces.append(chunk.rows)
    if received != expected:
        more = "more than " if received > expected else ""
        raise RowWidthMismatchError(
            f"load of {key[0]}[{key[1]}]: {more}{received} bytes came; its {part.stop - part.start} rows of "
            f"{row_bytes} bytes are {expected}. Nothing was changed"
        )
    return pieces


def put(part: PartitionRows, pieces: list[bytes]) -> None:
    """Overwrites the partition's rows by what `receive` returned; their optimizer state begins anew."""
    row_bytes = part.rows.spec.row_bytes
    with part.lock:
        start = 0
        for piece in _whole_rows(pieces, row_bytes):
            part.rows.load(start, np.frombuffer(piece, np.uint8).reshape(-1, row_bytes))
            start += len(piece) // row_bytes
    part.restored()


def receive_sealed(part: SealedPartition, key: PartitionKey, chunks: Iterable[pb.LoadChunk]) -> None:
    """Each chunk goes to its place as it comes, and once all have the rows are sealed.

    Raises RowWidthMismatchError where too few come, which can then be sent again.
    """
    with part.rows.lock:
        at = 0
        for chunk in chunks:
            part.rows.write(at, chunk.rows)
            at += len(chunk.rows)
        if at != part.rows.nbytes:
            raise RowWidthMismatchError(
                f"load of {key[0]}[{key[1]}]: {at} bytes came; its {len(part.rows)} rows are {part.rows.nbytes}. "
                "It serves nothing before all have come"
            )
        part.rows.seal()


def _whole_rows(pieces: list[bytes], row_bytes: int) -> Iterator[bytes]:
    """The same bytes, each piece ending at a row's end."""
    rest = b""
    for piece in pieces:
        joined = rest + piece if rest else piece
        cut = len(joined) - len(joined) % row_bytes
        rest = joined[cut:]
        if cut:
            yield joined[:cut]
