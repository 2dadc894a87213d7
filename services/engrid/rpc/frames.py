"""The hot messages: how row ids, rows and gradients lie in their bytes fields.

A lookup travels as one `LookupRequest` per shard for all tables, its row ids as little-endian int64 end to
end; the reply's rows lie end to end, row_bytes each, in the order of the ids. A reply is therefore placed
into its tensor by one strided copy, and nothing in between looks at a row.

    LookupRequest  number | epoch | timeout_us | step | table, ids (8 B each) | table, ids | ...
    LookupReply    number | rows of table 1 (row_bytes each) | rows of table 2 | ...   or   number | Error

Rejected: int32 ids relative to a partition (4 bytes of about 132 saved, and a request could no longer be
understood without the placement); one message per table (a token of a 40-layer model reads two tables: twice
the system calls); compression (rows are noise to any compressor).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .errors import BadRequestError

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_LITTLE_INT64 = np.dtype("<i8")
_LITTLE_FLOAT32 = np.dtype("<f4")


def ids_to_bytes(ids: Ids) -> bytes:
    """int64 [n] -> 8n bytes."""
    return ids.astype(_LITTLE_INT64, copy=False).tobytes()


def ids_from_bytes(raw: bytes | memoryview, what: str) -> Ids:
    """8n bytes -> int64 [n], a view. `what` names the field in the error."""
    if len(raw) % 8:
        raise BadRequestError(f"{what}: {len(raw)} bytes are not a whole number of int64 row ids")
    return np.frombuffer(raw, _LITTLE_INT64)


def floats_to_bytes(values: Floats) -> bytes:
    """float32 of any shape -> its bytes in C order."""
    return values.astype(_LITTLE_FLOAT32, copy=False).tobytes()


def row_view(rows: Bytes) -> npt.NDArray[np.void]:
    """uint8 [n, row_bytes], C-contiguous -> one opaque item per row [n]: take and assignment move whole rows."""
    count, width = rows.shape
    return rows.reshape(-1).view(np.dtype((np.void, width))) if count else np.empty(0, np.dtype((np.void, width)))
