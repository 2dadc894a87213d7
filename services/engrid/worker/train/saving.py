"""A run's checkpoints: begun between two steps, written while training goes on."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from engrid.client import MemoryClient
from engrid.control.checkpoints import CheckpointSave
from engrid.model.transformer import Transformer
from engrid.rpc.errors import EngridError
from engrid.storage.checkpoint import Checkpoints
from engrid.storage.disk import LocalDisk
from engrid.storage.manifest import Manifest, WorkerFile, checkpoint_name
from engrid.storage.partition import PartitionWriter, SavedPartition
from engrid.tables import RowTable
from engrid.worker.dense import Dense
from engrid.worker.saved_model import TOKENIZER

CHUNK_ROWS = 8192


class _Save(Protocol):
    """A checkpoint begun: of the shards' tables, or of tables in this process."""

    name: str

    def write_file(self, name: str, content: bytes) -> WorkerFile: ...

    def finish(self, files: Mapping[str, WorkerFile], about: Mapping[str, Any]) -> Manifest: ...

    def abandon(self) -> None: ...


class Saver:
    """Saves what one rank trains, and with it the tables of all, one checkpoint at a time."""

    def __init__(
        self,
        folder: Path,
        *,
        run: str,
        attempt: int,
        about: Mapping[str, Any],
        tokenizer: str,
        client: MemoryClient | None,
        tables: Mapping[str, RowTable | None],
        full_every: int,
        keep: int,
        base: str = "",
    ) -> None:
        """tables: by name; those of shards are None. full_every: checkpoints from one with all rows to the next. keep: how
        many stay, and their bases. base: the checkpoint that the run was resumed from."""
        self._folder, self._run, self._attempt = folder, run, attempt
        self._about, self._tokenizer = dict(about), tokenizer
        self._client, self._tables = client, dict(tables)
        self._full_every, self._keep = full_every, keep
        self._base, self._since_full = base, 0 if not base else 1
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._notice = ""
        self.step = 0
        """Of the newest checkpoint saved here."""

    def begin(self, step: int, model: Transformer, optimizer: torch.optim.Optimizer, *, full: bool = False) -> None:
        """Holds everything as it is after `step`; writes it in the background. Waits for the save before, if need be.

        Raises what went wrong with that one, or EngridError or OSError where this one cannot begin: training may go on.
        """
        self.wait()
        base = "" if full or self._since_full >= self._full_every else self._base
        save = self._open(step, base)
        try:
            dense = Dense.copy(model, optimizer)
            thread = threading.Thread(target=self._write, args=(save, dense, base, step), name="engrid checkpoint")
            thread.start()
            self._thread = thread
        except BaseException:
            save.abandon()
            raise

    def wait(self) -> str:
        """Returns once nothing is being saved: the name of the newest checkpoint. Raises what went wrong, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._base

    def close(self) -> None:
        """Waits, and says nothing of what went wrong."""
        with suppress(Exception):
            self.wait()

    def _open(self, step: int, base: str) -> _Save:
        if self._client is not None and self._tables:
            return CheckpointSave(
                self._client,
                self._folder,
                run=self._run,
                attempt=self._attempt,
                step=step,
                tables=list(self._tables),
                base=base,
            )
        return _SaveHere(self._folder, self._run, self._attempt, step, self._tables)

    def take_notice(self) -> str:
        """What went wrong beside the checkpoints themselves, once: old ones that could not be removed."""
        notice, self._notice = self._notice, ""
        return notice

    def _write(self, save: _Save, dense: Dense, base: str, step: int) -> None:
        try:
            try:
                contents = {**dense.files(), TOKENIZER: self._tokenizer.encode()}
                files = {name: save.write_file(name, content) for name, content in contents.items()}
            except BaseException:
                save.abandon()
                raise
            self._base, self.step = save.finish(files, self._about).name, step
            self._since_full = self._since_full + 1 if base else 1
        except Exception as error:  # noqa: BLE001 - whoever waits raises it
            self._error = error
            return
        if self._keep:
            try:
                Checkpoints(LocalDisk(self._folder)).keep(self._keep)
            except (EngridError, OSError) as error:
                self._notice = f"old checkpoints stay: {error}"


class _SaveHere:
    """Tables of this process, or none: written whole before training goes on."""

    def __init__(self, folder: Path, run: str, attempt: int, step: int, tables: Mapping[str, RowTable | None]) -> None:
        self.name = checkpoint_name(step, attempt)
        self._run, self._attempt, self._step = run, attempt, step
        self._checkpoints = Checkpoints(LocalDisk(folder))
        self._partial = self._checkpoints.begin(self.name, uuid.uuid4().hex[:12])
        self._specs = {name: table.spec for name, table in tables.items() if table is not None}
        self._saved = [self._write_table(table) for table in tables.values() if table is not None]

    def write_file(self, name: str, content: bytes) -> WorkerFile:
        return self._checkpoints.write_file(self._partial, name, content)

    def finish(self, files: Mapping[str, WorkerFile], about: Mapping[str, Any]) -> Manifest:
        manifest = Manifest(
            run=self._run,
            attempt=self._attempt,
            step=self._step,
            base="",
            tables=self._specs,
            partitions=self._saved,
            files=files,
            about=about,
        )
        self._checkpoints.publish(self._partial, manifest)
        return manifest

    def abandon(self) -> None:
        """What is written stays in its partial folder."""

    def _write_table(self, table: RowTable) -> SavedPartition:
        arrays, disk = table.arrays(), self._checkpoints.disk
        writer = PartitionWriter(
            disk, self._partial, table=table.spec.name, index=0, like=arrays, rows=len(table), block_rows=CHUNK_ROWS
        )
        try:
            for first in range(0, len(table), CHUNK_ROWS):
                writer.append({name: array[first : first + CHUNK_ROWS] for name, array in arrays.items()})
            return writer.finish(
                start=0, stop=len(table), step=self._step, attempt=self._attempt, watermarks={}, base=""
            )
        finally:
            writer.close()
