"""How much memory this process may take: the machine's, or less where a control group limits us.

    /proc/meminfo           MemTotal, MemAvailable
    /proc/self/cgroup       our groups:  0::/a/b (version 2)      4:memory:/a/b (version 1)
    /proc/self/mountinfo    where their trees are mounted, and which part of a tree a container sees

A group's limit holds for all below it, so our own group and all above it are asked, as far up as the mount shows. What a
group uses includes the page cache of every file it has read; the kernel drops what of it is inactive before it refuses us
anything, so that counts as free. Version 1 says "no limit" as a number near 2**63.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class Memory:
    """In bytes."""

    total: int
    """The most this process could ever have."""
    free: int
    """What it may still take."""


@dataclass(frozen=True)
class _Files:
    """Names in one version of control groups."""

    limits: tuple[str, ...]
    used: str
    cache: str
    """Field of memory.stat: page cache that is dropped when memory is short."""


_VERSION_1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Files(("memory.max", "memory.high"), "memory.current", "inactive_file")


def memory(root: Path = Path("/")) -> Memory:
    """root: where proc and sys lie, which tests make their own of."""
    machine = _fields((root / "proc/meminfo").read_text(encoding="ascii", errors="replace"), ":")
    total, free = 1024 * machine["MemTotal"], 1024 * machine["MemAvailable"]
    for files, folder in _groups(root):
        found = [limit for name in files.limits if (limit := _number(folder / name)) is not None]
        if not found or min(found) >= _NO_LIMIT:
            continue
        limit, used = min(found), _number(folder / files.used) or 0
        cache = _fields(_text(folder / "memory.stat"), " ").get(files.cache, 0)
        total = min(total, limit)
        free = min(free, limit - max(0, used - cache))
    return Memory(total, max(0, free))


def _groups(root: Path) -> Iterator[tuple[_Files, Path]]:
    """The folders of our group and of those above it, in each version there is."""
    ours: dict[_Files, str] = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            ours[_VERSION_2] = path
        elif "memory" in controllers.split(","):
            ours[_VERSION_1] = path
    for files, path in ours.items():
        for shown, mounted in _mounts(root, files):
            # A container sees its own group as the root of the tree, be it by a mount of a part or by a namespace.
            inside = PurePosixPath(path)
            below = inside.relative_to(shown) if inside.is_relative_to(shown) else PurePosixPath()
            at = mounted / below if ".." not in below.parts and (mounted / below).is_dir() else mounted
            while True:
                yield files, at
                if at == mounted:
                    break
                at = at.parent


def _mounts(root: Path, files: _Files) -> Iterator[tuple[str, Path]]:
    """Of trees with the memory controller: which part of the tree is shown, and where."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        mount, kind = left.split(), right.split()
        if len(mount) < 5 or len(kind) < 3:
            continue
        if (files is _VERSION_2 and kind[0] == "cgroup2") or (
            files is _VERSION_1 and kind[0] == "cgroup" and "memory" in kind[2].split(",")
        ):
            yield mount[3], root / mount[4].lstrip("/")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """None where there is no such file, or it says "max"."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _fields(text: str, separator: str) -> dict[str, int]:
    """Lines of a name, the separator and a number."""
    pairs = (line.partition(separator) for line in text.splitlines())
    return {name: int(value.split()[0]) for name, _, value in pairs if value.split() and value.split()[0].isdigit()}


def gib(size: int) -> str:
    """A number of bytes, for messages."""
    return f"{size / (1 << 30):.4g} GiB"
