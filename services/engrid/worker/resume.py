"""Where a run begins: anew, or from the newest checkpoint in its folder."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from engrid.client import Attempt, MemoryClient
from engrid.client.attempts import newest_attempt
from engrid.storage.checkpoint import MANIFEST, Checkpoints
from engrid.storage.disk import LocalDisk

from .config import TrainConfig
from .saved_model import FOLDER, SavedModel, open_checkpoint

FREE = ("out", "text", "steps", "evaluations", "save", "checkpoint_every", "full_every", "keep", "resume", "durable")
"""What may differ from the run that is gone on with: the rest decides what the steps compute."""


@dataclass(frozen=True)
class Start:
    """The state that a run's first step begins with."""

    saved: SavedModel | None
    """None: initial weights and rows."""
    attempt: Attempt
    """The same on every rank."""

    @property
    def identity(self) -> str:
        """Of the run."""
        return self.attempt.run

    @property
    def step(self) -> int:
        """The last that is done."""
        return self.saved.step if self.saved else 0


def about(config: TrainConfig, corpus_digest: str, workers: int) -> dict[str, Any]:
    """What a checkpoint says of the run, beside the rows and weights."""
    return {
        "run": config.run,
        "model": config.model.to_json(),
        "config": config.to_json(),
        "corpus": corpus_digest,
        "workers": workers,
    }


def start_anew(config: TrainConfig, identity: str) -> Start:
    """Raises ValueError where `out` holds checkpoints: they are another run's, and its step 100 is not ours."""
    folder = Path(config.out) / FOLDER
    saves = config.save or config.checkpoint_every > 0
    names = Checkpoints(LocalDisk(folder)).names() if saves and folder.is_dir() else []
    if names or (saves and (folder / MANIFEST).exists()):
        raise ValueError(
            f"{folder} holds checkpoints ({', '.join(names) or 'of an older engrid'}); go on from the newest with --resume, "
            "or give another --out"
        )
    return Start(None, Attempt(identity, 1, identity))  # as new as the run itself


def resume(config: TrainConfig, corpus_digest: str, rank: int, workers: int, client: MemoryClient | None) -> Start:
    """The newest complete checkpoint, and an attempt that nobody had before; the same on every rank.

    Raises ValueError where it is of a run that computes something else, CheckpointError where there is none.
    """
    folder = Path(config.out) / FOLDER
    chosen: list[Any] = ["", 0, ""]
    if rank == 0:
        saved = open_checkpoint(folder)
        seen = newest_attempt(client, saved.manifest.run) if client is not None else 0
        number = saved.checkpoints.claim_attempt(max(seen, saved.manifest.attempt) + 1)
        chosen = [saved.manifest.name, number, uuid.uuid4().hex]
    if workers > 1:
        dist.broadcast_object_list(chosen)
    saved = open_checkpoint(folder / chosen[0])
    _check_same(config, saved, about(config, corpus_digest, workers))
    return Start(saved, Attempt(saved.manifest.run, chosen[1], chosen[2]))


def _check_same(config: TrainConfig, saved: SavedModel, ours: dict[str, Any]) -> None:
    theirs = saved.manifest.about
    ours = json.loads(json.dumps(ours))  # as it was written
    configs = {name: value for name, value in ours["config"].items() if name not in FREE}
    different = [name for name, value in configs.items() if theirs["config"].get(name, value) != value]
    different += [name for name in ("corpus", "workers") if theirs[name] != ours[name]]
    if different:
        raise ValueError(
            f"checkpoint {saved.manifest.name} was made with another {', '.join(different)}; resume with "
            "what it was made with, or begin a new run in another folder"
        )
    if saved.step >= config.steps:
        raise ValueError(f"run {saved.run} is at step {saved.step} already; give more steps to go on")
