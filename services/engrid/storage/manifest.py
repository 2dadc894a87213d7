"""What a checkpoint says of itself: whose it is, which files it has, and what it needs of the one before it.

A digest covers all of it: the files' checksums are only as good as the place they stand in, and one wrong digit of a
table's seed would make every row another n-gram's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from engrid.tables import TableSpec, check_int, check_keys

from .errors import CheckpointDamagedError, CheckpointError
from .fields import check_hex, check_list, check_object, check_path, check_text
from .partition import SavedPartition

FORMAT = 2
CHECKPOINT_NAME = re.compile(r"step-(\d{8,18})(?:\.attempt-(\d{1,18}))?")
"""Name of a checkpoint's folder."""


@dataclass(frozen=True, kw_only=True)
class WorkerFile:
    """A file of the worker's: dense weights, their optimizer, tokenizer."""

    bytes: int
    sha256: str
    """In hex."""

    def __post_init__(self) -> None:
        """Raises ValueError for what no file of ours is."""
        check_int("bytes", self.bytes, 0, 1 << 63)
        check_hex("sha256", self.sha256)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One checkpoint: all tables and the worker's files, after one step."""

    run: str
    """Identity of the run, as pushes carry it."""
    attempt: int
    """The one that made it; whoever resumes from it begins a later one."""
    step: int
    base: str
    """Name of the checkpoint whose rows this one changes; "" where it holds all."""
    tables: Mapping[str, TableSpec]
    partitions: Sequence[SavedPartition]
    files: Mapping[str, WorkerFile] = field(default_factory=dict)
    """By path within the checkpoint."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """The worker's own: the model's configuration, the position in the data. JSON, not looked into."""

    def __post_init__(self) -> None:
        """Raises CheckpointError where tables and partitions do not make a whole, ValueError where a field is of no use."""
        self._check_fields()
        self._check_whole()

    def _check_fields(self) -> None:
        for name in ("run", "base"):
            check_text(name, getattr(self, name))
        for name in ("attempt", "step"):
            check_int(name, getattr(self, name), 0, 1 << 63)
        if self.base and not CHECKPOINT_NAME.fullmatch(self.base):
            raise ValueError(f"base is {self.base!r}; give the name of a checkpoint, or none")
        for name, spec in self.tables.items():
            if spec.name != name:
                raise ValueError(f"table {spec.name} is filed under {name!r}; use its own name")
        for path in self.files:
            check_path("file", path)

    def _check_whole(self) -> None:
        for saved in self.partitions:
            where = f"{saved.table}[{saved.index}]"
            if saved.table not in self.tables:
                raise CheckpointError(f"{where} is saved, but the checkpoint has no table {saved.table}")
            if saved.step != self.step:
                raise CheckpointError(f"{where} is at step {saved.step}, the checkpoint at step {self.step}")
            if saved.base not in ("", self.base):
                raise CheckpointError(f"{where} changes checkpoint {saved.base}, not {self.base or 'none'}")
        for name, spec in self.tables.items():
            at = 0
            for start, stop in sorted((saved.start, saved.stop) for saved in self.partitions if saved.table == name):
                if start != at:
                    raise CheckpointError(f"rows of table {name} around {min(start, at)} are not saved once each")
                at = stop
            if at != spec.rows:
                raise CheckpointError(f"rows from {at} on of table {name}, of {spec.rows}, are not saved")

    @property
    def name(self) -> str:
        """Of its folder."""
        return checkpoint_name(self.step, self.attempt)

    @property
    def order(self) -> tuple[int, int]:
        """Rises from checkpoint to checkpoint of a run: a later attempt may have begun at an earlier step."""
        return self.attempt, self.step

    def sha256s(self) -> dict[str, tuple[int, str]]:
        """Size and sha256 of every file but the manifest, by path within the checkpoint."""
        arrays = [array for saved in self.partitions for array in saved.arrays.values()]
        saved = {array.path: (array.bytes, array.sha256) for array in arrays}
        return saved | {path: (file.bytes, file.sha256) for path, file in self.files.items()}

    @property
    def digest(self) -> str:
        """Of all it says, the sums of its files included: no other checkpoint has it."""
        return _digest(self._plain())

    def to_bytes(self) -> bytes:
        """Return what `from_bytes` reads: JSON."""
        return json.dumps(self._plain() | {"digest": self.digest}).encode()

    def _plain(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("run", "attempt", "step", "base")} | {
            "format": FORMAT,
            "tables": {name: spec.to_json() for name, spec in self.tables.items()},
            "partitions": [saved.to_json() for saved in self.partitions],
            "files": {path: {"bytes": file.bytes, "sha256": file.sha256} for path, file in self.files.items()},
            "about": dict(self.about),
        }

    @classmethod
    def from_bytes(cls, raw: bytes, path: str) -> Self:
        """path: for the message. Raises CheckpointDamagedError, or CheckpointError for one of another format."""
        try:
            values = json.loads(raw)
            if values["format"] != FORMAT:
                raise CheckpointError(f"{path} has format {values['format']}; this version reads {FORMAT}")
            digest = values.pop("digest")
            if digest != _digest(values):
                raise CheckpointDamagedError(
                    f"{path} is damaged: its contents do not match its digest; restore it from a copy", [path]
                )
            del values["format"]
            check_keys("manifest", values, {field.name for field in fields(cls)})
            check_list("partitions", values["partitions"])
            for name in ("tables", "files", "about"):
                check_object(name, values[name])
            return cls(
                **values
                | {
                    "tables": {name: TableSpec.from_json(spec) for name, spec in values["tables"].items()},
                    "partitions": [SavedPartition.from_json(saved) for saved in values["partitions"]],
                    "files": {path: WorkerFile(**file) for path, file in values["files"].items()},
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointDamagedError(f"{path} is not a manifest: {error}", [path]) from error


def checkpoint_name(step: int, attempt: int) -> str:
    """Folder of a checkpoint: of one run, attempt and step there is one."""
    return f"step-{step:08d}" if attempt == 1 else f"step-{step:08d}.attempt-{attempt}"


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
