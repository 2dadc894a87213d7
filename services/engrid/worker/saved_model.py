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
class SavedModel:
    """A checkpoint that holds a model, and those whose rows it changes."""

    checkpoints: Checkpoints
    chain: Sequence[Manifest]
    model: ModelConfig
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
    def tables(self) -> dict[int, TableSpec]:
        """Of each Engram layer, in their order."""
        return {spec.layer: spec for spec in sorted(self.manifest.tables.values(), key=lambda spec: spec.layer)}

    @property
    def version(self) -> str:
        """Names the rows in sealed tables: the step, and enough of a digest of all bytes that no other has it."""
        digests = "".join(manifest.digest for manifest in self.chain)
        return f"{self.step}-{hashlib.sha256(digests.encode()).hexdigest()[:16]}"

    def read_file(self, name: str) -> bytes:
        """Raises CheckpointError, which names the file, where it is missing or damaged."""
        return self.checkpoints.read_file(self.manifest, name)


def open_checkpoint(path: Path) -> SavedModel:
    """path: of one checkpoint, or of a folder of them, whose newest complete one with a model is taken.

    Raises CheckpointError where there is none, or one of another format.
    """
    path = path.resolve()
    one = (path / MANIFEST).exists()
    if not path.is_dir():
        raise CheckpointMissingError(f"{path} holds no checkpoint; train one, or name another folder")
    checkpoints = Checkpoints(LocalDisk(path.parent if one else path))
    chain = checkpoints.chain(path.name) if one else checkpoints.latest(having=WEIGHTS)
    if not chain:
        raise CheckpointMissingError(f"{path} holds no checkpoint of a model; train one, or name another folder")
    manifest = chain[-1]
    if one and path.name != manifest.name:
        raise CheckpointError(f"{path} holds checkpoint {manifest.name}; give the folder that name")
    try:
        model, run = ModelConfig.from_json(manifest.about["model"]), str(manifest.about["run"])
    except KeyError as error:
        raise CheckpointError(f"checkpoint {manifest.name} holds rows alone, no model; name another one") from error
    except (ValueError, TypeError) as error:
        raise CheckpointDamagedError(f"{path}: {manifest.name} is not of a model we know: {error}") from error
    return SavedModel(checkpoints, chain, model, run)
