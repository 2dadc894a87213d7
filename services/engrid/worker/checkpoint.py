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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from tokenizers import Tokenizer

from engrid.client import MemoryClient, Pin, create_tables, load_partition, spread_placement
from engrid.directory import EpochConflictError, Version
from engrid.model.config import ModelConfig
from engrid.model.transformer import Transformer
from engrid.rpc.errors import BadRequestError, ShardUnavailableError
from engrid.storage.checkpoint import MANIFEST, Checkpoints
from engrid.storage.disk import LocalDisk
from engrid.storage.errors import CheckpointDamagedError, CheckpointError, CheckpointMissingError
from engrid.storage.manifest import Manifest
from engrid.tables import TableSpec

from .corpus import tokenizer_of
from .tables import sealed_spec

FOLDER = "checkpoint"
"""Of the checkpoints of a run, within its `out`."""
WEIGHTS, OPTIMIZER, TOKENIZER = "model.safetensors", "optimizer.safetensors", "tokenizer.json"
READ_BYTES = 64 << 20
"""Rows read at a time when a checkpoint is served."""
SENT_BYTES = 1 << 20
MAKE_ATTEMPTS = 5


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


@dataclass(frozen=True)
class Dense:
    """A copy of all that is trained here, as it was after a step."""

    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]

    @classmethod
    def copy(cls, model: Transformer, optimizer: torch.optim.Optimizer) -> Dense:
        """Made between two steps; training may go on when this returns."""
        state = optimizer.state_dict()["state"]
        return cls(
            {name: _copy(value) for name, value in model.state_dict().items()},
            {f"{index}.{name}": _copy(value) for index, of in state.items() for name, value in of.items()},
        )

    def files(self) -> dict[str, bytes]:
        return {
            WEIGHTS: safetensors.torch.save(dict(self.weights)),
            OPTIMIZER: safetensors.torch.save(dict(self.optimizer)),
        }


def _copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().cpu().contiguous().clone()


def load_dense(saved: SavedModel, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    """Puts weights and optimizer where they were, bit for bit. Raises CheckpointError."""
    _load_weights(saved, model)
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in safetensors.torch.load(saved.read_file(OPTIMIZER)).items():
        index, _, key = name.partition(".")
        found.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})


def load_model(saved: SavedModel, device: str) -> tuple[Transformer, Tokenizer]:
    """Dense weights and tokenizer, checked against the manifest."""
    model = Transformer(saved.model)
    _load_weights(saved, model)
    return model.to(torch.device(device)).eval(), tokenizer_of(saved.read_file(TOKENIZER).decode())


def _load_weights(saved: SavedModel, model: Transformer) -> None:
    weights = safetensors.torch.load(saved.read_file(WEIGHTS))
    expected = model.state_dict()
    wrong = sorted(weights.keys() ^ expected.keys()) or [
        f"{name} {list(value.shape)}, not {list(expected[name].shape)}"
        for name, value in weights.items()
        if value.shape != expected[name].shape
    ]
    if wrong:
        raise CheckpointError(f"{saved.manifest.name}/{WEIGHTS} does not match its manifest's model: {wrong}")
    model.load_state_dict(weights)


def serve_tables(saved: SavedModel, client: MemoryClient) -> Pin:
    """Puts the checkpoint's rows into sealed tables, over however many shards there are, and returns them pinned.

    Those that hold them already stay as they are; the live tables of the run are not touched. The tables come in the
    order of the layers. Raises CheckpointDamagedError before anything is made.
    """
    sealed = {layer: sealed_spec(spec, saved.version) for layer, spec in saved.tables.items()}
    client.connections.refresh()
    pin = client.pins.of_tables(Version(saved.version, tuple(spec.name for spec in sealed.values())))
    try:
        _load_sealed(saved, client, sealed)
    except BaseException:
        pin.release()
        raise
    return pin


def _load_sealed(saved: SavedModel, client: MemoryClient, sealed: Mapping[int, TableSpec]) -> None:
    wanted = {layer: spec for layer, spec in sealed.items() if not _is_loaded(spec, client)}
    if wanted:
        saved.checkpoints.check_rows(list(saved.chain))
        client.connections.refresh()
        _make_tables(client, list(wanted.values()))
        client.pins.renew()
        for layer, spec in wanted.items():
            for part in client.placement.partitions[spec.name]:
                chunks = _row_chunks(saved, saved.tables[layer], part.start, part.stop)
                load_partition(client, spec.name, part.index, chunks, step=saved.step, run=saved.manifest.run)


def _make_tables(client: MemoryClient, wanted: Sequence[TableSpec]) -> None:
    """Makes those that are not there; another worker may do the same at the same time."""
    for attempt in range(MAKE_ATTEMPTS):
        known = client.placement.tables if client.connections.epoch else {}
        missing = [spec for spec in wanted if spec.name not in known]
        try:
            if missing:
                create_tables(client, missing)
            else:
                spread_placement(client)
                return
        except (EpochConflictError, BadRequestError):
            if attempt + 1 == MAKE_ATTEMPTS:
                raise
        client.connections.refresh()


def _is_loaded(spec: TableSpec, client: MemoryClient) -> bool:
    client.connections.refresh()
    if not client.connections.epoch or client.placement.tables.get(spec.name) != spec:
        return False
    try:
        return client.connections.serves(spec.name)
    except ShardUnavailableError:
        return False  # it may be back elsewhere, without its rows


def _row_chunks(saved: SavedModel, spec: TableSpec, start: int, stop: int) -> Iterator[bytes]:
    """Rows [start, stop) as they are after the last of the chain."""
    read_rows, sent_rows = (max(1, size // spec.row_bytes) for size in (READ_BYTES, SENT_BYTES))
    for first in range(start, stop, read_rows):
        rows = np.empty((min(read_rows, stop - first), spec.row_bytes), np.uint8)
        into: dict[str, Any] = {"rows": rows}
        saved.checkpoints.restore_arrays(list(saved.chain), spec.name, first, first + len(rows), into)
        for at in range(0, len(rows), sent_rows):
            yield rows[at : at + sent_rows].tobytes()
