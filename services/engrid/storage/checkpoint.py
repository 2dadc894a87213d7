"""The checkpoints of a run, in one folder that all its shards and workers share.

    step-00000200/                  manifest.json  tables/...  model.safetensors ...      full
    step-00000250/                  the same, of the rows touched since its base          incremental
    step-00000240.attempt-2/        the run resumed from 200 and went on
    .step-00000300.TOKEN.partial/   being written, or left by a process that died
    .held.step-00000200             an empty file: somebody serves this one, so `keep` leaves it

Shards and worker write into the partial folder, each forcing its own files to disk. Then one process writes the manifest
and publishes: files and names durable first, then the rename, then the name of the whole. So a name without a dot is a
whole checkpoint, after any crash, and `latest` needs to read manifests alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from engrid.tables import RowTable

from .disk import Disk
from .errors import CheckpointDamagedError, CheckpointError, CheckpointMissingError
from .manifest import CHECKPOINT_NAME, Manifest, WorkerFile
from .partition import Array, restore

MANIFEST = "manifest.json"
_HELD = ".held."
_READ_BYTES = 8 << 20
_TOKEN = re.compile(r"[A-Za-z0-9-]+")


@dataclass(frozen=True)
class Checkpoints:
    """The folder `disk` has as its root. Nothing is cached: processes share it."""

    disk: Disk

    # -- writing

    def begin(self, name: str, token: str) -> str:
        """Makes the folder to write checkpoint `name` into, and returns its path.

        token: told apart from other tries at the same checkpoint by it, whose writers may not all be dead.
        """
        if not CHECKPOINT_NAME.fullmatch(name) or not _TOKEN.fullmatch(token):
            raise ValueError(
                f"checkpoint {name!r}, token {token!r}; give a checkpoint_name, and letters, digits and '-'"
            )
        folder = f".{name}.{token}.partial"
        self.disk.make_folder(folder)
        self.disk.make_folder(f"{folder}/tables")
        return folder

    def write_file(self, folder: str, name: str, content: bytes) -> WorkerFile:
        """A whole file of the worker's, forced to disk; its name is forced when the checkpoint is published."""
        file = self.disk.create(f"{folder}/{name}")
        try:
            file.write([content])
            file.sync()
        finally:
            file.close()
        return WorkerFile(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def publish(self, folder: str, manifest: Manifest) -> None:
        """Makes what was written into `folder` the checkpoint `manifest.name`, at once and durably.

        Raises CheckpointError where a file is not there in its size, the base is missing, or the name is taken.
        """
        for path, (size, _) in manifest.sha256s().items():
            if not self.disk.exists(f"{folder}/{path}") or self.disk.size(f"{folder}/{path}") != size:
                raise CheckpointError(f"{folder}/{path} is not there with {size} bytes; nothing was published")
        if manifest.base:
            self.read(manifest.base)
        if self.disk.exists(manifest.name):
            raise CheckpointError(f"checkpoint {manifest.name} exists already; nothing was published")
        self.write_file(folder, MANIFEST, manifest.to_bytes())
        self.disk.sync_folder(folder)
        self.disk.rename(folder, manifest.name)
        self.disk.sync_folder("")

    def claim_attempt(self, least: int) -> int:
        """An attempt from `least` on that nobody else has claimed here, now or before: two that resume get two."""
        attempt = least
        while True:
            try:
                self.disk.create(f".attempt-{attempt}").close()
            except FileExistsError:
                attempt += 1
            else:
                self.disk.sync_folder("")
                return attempt

    # -- reading

    def names(self) -> list[str]:
        """Of all checkpoints, oldest first: by attempt, then by step."""
        found = [match for match in map(CHECKPOINT_NAME.fullmatch, self.disk.names("")) if match]
        return [match[0] for match in sorted(found, key=lambda match: (int(match[2] or 1), int(match[1])))]

    def read(self, name: str) -> Manifest:
        """Raises CheckpointMissingError or CheckpointDamagedError."""
        path = f"{name}/{MANIFEST}"
        if "/" in name or name in ("", ".", "..") or not self.disk.exists(path):  # it lies in our folder, or not at all
            known = ", ".join(self.names()) or "none"
            raise CheckpointMissingError(f"no checkpoint {name}; there are: {known}")
        try:
            raw = self.disk.read(path)
        except FileNotFoundError as error:
            raise CheckpointMissingError(f"checkpoint {name} has just been removed") from error
        except OSError as error:
            raise CheckpointDamagedError(f"{path} cannot be read: {error}", [path]) from error
        return Manifest.from_bytes(raw, path)

    def chain(self, name: str) -> list[Manifest]:
        """The manifests to restore from, in this order: a full one, then those that change it, up to `name`."""
        found = [self.read(name)]
        while found[-1].base:
            base = self.read(found[-1].base)
            if base.order >= found[-1].order:
                raise CheckpointError(f"checkpoint {found[-1].name} has base {base.name}, which is not older")
            found.append(base)
        return found[::-1]

    def latest(self, having: str = "") -> list[Manifest]:
        """The chain of the newest checkpoint that is complete with its bases; [] where there is none.

        having: a file of the worker's that it must hold. Looks at manifests alone; damage inside of files shows in
        `verify` and when they are restored.
        """
        return next((chain for chain in self._complete() if not having or having in chain[-1].files), [])

    def _complete(self) -> Iterator[list[Manifest]]:
        """The chain of each complete checkpoint, newest first."""
        for name in reversed(self.names()):
            try:
                yield self.chain(name)
            except CheckpointError:
                continue

    def verify(self, name: str) -> list[str]:
        """Reads every file of a checkpoint and of its bases; returns what is wrong, a line per file."""
        problems: list[str] = []
        while name:
            try:
                manifest = self.read(name)
            except CheckpointError as error:
                return [*problems, str(error)]
            problems += self._damaged_files(manifest, manifest.sha256s())
            name = manifest.base
        return problems

    def check_rows(self, chain: list[Manifest]) -> None:
        """Reads the files that rows are served from; raises CheckpointDamagedError, which names those damaged."""
        problems = []
        for manifest in chain:
            wanted = {
                array.path: (array.bytes, array.sha256)
                for saved in manifest.partitions
                for name, array in saved.arrays.items()
                if name in ("rows", "ids")
            }
            problems += self._damaged_files(manifest, wanted)
        if problems:
            raise CheckpointDamagedError(
                f"checkpoint {chain[-1].name} cannot be served: {'; '.join(problems)}; restore the files from a copy",
                [problem.partition(" ")[0] for problem in problems],
            )

    def _damaged_files(self, manifest: Manifest, files: Mapping[str, tuple[int, str]]) -> list[str]:
        problems = []
        for path, (size, sha256) in sorted(files.items()):
            full = f"{manifest.name}/{path}"
            if not self.disk.exists(full):
                problems.append(f"{full} is missing")
            elif self.disk.size(full) != size:
                problems.append(f"{full} has {self.disk.size(full)} bytes, not {size}")
            elif self._sha256(full, size) != sha256:
                problems.append(f"{full} is damaged: its sha256 is not the manifest's")
        return problems

    def _sha256(self, path: str, size: int) -> str:
        digest = hashlib.sha256()
        for start in range(0, size, _READ_BYTES):
            digest.update(self.disk.read(path, start, _READ_BYTES))
        return digest.hexdigest()

    def read_file(self, manifest: Manifest, path: str) -> bytes:
        """A file of the worker's, verified. Raises CheckpointMissingError or CheckpointDamagedError."""
        full = f"{manifest.name}/{path}"
        if path not in manifest.files or not self.disk.exists(full):
            raise CheckpointMissingError(f"checkpoint {manifest.name} holds no {path}")
        content = self.disk.read(full)
        if hashlib.sha256(content).hexdigest() != manifest.files[path].sha256:
            raise CheckpointDamagedError(f"{full} is damaged: its sha256 is not the manifest's", [full])
        return content

    def restore(self, chain: list[Manifest], table: RowTable) -> None:
        """Overwrites the rows of `table` and their state, bit for bit; the table may be any range, cut anew."""
        self.restore_arrays(chain, table.spec.name, table.start, table.stop, table.arrays())
        table.measure()

    def restore_arrays(
        self, chain: list[Manifest], table: str, start: int, stop: int, into: Mapping[str, Array]
    ) -> None:
        """The same into arrays whose first row is row `start` of the table: `rows` alone, where only they are wanted.

        Raises CheckpointDamagedError, naming the file, or CheckpointError; rows may then be restored in part.
        """
        if table not in chain[-1].tables:
            raise CheckpointError(f"checkpoint {chain[-1].name} holds no table {table}")
        for manifest in chain:
            for saved in manifest.partitions:
                if saved.table == table:
                    restore(self.disk, manifest.name, saved, start, stop, into)

    # -- removing

    def hold(self, name: str) -> None:
        """From here on `keep` leaves this checkpoint and its bases, until `release`. Raises OSError."""
        if not self.disk.exists(f"{_HELD}{name}"):
            with suppress(FileExistsError):
                self.disk.create(f"{_HELD}{name}").close()
            self.disk.sync_folder("")

    def release(self, name: str) -> None:
        """Takes back `hold`; one that is not held is none the worse."""
        with suppress(OSError):
            self.disk.remove(f"{_HELD}{name}")

    def keep(self, newest: int) -> list[str]:
        """Removes all but the newest complete checkpoints, those held, and the bases of both; returns the names removed.

        Those with a damaged manifest stay, and are not counted. What only half went before a crash has lost its name
        already, and goes with `clean`; so does what cannot be removed, as a folder of somebody else's in it. Raises
        OSError, once all that can go is gone, where a checkpoint that should go keeps its name.
        """
        if newest < 1:
            raise ValueError(f"newest is {newest}; keep at least one checkpoint")
        chains = list(self._complete())
        held = {name.removeprefix(_HELD) for name in self.disk.names("") if name.startswith(_HELD)}
        stay = [chain for at, chain in enumerate(chains) if at < newest or chain[-1].name in held]
        needed = {manifest.name for chain in stay for manifest in chain}
        old = [chain[-1].name for chain in chains if chain[-1].name not in needed]
        hidden: dict[str, str] = {}
        try:
            for name in old:
                # Newest first, each name durably gone before the next: an increment never outlives its base.
                hidden[name] = self._hidden(name)
                self.disk.rename(name, hidden[name])
                self.disk.sync_folder("")
        finally:
            for folder in hidden.values():
                self._remove(folder)
        return old

    def clean(self) -> None:
        """Removes what unfinished saves and removals left, as far as it can. Not while a checkpoint is being written."""
        for name in self.disk.names(""):
            if name.startswith(".step-") and name.endswith((".partial", ".removed")):
                self._remove(name)

    def _hidden(self, name: str) -> str:
        """What a checkpoint is called while it is removed: a name that nothing left behind has."""
        again = 0
        while self.disk.exists(hidden := f".{name}.{again}.removed" if again else f".{name}.removed"):
            again += 1
        return hidden

    def _remove(self, folder: str) -> None:
        """As much of it as can be removed; folders in it that are not ours stay."""
        with suppress(OSError):
            for name in self.disk.names(folder):
                path = f"{folder}/{name}"
                if name == "tables":
                    self._remove(path)
                else:
                    with suppress(OSError):
                        self.disk.remove(path)
            self.disk.remove(folder)
