"""A disk in memory that fails as real ones do, by a seed.

What a power failure leaves of what was not synced is drawn anew for every file and every folder:

    nothing of it | all of it | a first part, the last write of it torn at a random byte |
    any of it, in any order, each write whole or torn; where a lost write leaves a hole: zeros, or noise

A name (made, renamed, removed) survives whole or not at all, and without regard to other names, to the order or to
what is in the file. That is more than a journaling file system loses, and no more than POSIX lets it lose.

Each operation is counted, then handed to `before`, which may raise. `ignore` names the places in our code (`sites`)
whose sync does nothing: the run with a sync removed, to show that the others notice.
"""

import errno
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from engrid.storage.disk import File, Piece

_HARNESS = (__file__, threading.__file__)
_T = TypeVar("_T")


class CrashedError(Exception):
    """The process that asked for this operation is no more. Not an OSError: nothing may handle it."""


@dataclass
class _Change:
    """A write of `data` at `offset`, or a cut to `offset` bytes."""

    offset: int
    data: bytes | None


@dataclass
class _FileNode:
    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pending: list[_Change] = field(default_factory=list)


@dataclass
class _FolderNode:
    entries: "dict[str, _Node]" = field(default_factory=dict)
    durable: "dict[str, _Node]" = field(default_factory=dict)
    pending: "list[dict[str, _Node | None]]" = field(default_factory=list)
    """Each one step: names to what they mean then, None: nothing."""

    def change(self, names: "dict[str, _Node | None]") -> None:
        _apply(self.entries, names)
        self.pending.append(names)


_Node = _FileNode | _FolderNode


def _apply(entries: dict[str, _Node], names: dict[str, _Node | None]) -> None:
    for name, node in names.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


class SimulatedDisk:
    """Disk: see engrid.storage.disk."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.operations = 0
        """Asked for so far, those that failed included; reads too."""
        self.before: Callable[[str, str], None] = lambda operation, path: None
        """Called before each operation with its name and path; what it raises is what the operation raises."""
        self.capacity: int | None = None
        """Most bytes of all files; a write beyond fills what is left and raises ENOSPC."""
        self.read_only = False
        """Every change raises EROFS."""
        self.fail: dict[int, int] = {}
        """Number of an operation (the first is 1) to the errno it raises."""
        self.ignore: set[str] = set()
        """Sites whose sync does nothing."""
        self.sites: Counter[str] = Counter()
        """Syncs that did something or would have, by "file:function:line operation" of the code that asked."""
        self._root = _FolderNode()
        self._lock = threading.RLock()
        self._crashed = False

    # -- what fails

    def crash(self) -> "SimulatedDisk":
        """Power failure: the disk as the next process finds it, without faults. This one serves nobody any more."""
        with self._lock:
            self._crashed = True
            after = SimulatedDisk(self.random.getrandbits(32))
            after._root = self._survive_folder(self._root, {})
            return after

    def flip(self, path: str, byte: int, bit: int) -> None:
        """Damages one bit of a file, unnoticed."""
        node = self._file(path)
        node.data[byte] ^= 1 << bit
        node.durable = bytes(node.data)
        node.pending.clear()

    def used(self) -> int:
        """Bytes of all files."""
        return _bytes_under(self._root)

    def _survive_folder(self, folder: _FolderNode, seen: dict[int, _Node]) -> _FolderNode:
        entries = dict(folder.durable)
        for names in self._drawn(folder.pending)[0]:
            _apply(entries, names)
        after = _FolderNode()
        for name, node in sorted(entries.items()):
            if id(node) not in seen:
                seen[id(node)] = (
                    self._survive_file(node) if isinstance(node, _FileNode) else self._survive_folder(node, seen)
                )
            after.entries[name] = after.durable[name] = seen[id(node)]
        return after

    def _survive_file(self, file: _FileNode) -> _FileNode:
        data = bytearray(file.durable)
        changes, tear = self._drawn(file.pending)
        noise = self.random.random() < 0.3
        for index, change in enumerate(changes):
            if change.data is None:
                del data[change.offset :]
                continue
            start, stop = change.offset, change.offset + len(change.data)
            if tear == "each" or (tear == "last" and index == len(changes) - 1):
                cut = self.random.randint(start, stop)
                start, stop = (start, cut) if tear == "last" or self.random.random() < 0.5 else (cut, stop)
            if stop > start:
                hole = max(0, start - len(data))
                data += self.random.randbytes(hole) if noise else bytes(hole)
                data[start:stop] = change.data[start - change.offset : stop - change.offset]
        return _FileNode(data, bytes(data))

    def _drawn(self, pending: list[_T]) -> tuple[list[_T], str]:
        """What survives, in order, and which of its writes may be torn: none, last, each."""
        draw = self.random.random()
        if draw < 0.2:
            return [], "none"
        if draw < 0.35:
            return list(pending), "none"
        if draw < 0.65:
            return pending[: self.random.randint(0, len(pending))], "last"
        return [change for change in pending if self.random.random() < 0.5], self.random.choice(("none", "each"))

    # -- Disk

    def make_folder(self, path: str) -> None:
        with self._step("make_folder", path, changes=True):
            folder, name = self._parent(path)
            if name and name not in folder.entries:
                folder.change({name: _FolderNode()})
            elif name and isinstance(folder.entries[name], _FileNode):
                raise _error(errno.EEXIST, path)

    def names(self, folder: str) -> list[str]:
        with self._step("names", folder):
            return sorted(self._folder(folder).entries)

    def exists(self, path: str) -> bool:
        with self._step("exists", path):
            try:
                self._node(path)
            except FileNotFoundError:
                return False
            return True

    def size(self, path: str) -> int:
        with self._step("size", path):
            return len(self._file(path).data)

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        with self._step("read", path):
            data = self._file(path).data
            return bytes(data[start : len(data) if length is None else start + length])

    def create(self, path: str) -> File:
        with self._step("create", path, changes=True):
            folder, name = self._parent(path)
            if name in folder.entries:
                raise _error(errno.EEXIST, path)
            node = _FileNode()
            folder.change({name: node})
            return _SimulatedFile(self, path, node)

    def open(self, path: str) -> File:
        with self._step("open", path, changes=True):
            return _SimulatedFile(self, path, self._file(path))

    def rename(self, old: str, new: str) -> None:
        with self._step("rename", old, changes=True):
            folder, name = self._parent(old)
            other, new_name = self._parent(new)
            assert folder is other, f"{old} -> {new}: a rename across folders is not one step to every disk"
            node, replaced = self._node(old), folder.entries.get(new_name)
            if isinstance(replaced, _FolderNode):
                if isinstance(node, _FileNode):
                    raise _error(errno.EISDIR, new)
                if replaced.entries:
                    raise _error(errno.ENOTEMPTY, new)
            elif replaced is not None and isinstance(node, _FolderNode):
                raise _error(errno.ENOTDIR, new)
            folder.change({name: None, new_name: node})

    def remove(self, path: str) -> None:
        with self._step("remove", path, changes=True):
            folder, name = self._parent(path)
            node = self._node(path)
            if isinstance(node, _FolderNode) and node.entries:
                raise _error(errno.ENOTEMPTY, path)
            folder.change({name: None})

    def sync_folder(self, folder: str) -> None:
        with self._step("sync_folder", folder):
            node = self._folder(folder)
            if self._keeps("sync_folder", bool(node.pending)):
                node.durable = dict(node.entries)
                node.pending.clear()

    def free_bytes(self) -> int:
        with self._step("free_bytes", ""):
            return 1 << 40 if self.capacity is None else max(0, self.capacity - self.used())

    # -- the same for files

    def _write(self, path: str, node: _FileNode, pieces: Sequence[Piece]) -> None:
        with self._step("write", path, changes=True):
            data = b"".join(pieces)
            room = len(data) if self.capacity is None else max(0, self.capacity - self.used())
            if data[:room]:
                node.pending.append(_Change(len(node.data), data[:room]))
                node.data += data[:room]
            if room < len(data):
                raise _error(errno.ENOSPC, path)

    def _truncate(self, path: str, node: _FileNode, size: int) -> None:
        with self._step("truncate", path, changes=True):
            assert size <= len(node.data), f"{path}: a cut to {size} bytes would lengthen it"
            node.pending.append(_Change(size, None))
            del node.data[size:]

    def _sync(self, path: str, node: _FileNode) -> None:
        with self._step("sync", path):
            if self._keeps("sync", bool(node.pending)):
                node.durable = bytes(node.data)
                node.pending.clear()

    # --

    def _step(self, operation: str, path: str, *, changes: bool = False) -> threading.RLock:
        with self._lock:
            if self._crashed:
                raise CrashedError(f"{operation} of {path!r} after the crash")
            self.operations += 1
            number = self.operations
        self.before(operation, path)
        if number in self.fail:
            raise _error(self.fail[number], path)
        if changes and self.read_only:
            raise _error(errno.EROFS, path)
        return self._lock

    def _keeps(self, operation: str, pending: bool) -> bool:
        if not pending:
            return False
        frame = sys._getframe(1)
        while frame.f_code.co_filename in _HARNESS:
            assert frame.f_back is not None
            frame = frame.f_back
        code = frame.f_code
        site = f"{Path(code.co_filename).name}:{code.co_name}:{frame.f_lineno} {operation}"
        self.sites[site] += 1
        return site not in self.ignore

    def _node(self, path: str) -> _Node:
        node: _Node = self._root
        for name in path.split("/") if path else []:
            if not isinstance(node, _FolderNode):
                raise _error(errno.ENOTDIR, path)
            if name not in node.entries:
                raise _error(errno.ENOENT, path)
            node = node.entries[name]
        return node

    def _file(self, path: str) -> _FileNode:
        node = self._node(path)
        if isinstance(node, _FolderNode):
            raise _error(errno.EISDIR, path)
        return node

    def _folder(self, path: str) -> _FolderNode:
        node = self._node(path)
        if isinstance(node, _FileNode):
            raise _error(errno.ENOTDIR, path)
        return node

    def _parent(self, path: str) -> tuple[_FolderNode, str]:
        folder, _, name = path.rpartition("/")
        return self._folder(folder), name


class _SimulatedFile:
    def __init__(self, disk: SimulatedDisk, path: str, node: _FileNode) -> None:
        self.path = path
        self._disk = disk
        self._node = node

    @property
    def size(self) -> int:
        return len(self._node.data)

    def write(self, pieces: Sequence[Piece]) -> None:
        self._disk._write(self.path, self._node, pieces)

    def sync(self) -> None:
        self._disk._sync(self.path, self._node)

    def truncate(self, size: int) -> None:
        self._disk._truncate(self.path, self._node, size)

    def close(self) -> None:
        pass


def _bytes_under(folder: _FolderNode) -> int:
    return sum(
        len(node.data) if isinstance(node, _FileNode) else _bytes_under(node) for node in folder.entries.values()
    )


def _error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)
