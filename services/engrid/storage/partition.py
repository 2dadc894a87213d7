"""One partition's rows and optimizer state on disk: written once, as a stream, and read by any range of rows.

    tables/NAME-INDEX.rows.safetensors         uint8   [n, row_bytes]    rows as served
    tables/NAME-INDEX.exp_avg.safetensors      float32 [n, width]        each array of the optimizer's state, and the
    ...                                                                  master rows of bfloat16
    tables/NAME-INDEX.ids.safetensors          int64   [n]               incremental only: ids of the table, rising

    a file:   8 bytes | JSON header | block 0 | block 1 | ... |          little-endian; a block is `block_rows` rows
              length of the header    crc32     crc32                    the checksums lie in the manifest

One file per array, because a sweep reaches rows and state together while a safetensors file holds one array after the
other: in a file of all arrays each would be written at an offset of its own, in no order that a disk, a checksum or
an append-only seam likes. So it is a plain sequential write with nothing held back, sha256 runs along, and whoever
publishes rows for serving reads the rows alone.

Two checksums, for two readers. The sha256 of the file is for `verify`, and for anyone with `sha256sum`. Loading checks
zlib.crc32 of each block instead: 2.6 GB/s here against 1.7 with SHA instructions and 0.5 without, right after the block
was read and so in the cache, for any part of the file by itself; it finds every flip of up to 3 bits in a block of a
MiB and misses other damage once in 4e9. The header is compared with the one we would write, and the size is exact: no
byte of a file goes unchecked. xxhash would be faster still, and one more dependency for what is not the bottleneck.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from engrid.tables import check_int, check_keys

from .disk import Disk
from .errors import CheckpointDamagedError, CheckpointError
from .fields import check_hex, check_list, check_object, check_path, check_text

Array = npt.NDArray[np.generic]
Bytes = npt.NDArray[np.uint8]

READ_BYTES = 4 << 20
_TYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype(np.uint8), "F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


@dataclass(frozen=True, kw_only=True)
class ArrayFile:
    """One array of a partition, and the file that holds it."""

    path: str
    """Within the checkpoint."""
    dtype: str
    """As safetensors calls it: U8, F32 or I64."""
    shape: tuple[int, ...]
    """First the rows."""
    bytes: int
    """Of the file."""
    sha256: str
    """Of the file, in hex."""
    blocks: tuple[int, ...]
    """crc32 of each block."""

    def __post_init__(self) -> None:
        """Raises ValueError for what no array of ours is: what a file says of itself is believed no further."""
        check_path("path", self.path)
        if self.dtype not in _TYPES:
            raise ValueError(f"dtype is {self.dtype!r}; give one of {', '.join(_TYPES)}")
        check_hex("sha256", self.sha256)
        if not self.shape:
            raise ValueError("shape is empty; give the number of rows first")
        for each in self.shape:
            check_int("shape", each, 0, 1 << 48)
        check_int("bytes", self.bytes, 0, 1 << 63)
        for each in self.blocks:
            check_int("block", each, 0, 1 << 32)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of this array."""
        return _TYPES[self.dtype].itemsize * int(np.prod(self.shape[1:], dtype=np.int64))

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return plain | {"shape": list(self.shape), "blocks": list(self.blocks)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Raises ValueError for anything `to_json` does not return."""
        check_keys("array", values, {field.name for field in fields(cls)})
        for name in ("shape", "blocks"):
            check_list(name, values[name])
        return cls(**{**values, "shape": tuple(values["shape"]), "blocks": tuple(values["blocks"])})


@dataclass(frozen=True, kw_only=True)
class SavedPartition:
    """A partition as it was after a step."""

    table: str
    index: int
    """Of the partition, in the placement it was saved under."""
    start: int
    stop: int
    """Rows start..stop-1 of the table."""
    step: int
    """The last that was applied."""
    attempt: int
    """The one that pushed it."""
    watermarks: Mapping[int, int]
    """Last seq taken, by worker."""
    base: str
    """Name of the checkpoint that holds the rows which are not in here; "" where all are."""
    block_rows: int
    """Rows of every block but the last."""
    arrays: Mapping[str, ArrayFile]

    def __post_init__(self) -> None:
        """Raises ValueError where numbers contradict each other, so that no file is read by them."""
        for name in ("table", "base"):
            check_text(name, getattr(self, name))
        for name, low in (("index", 0), ("start", 0), ("stop", 1), ("step", 0), ("attempt", 0), ("block_rows", 1)):
            check_int(name, getattr(self, name), low, 1 << 63)
        for worker, seq in self.watermarks.items():
            check_int("worker", worker, 0, 1 << 32)
            check_int("watermark", seq, 0, 1 << 64)
        if self.stop <= self.start or "rows" not in self.arrays or (self.base and "ids" not in self.arrays):
            raise ValueError(f"rows {self.start}..{self.stop} in {sorted(self.arrays)}: that is no partition")
        if not self.base and self.rows != self.stop - self.start:
            raise ValueError(
                f"{self.rows} rows are saved of {self.start}..{self.stop}, and no checkpoint before has others"
            )
        for name, array in self.arrays.items():
            blocks = -(-self.rows // self.block_rows)
            size = len(header(name, array.dtype, array.shape)) + self.rows * array.row_bytes
            if (array.shape[0], len(array.blocks), array.bytes) != (self.rows, blocks, size):
                raise ValueError(
                    f"array {name} of {self.table}[{self.index}] is not of {self.rows} rows in {blocks} blocks"
                )

    @property
    def rows(self) -> int:
        """Rows in the files."""
        return self.arrays["rows"].shape[0]

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return plain | {
            "watermarks": {str(worker): seq for worker, seq in self.watermarks.items()},
            "arrays": {name: array.to_json() for name, array in self.arrays.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Raises ValueError for anything `to_json` does not return."""
        check_keys("partition", values, {field.name for field in fields(cls)})
        for name in ("watermarks", "arrays"):
            check_object(name, values[name])
        watermarks = {int(worker): seq for worker, seq in values["watermarks"].items()}
        arrays = {name: ArrayFile.from_json(array) for name, array in values["arrays"].items()}
        return cls(**{**values, "watermarks": watermarks, "arrays": arrays})


def header(name: str, dtype: str, shape: Sequence[int]) -> bytes:
    """What a safetensors file of that one array begins with; padded, so that the data is aligned to 8 bytes."""
    count = int(np.prod(shape, dtype=np.int64)) * _TYPES[dtype].itemsize
    entry = {name: {"dtype": dtype, "shape": list(shape), "data_offsets": [0, count]}}
    text = json.dumps(entry, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class PartitionWriter:
    """Writes a partition's chunks as they come; nothing is held back.

    Not for use after an error: whatever was written lies in a folder that is never published.
    """

    def __init__(
        self, disk: Disk, folder: str, *, table: str, index: int, like: Mapping[str, Array], rows: int, block_rows: int
    ) -> None:
        """folder: from Checkpoints.begin. like: arrays of the names, types and row shapes that will come; rows: how many in all."""
        self._disk, self._folder, self._block_rows, self._left = disk, folder, block_rows, rows
        self._table, self._index = table, index
        self._files: dict[str, _ArrayWriter] = {}
        try:
            for name, array in like.items():
                path = f"tables/{table}-{index:05d}.{name}.safetensors"
                shape = (rows, *array.shape[1:])
                self._files[name] = _ArrayWriter(disk, folder, path, name, array.dtype, shape)
        except OSError:
            self.close()
            raise

    def append(self, arrays: Mapping[str, Array]) -> None:
        """The next `block_rows` rows of each array, C-contiguous; fewer only at the end. Raises OSError."""
        rows = len(arrays["rows"])
        assert arrays.keys() == self._files.keys(), f"chunk of {sorted(arrays)}, files of {sorted(self._files)}"
        assert rows == min(self._block_rows, self._left), f"chunk of {rows} rows, {self._left} are left"
        self._left -= rows
        for name, array in arrays.items():
            self._files[name].append(array)

    def finish(
        self, *, start: int, stop: int, step: int, attempt: int, watermarks: Mapping[int, int], base: str
    ) -> SavedPartition:
        """Forces the files to disk, their names too, and says what they are. Raises OSError."""
        assert not self._left, f"{self._left} rows did not come"
        arrays = {name: file.finish() for name, file in self._files.items()}
        self._disk.sync_folder(f"{self._folder}/tables")
        return SavedPartition(
            table=self._table,
            index=self._index,
            start=start,
            stop=stop,
            step=step,
            attempt=attempt,
            watermarks=dict(watermarks),
            base=base,
            block_rows=self._block_rows,
            arrays=arrays,
        )

    def close(self) -> None:
        """Lets go of the files, finished or not."""
        for file in self._files.values():
            file.close()


class _ArrayWriter:
    def __init__(
        self, disk: Disk, folder: str, path: str, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> None:
        self._path, self._dtype, self._shape = path, _NAMES[dtype], shape
        self._blocks: list[int] = []
        begin = header(name, self._dtype, shape)
        self._sha256 = hashlib.sha256(begin)
        self._begin = begin
        self._file = disk.create(f"{folder}/{path}")

    def append(self, array: Array) -> None:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self._file.write([self._begin, data])
        self._begin = b""
        self._sha256.update(data)
        self._blocks.append(zlib.crc32(data))

    def finish(self) -> ArrayFile:
        if self._begin:  # no row came
            self._file.write([self._begin])
        self._file.sync()
        size = self._file.size
        self._file.close()
        return ArrayFile(
            path=self._path,
            dtype=self._dtype,
            shape=self._shape,
            bytes=size,
            sha256=self._sha256.hexdigest(),
            blocks=tuple(self._blocks),
        )

    def close(self) -> None:
        self._file.close()


def restore(disk: Disk, folder: str, saved: SavedPartition, start: int, stop: int, into: Mapping[str, Array]) -> None:
    """Puts what is saved of the table's rows start..stop-1 into the arrays `into`, whose first row is row `start`.

    Arrays that `into` does not name are not read. Raises CheckpointDamagedError, which names the file, or
    CheckpointError where an array is not saved or is of another shape; rows may then be restored in part.
    """
    for name, target in into.items():
        found = saved.arrays.get(name)
        if found is None or (found.shape[1:], _TYPES[found.dtype]) != (target.shape[1:], target.dtype):
            what = f"{found.dtype} {list(found.shape)}" if found else "nothing"
            raise CheckpointError(
                f"{folder} holds {what} as {name} of table {saved.table}; the table needs {target.dtype}"
                f" [n, {', '.join(map(str, target.shape[1:]))}]"
            )
    low, high = max(start, saved.start), min(stop, saved.stop)
    if low >= high:
        return
    if not saved.base:
        for name, target in into.items():
            for first, data in _read(disk, folder, saved, name, low - saved.start, high - saved.start):
                at = first + saved.start - start
                target[at : at + len(data)] = _typed(data, target)
        return
    ids = _ids(disk, folder, saved)
    begin, end = (int(at) for at in np.searchsorted(ids, (low, high)))
    for name, target in into.items():
        for first, data in _read(disk, folder, saved, name, begin, end):
            target[ids[first : first + len(data)] - start] = _typed(data, target)


def _ids(disk: Disk, folder: str, saved: SavedPartition) -> npt.NDArray[np.int64]:
    ids = np.empty(saved.rows, np.int64)
    for first, data in _read(disk, folder, saved, "ids", 0, saved.rows):
        ids[first : first + len(data)] = _typed(data, ids)
    if len(ids) and not (saved.start <= ids[0] and ids[-1] < saved.stop and np.all(ids[1:] > ids[:-1])):
        raise _damaged(
            f"{folder}/{saved.arrays['ids'].path}", f"holds ids that do not rise in {saved.start}..{saved.stop}"
        )
    return ids


def _typed(data: Bytes, like: Array) -> Array:
    return data.reshape(-1).view(like.dtype).reshape(len(data), *like.shape[1:])


def _read(
    disk: Disk, folder: str, saved: SavedPartition, name: str, begin: int, end: int
) -> Iterator[tuple[int, Bytes]]:
    """Rows begin..end-1 of an array, verified, as (first row, uint8 [n, bytes of a row]) in order."""
    array = saved.arrays[name]
    path = f"{folder}/{array.path}"
    head = header(name, array.dtype, array.shape)
    size = disk.size(path) if disk.exists(path) else -1
    if size != array.bytes or disk.read(path, 0, len(head)) != head:
        raise _damaged(path, "is missing" if size < 0 else f"has another header, or {size} bytes, not {array.bytes}")
    block_bytes = saved.block_rows * array.row_bytes
    at_once = max(1, READ_BYTES // block_bytes)
    stop = -(-end // saved.block_rows) if end > begin else 0
    for block in range(begin // saved.block_rows, stop, at_once):
        length = min(at_once, stop - block) * block_bytes
        data = memoryview(disk.read(path, len(head) + block * block_bytes, length))
        for offset in range(0, len(data), block_bytes):
            number = block + offset // block_bytes
            if zlib.crc32(data[offset : offset + block_bytes]) != array.blocks[number]:
                raise _damaged(path, f"does not match its checksum in rows from {number * saved.block_rows} on")
        first = block * saved.block_rows
        rows = np.frombuffer(data, np.uint8).reshape(-1, array.row_bytes)[max(0, begin - first) : end - first]
        yield max(begin, first), rows


def _damaged(path: str, what: str) -> CheckpointDamagedError:
    return CheckpointDamagedError(
        f"checkpoint file {path} {what}: it is damaged; restore it from a copy, or load another checkpoint", [path]
    )
