"""The disk as the log and the checkpoints see it: a few operations, and what each has made durable when it returns.

What was done is seen by every reader at once and survives the end of the process, kill -9 included. What survives a
power failure is less, and has to be asked for:

    bytes of a file, and its size after truncate      File.sync
    a name: made, renamed or removed                  Disk.sync_folder of the folder it lies in
    both for a new file: the file first, then its folder

Until then any part of it may survive, in any order: the third write and not the second, the new name of a file that is
still empty. So a file appears whole or not at all only by: create beside, write, sync, rename, sync_folder.

Paths are relative to the disk's root, with slashes; "" is the root itself. What fails raises OSError with its errno and
the path: FileNotFoundError, FileExistsError, ENOSPC, EROFS, EIO. A sync that failed may have lost bytes that later
reads and later syncs still show as good: treat the file as lost until it is written anew.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

Piece = bytes | bytearray | memoryview
"""A contiguous buffer of bytes; a memoryview of another item type is written as the bytes it holds."""

_MOST_PIECES = 1024
"""Buffers one writev takes (Linux: UIO_MAXIOV)."""


class File(Protocol):
    """An open file that is written at its end. One thread writes or truncates; any other may sync meanwhile."""

    @property
    def path(self) -> str:
        """As it was opened by."""

    @property
    def size(self) -> int:
        """Bytes, those of a failed write included."""

    def write(self, pieces: Sequence[Piece]) -> None:
        """Appends the pieces end to end. Where it fails, any first part of them may have been appended."""

    def sync(self) -> None:
        """Makes durable what was written and truncated before the call; not the file's name."""

    def truncate(self, size: int) -> None:
        """Cuts the file to its first `size` bytes."""

    def close(self) -> None:
        """Makes nothing durable. A second call does nothing."""


class Disk(Protocol):
    """A folder of files. Every method may be called from any thread."""

    def make_folder(self, path: str) -> None:
        """Makes a folder in an existing one; one that exists already is left as it is."""

    def names(self, folder: str) -> list[str]:
        """The files and folders in it, sorted."""

    def exists(self, path: str) -> bool:
        """Whether there is a file or folder of that name."""

    def size(self, path: str) -> int:
        """Bytes of a file."""

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of a file from `start` on, to its end or `length` of them; fewer where it ends before."""

    def create(self, path: str) -> File:
        """A new file, empty and open; FileExistsError where the name is taken."""

    def open(self, path: str) -> File:
        """An existing file, open to append."""

    def rename(self, old: str, new: str) -> None:
        """Renames a file or folder within its folder, in one step; a file (or an empty folder) named `new` is replaced."""

    def remove(self, path: str) -> None:
        """Removes a file or an empty folder."""

    def sync_folder(self, folder: str) -> None:
        """Makes durable which names the folder holds, and which file or folder each means; not their content."""

    def free_bytes(self) -> int:
        """Bytes that can still be written."""


class LocalDisk:
    """Disk: the folder `root` of a local file system, made if it is missing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        missing = [folder for folder in (root, *root.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            _sync_folder(folder.parent)

    def make_folder(self, path: str) -> None:
        self._at(path).mkdir(exist_ok=True)

    def names(self, folder: str) -> list[str]:
        return sorted(entry.name for entry in self._at(folder).iterdir())

    def exists(self, path: str) -> bool:
        return self._at(path).exists()

    def size(self, path: str) -> int:
        return self._at(path).stat().st_size

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        with self._at(path).open("rb", buffering=0) as file:
            file.seek(start)
            return _read_all(file.fileno(), length)

    def create(self, path: str) -> File:
        return _LocalFile(path, self._at(path), os.O_CREAT | os.O_EXCL)

    def open(self, path: str) -> File:
        return _LocalFile(path, self._at(path), 0)

    def rename(self, old: str, new: str) -> None:
        if _parent(old) != _parent(new):  # not one step to every disk
            raise OSError(errno.EXDEV, "a rename across folders", f"{old} -> {new}")
        self._at(old).replace(self._at(new))

    def remove(self, path: str) -> None:
        target = self._at(path)
        if target.is_dir():
            target.rmdir()
        else:
            target.unlink()

    def sync_folder(self, folder: str) -> None:
        _sync_folder(self._at(folder))

    def free_bytes(self) -> int:
        stat = os.statvfs(self.root)
        return stat.f_bavail * stat.f_frsize

    def _at(self, path: str) -> Path:
        if path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise OSError(errno.EINVAL, "the path leads out of its folder", path)
        return self.root / path


class _LocalFile:
    def __init__(self, path: str, full_path: Path, flags: int) -> None:
        self.path = path
        self._full_path = str(full_path)
        self._descriptor = os.open(full_path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | flags, 0o644)

    @property
    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def write(self, pieces: Sequence[Piece]) -> None:
        rest = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
        while rest:
            try:
                written = os.writev(self._descriptor, rest[:_MOST_PIECES])
            except OSError as error:
                raise self._named(error) from error
            while rest and written >= len(rest[0]):
                written -= len(rest.pop(0))
            if written:
                rest[0] = rest[0][written:]

    def sync(self) -> None:
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise self._named(error) from error

    def truncate(self, size: int) -> None:
        try:
            os.ftruncate(self._descriptor, size)
        except OSError as error:
            raise self._named(error) from error

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror, self._full_path)


def _read_all(descriptor: int, length: int | None) -> bytes:
    """From the descriptor's position on. A read may return less than asked for, and 2 GiB at most."""
    if length is None:
        length = max(0, os.fstat(descriptor).st_size - os.lseek(descriptor, 0, os.SEEK_CUR))
    pieces = []
    while length:
        piece = os.read(descriptor, length)
        if not piece:
            break
        pieces.append(piece)
        length -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]
