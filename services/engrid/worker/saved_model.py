"""A model in a checkpoint: dense weights, their optimizer, tokenizer and configuration beside the rows.

    out/checkpoint/                       of one run; laid out in engrid.storage.checkpoint
        step-00000200/
            manifest.json                 `about` holds the model's and the run's configuration
            model.safetensors             dense weights
            optimizer.safetensors         INDEX.NAME of each parameter's state, in the model's order
            tokenizer.json
            tables/...                    rows and their optimizer state, written by the shards

The order of the data follows from the seed and the step, and training draws nothing else by chance, so the step is the
position in the data and no state of a generator is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engrid.directory import Version
from engrid.model.config import ModelConfig
from engrid.storage.checkpoint import MANIFEST, Checkpoints
from engrid.storage.disk import LocalDisk
from engrid.storage.errors import CheckpointDamagedError, CheckpointError, CheckpointMissingError
from engrid.storage.manifest import Manifest
from engrid.tables import TableSpec

FOLDER = "checkpoint"
"""Of the checkpoints of a run, within its `out`."""
WEIGHTS, OPTIMIZER, TOKENIZER = "model.safetensors", "optimizer.safetensors", "tokenizer.json"


@dataclass(frozen=True)
class SavedRows:
    """A checkpoint, with or without a model, and those whose rows it changes."""

    checkpoints: Checkpoints
    chain: Sequence[Manifest]
    path: Path
    """Of the checkpoint, absolute."""
    run: str
    """Name of the run; its tables carry it."""

    @property
    def manifest(self) -> Manifest:
        """Of the checkpoint itself."""
        return self.chain[-1]

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def specs(self) -> list[TableSpec]:
        """Of its tables, in the order of their layers."""
        return sorted(self.manifest.tables.values(), key=lambda spec: (spec.layer, spec.name))

    @property
    def version(self) -> str:
        """Names the rows in sealed tables: the step, and enough of a digest of all bytes that no other has it."""
        digests = "".join(manifest.digest for manifest in self.chain)
        return f"{self.step}-{hashlib.sha256(digests.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class SavedModel(SavedRows):
    """A checkpoint that holds a model."""

    model: ModelConfig

    @property
    def model_name(self) -> str:
        """Tells the model from all others, those of runs of the same name too."""
        return f"{self.run}@{self.version}"

    @property
    def tables(self) -> dict[int, TableSpec]:
        """Of each Engram layer, in their order."""
        return {spec.layer: spec for spec in self.specs}

    def read_file(self, name: str) -> bytes:
        """Raises CheckpointError, which names the file, where it is missing or damaged."""
        return self.checkpoints.read_file(self.manifest, name)

    def check_goes_on(self, steps: int) -> None:
        """Raises ValueError unless a run of so many steps has some left to do."""
        if self.step >= steps:
            raise ValueError(
                f"run {self.run} is at step {self.step} already, and {steps} steps were asked for; give --steps with more "
                f"than {self.step} to go on"
            )


def open_checkpoint(path: Path) -> SavedModel:
    """path: of one checkpoint, or of a folder of them or the `out` of a run, whose newest complete one with a model is taken.

    Raises CheckpointError where there is none, or one of another format.
    """
    checkpoints, chain, path = _find(path, having=WEIGHTS)
    manifest = chain[-1]
    about = manifest.about
    if WEIGHTS not in manifest.files or "model" not in about or "run" not in about:
        raise CheckpointError(f"checkpoint {manifest.name} holds rows alone, no model; name another one")
    try:
        return SavedModel(checkpoints, chain, path, str(about["run"]), ModelConfig.from_json(about["model"]))
    except (ValueError, TypeError) as error:
        raise CheckpointDamagedError(f"{path}: {manifest.name} is not of a model we know: {error}") from error


def open_rows(path: Path) -> SavedRows:
    """As open_checkpoint, but any checkpoint does, one of rows alone too. Its run is that which its tables are named after."""
    checkpoints, chain, path = _find(path)
    manifest = chain[-1]
    named = {name.partition(".engram.")[0] for name in manifest.tables}
    run = str(manifest.about.get("run") or (named.pop() if len(named) == 1 else manifest.run))
    return SavedRows(checkpoints, chain, path, run)


def open_published(run: str, version: Version) -> SavedModel:
    """The model whose rows a published version holds. Raises CheckpointError where its dense weights are not to be found."""
    what = f"version {version.name} of run {run}"
    if not version.checkpoint:
        raise CheckpointMissingError(
            f"{what} was published without a checkpoint, so it has no dense weights; publish one"
        )
    path = Path(version.checkpoint)
    try:
        saved = open_checkpoint(path)
    except CheckpointMissingError as error:
        raise CheckpointMissingError(
            f"{what} was published from {path}, which is not there any more, so its dense weights are lost; publish "
            "another checkpoint, or go back to an earlier version (engrid versions --rollback)"
        ) from error
    except CheckpointError as error:
        raise CheckpointError(f"{what} cannot be generated with: {error}") from error
    if saved.version != version.name:
        raise CheckpointError(
            f"{what} was published from {path}, which now holds version {saved.version}; publish it, or restore the folder"
        )
    return saved


def _find(path: Path, having: str = "") -> tuple[Checkpoints, list[Manifest], Path]:
    path = path.resolve()
    one = (path / MANIFEST).exists()
    if not path.is_dir():
        raise CheckpointMissingError(f"{path} holds no checkpoint; train one, or name another folder")
    if one:
        name = Manifest.from_bytes((path / MANIFEST).read_bytes(), f"{path.name}/{MANIFEST}").name
        if path.name != name:
            raise CheckpointError(f"{path} holds checkpoint {name}; give the folder that name")
    checkpoints = Checkpoints(LocalDisk(path.parent if one else path))
    chain = checkpoints.chain(path.name) if one else checkpoints.latest(having=having)
    if not chain and not one and (path / FOLDER).is_dir():
        return _find(path / FOLDER, having)  # the --out of a run
    if not chain:
        of_a_model = " of a model" if having else ""
        raise CheckpointMissingError(f"{path} holds no checkpoint{of_a_model}; train one, or name another folder")
    return checkpoints, chain, path if one else path / chain[-1].name
