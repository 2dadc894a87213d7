"""What a shard tells the directory about itself, and what a directory can do: register shards, publish placements."""

import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, Self

from engrid.tables import check_keys

from .errors import DirectoryChangedError, ShardNameTakenError
from .placement import Placement


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """A shard as registered: who it is, where it answers, and the process that is it."""

    name: str
    """Unique in the directory; placements name shards by it."""

    address: str
    """host:port of its gRPC server."""

    host: str
    """`this_host()` of its process."""

    pid: int
    """Process id on that host."""

    def __post_init__(self) -> None:
        for field in ("name", "address", "host"):
            if not isinstance(getattr(self, field), str) or not getattr(self, field):
                raise ValueError(f"{field} of a shard is {getattr(self, field)!r}; give text")
        if type(self.pid) is not int or self.pid < 1:
            raise ValueError(f"pid of shard {self.name} is {self.pid!r}; give a process id")

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Raises ValueError for unknown or missing keys and for values of another type."""
        check_keys("shard", values, {field.name for field in fields(cls)})
        return cls(**values)


class Directory(Protocol):
    """Where shards register and the placement lives. Each call reads or writes the store; nothing is cached.

    Every method raises DirectoryUnavailableError when the store cannot be reached, and CorruptDirectoryError when it
    holds something else than a directory.
    """

    def register(self, record: ShardRecord) -> None:
        """Add or replace the record of that name.

        Raises ShardNameTakenError if the name is registered at another address and that process is not known to be
        dead, OtherHostError if the store serves one host only and the record is of another.
        """

    def unregister(self, name: str) -> None:
        """Remove a record; raises ShardUnknownError if there is none. The placement stays as it is."""

    def shards(self) -> dict[str, ShardRecord]:
        """Return the registered shards by name, living or not."""

    def placement(self) -> Placement | None:
        """Return the placement published last; None before the first."""

    def publish(self, placement: Placement, *, expected_epoch: int | None) -> None:
        """Put `placement` in place of the one of `expected_epoch` (None: of no placement), atomically.

        Of several publishers that expect the same epoch exactly one succeeds; the others get EpochConflictError.
        Raises ValueError unless the epoch rises.
        """

    def clear(self, *, registered: Mapping[str, ShardRecord] | None = None) -> None:
        """Forget all shards and the placement. The next publisher expects no placement.

        registered: only while exactly these shards are registered, else DirectoryChangedError; None: whatever is.
        """

    def close(self) -> None:
        """Release connections; the directory must not be used after."""


def this_host() -> str:
    """Return what tells this machine and its present boot from all others: its name and the kernel's boot id."""
    return f"{socket.gethostname()}/{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()}"


def check_name_is_free(where: str, old: ShardRecord | None, new: ShardRecord) -> None:
    """Raise ShardNameTakenError if `old` has the name at another address and may still live."""
    if old is None or old.address == new.address or (old.host, old.pid) == (new.host, new.pid):
        return
    if old.host != this_host():
        state = f"on host {old.host}, where this process cannot see whether it lives"
    elif process_lives(old.pid):
        state = f"by process {old.pid}, which lives"
    else:
        return
    raise ShardNameTakenError(
        f"shard name {old.name} is taken in {where} at {old.address} {state}; choose another name for {new.address},"
        f" or stop that shard and unregister {old.name}"
    )


def check_registered(where: str, found: Mapping[str, ShardRecord], expected: Mapping[str, ShardRecord] | None) -> None:
    """Raise DirectoryChangedError unless the shards found are those expected; None expects nothing."""
    if expected is not None and found != expected:
        others = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise DirectoryChangedError(
            f"shards {', '.join(others)} came to or left {where} meanwhile, so another cluster is being started there;"
            " look at what serves from it (engrid status), or give another directory"
        )


def check_epoch_rises(placement: Placement, expected_epoch: int | None) -> None:
    """Raise ValueError if publishing `placement` after `expected_epoch` would not be a step forward."""
    if expected_epoch is not None and placement.epoch <= expected_epoch:
        raise ValueError(f"placement has epoch {placement.epoch}; give one above the expected epoch {expected_epoch}")


def process_lives(pid: int) -> bool:
    """Whether a process of this host runs; a zombie, ended but not yet waited for by its parent, does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")
