"""The directory as a JSON file, for the processes of one host.

A change takes a lock on a side file, reads directory.json, writes the new content beside it, makes it durable and
renames it into place: readers need no lock, as they see the old file or the new one, and a writer killed at any point
leaves the old one. The kernel drops the lock of a process that dies. What a killed writer left beside the file is
overwritten by the next writer and never read.

    directory.json       {"host": str | null, "shards": {name: record}, "placement": {...} | null}
    directory.json.tmp   being written
    directory.lock       locked by the writer; always empty
    checkpoint-folders   paths, a JSON string a line: where shards may read and write checkpoints besides this folder

The file records the host it is used on. A second host is refused, also one that sees the file over a network file
system: locks, renames and process ids do not reach across hosts.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from engrid.tables import check_keys

from .errors import (
    CorruptDirectoryError,
    DirectoryUnavailableError,
    EpochConflictError,
    OtherHostError,
    ShardUnknownError,
)
from .placement import Placement
from .records import ShardRecord, check_epoch_rises, check_name_is_free, check_registered, this_host

_LOCK_SECONDS = 10.0
_LOCK_POLL_SECONDS = 0.005
_FOLDERS = "checkpoint-folders"
_MOST_FOLDERS, _MOST_FOLDERS_BYTES = 1000, 8 << 20


@dataclass(frozen=True, kw_only=True)
class _Content:
    host: str | None = None
    shards: dict[str, ShardRecord] = field(default_factory=dict)
    placement: Placement | None = None


class FileDirectory:
    """`directory.json` in the folder `path`, which is made by the first change."""

    def __init__(self, path: Path) -> None:
        self._folder = path
        self._file = path / "directory.json"

    @property
    def folder(self) -> Path:
        """It lies in here."""
        return self._folder

    def allow_folder(self, folder: Path) -> None:
        """Lets the shards of this directory read and write checkpoints there: to write here is this user's alone, so it says
        no more than that user may do. Raises DirectoryUnavailableError."""
        real = folder.resolve()
        with self._locked():
            allowed = self.allowed_folders()
            if real in allowed:
                return
            if len(allowed) >= _MOST_FOLDERS:
                allowed = [each for each in allowed if each.is_dir()][-_MOST_FOLDERS // 2 :]
            beside = self._folder / f"{_FOLDERS}.tmp"
            beside.unlink(missing_ok=True)
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(str(each))}\n" for each in (*allowed, real))
            beside.replace(self._folder / _FOLDERS)

    def allowed_folders(self) -> list[Path]:
        """What was allowed, each as it was then; none where somebody else may write the list."""
        try:
            with (self._folder / _FOLDERS).open(encoding="utf-8") as file:
                status = os.fstat(file.fileno())
                if status.st_uid not in (0, os.getuid()) or status.st_mode & 0o022:
                    return []
                found = [Path(json.loads(line)) for line in file.read(_MOST_FOLDERS_BYTES).splitlines()]
        except (OSError, ValueError, TypeError):
            return []
        return [folder for folder in found if folder.is_absolute() and folder != Path("/")]

    def register(self, record: ShardRecord) -> None:
        """See Directory.register."""
        here = this_host()
        with self._locked():
            content = self._read()
            if content.host not in (None, here) or record.host != here:
                raise OtherHostError(
                    f"{self._file} serves one host, {content.host or here}, and shard {record.name} is on {record.host}"
                    f" (this process: {here}); use --redis for several hosts,"
                    " or clear the directory if this host was renamed or restarted"
                )
            check_name_is_free(str(self._file), content.shards.get(record.name), record)
            self._write(replace(content, host=here, shards=content.shards | {record.name: record}))

    def unregister(self, name: str) -> None:
        """See Directory.unregister."""
        with self._locked():
            content = self._read()
            if name not in content.shards:
                raise ShardUnknownError(f"no shard {name} in {self._file}; known are {sorted(content.shards)}")
            shards = {each: record for each, record in content.shards.items() if each != name}
            self._write(replace(content, shards=shards))

    def shards(self) -> dict[str, ShardRecord]:
        """See Directory.shards."""
        return self._read().shards

    def placement(self) -> Placement | None:
        """See Directory.placement."""
        return self._read().placement

    def publish(self, placement: Placement, *, expected_epoch: int | None) -> None:
        """See Directory.publish."""
        check_epoch_rises(placement, expected_epoch)
        with self._locked():
            content = self._read()
            actual = content.placement.epoch if content.placement else None
            if actual != expected_epoch:
                raise EpochConflictError(str(self._file), expected_epoch, actual)
            self._write(replace(content, placement=placement))

    def clear(self, *, registered: Mapping[str, ShardRecord] | None = None) -> None:
        """See Directory.clear. A file that cannot be read as a directory is replaced too where nothing is expected."""
        with self._locked():
            if registered is not None:
                check_registered(str(self._file), self._read().shards, registered)
            self._write(_Content())

    def close(self) -> None:
        """See Directory.close; there is nothing to release."""

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self._folder / "directory.lock"
        deadline = time.monotonic() + _LOCK_SECONDS
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise DirectoryUnavailableError(f"cannot open {lock}: {error}; make the folder writable") from error
        try:
            while not _try_lock(descriptor):
                if time.monotonic() > deadline:
                    raise DirectoryUnavailableError(
                        f"{lock} was held for {_LOCK_SECONDS:g} s; a process that changes the directory hangs: stop it"
                    )
                time.sleep(_LOCK_POLL_SECONDS)
            yield
        finally:
            os.close(descriptor)

    def _read(self) -> _Content:
        try:
            text = self._file.read_bytes()
        except FileNotFoundError:
            return _Content()
        except OSError as error:
            raise DirectoryUnavailableError(f"cannot read {self._file}: {error}") from error
        try:
            values = json.loads(text)
            check_keys("directory", values, {"host", "shards", "placement"})
            return _Content(
                host=values["host"],
                shards={name: ShardRecord.from_json(record) for name, record in dict(values["shards"]).items()},
                placement=None if values["placement"] is None else Placement.from_json(values["placement"]),
            )
        except (ValueError, TypeError) as error:
            raise CorruptDirectoryError(f"{self._file} is no directory: {error}; clear it") from error

    def _write(self, content: _Content) -> None:
        values = {
            "host": content.host,
            "shards": {name: record.to_json() for name, record in content.shards.items()},
            "placement": None if content.placement is None else content.placement.to_json(),
        }
        beside = self._folder / "directory.json.tmp"
        try:
            with beside.open("wb") as file:
                file.write(json.dumps(values, indent=1).encode())
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._file)
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise DirectoryUnavailableError(f"cannot write {self._file}: {error}") from error


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
