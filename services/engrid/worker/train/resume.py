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
from engrid.storage.errors import CheckpointError
from engrid.worker.config import TrainConfig
from engrid.worker.saved_model import FOLDER, SavedModel, open_checkpoint

from .corpus import Corpus, changes_since

FREE = (
    "out",
    "text",
    "steps",
    "evaluations",
    "save",
    "checkpoint_every",
    "full_every",
    "keep",
    "resume",
    "replace",
    "durable",
)
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


def about(config: TrainConfig, corpus: Corpus, workers: int) -> dict[str, Any]:
    """What a checkpoint says of the run, beside the rows and weights."""
    return {
        "run": config.run,
        "model": config.model.to_json(),
        "config": config.to_json(),
        "corpus": corpus.digest,
        "text": corpus.about_text,
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


def resume(config: TrainConfig, corpus: Corpus, rank: int, workers: int, client: MemoryClient | None) -> Start:
    """The newest complete checkpoint, and an attempt that nobody had before; the same on every rank.

    Raises ValueError where it is of a run that computes something else, CheckpointError where there is none.
    """
    folder = Path(config.out) / FOLDER
    chosen: list[Any] = ["", 0, ""]
    if rank == 0:
        saved = open_checkpoint(folder)
        if "config" not in saved.manifest.about:
            raise CheckpointError(
                f"checkpoint {saved.manifest.name} does not say how it was trained; it can be served only"
            )
        seen = newest_attempt(client, saved.manifest.run) if client is not None else 0
        number = saved.checkpoints.claim_attempt(max(seen, saved.manifest.attempt) + 1)
        chosen = [saved.manifest.name, number, uuid.uuid4().hex]
    if workers > 1:
        dist.broadcast_object_list(chosen)
    saved = open_checkpoint(folder / chosen[0])
    _check_same(config, saved, about(config, corpus, workers))
    _check_text(config, saved, corpus)
    return Start(saved, Attempt(saved.manifest.run, chosen[1], chosen[2]))


def _check_same(config: TrainConfig, saved: SavedModel, ours: dict[str, Any]) -> None:
    theirs = saved.manifest.about
    ours = json.loads(json.dumps(ours))  # as it was written
    configs = {name: value for name, value in ours["config"].items() if name not in FREE}
    different = [name for name, value in configs.items() if theirs["config"].get(name) != value]
    different += [name for name in ("workers",) if theirs.get(name) != ours[name]]
    if different:
        raise ValueError(
            f"checkpoint {saved.manifest.name} was made with another {', '.join(different)}; resume with "
            "what it was made with, or begin a new run in another folder"
        )
    saved.check_goes_on(config.steps)


def _check_text(config: TrainConfig, saved: SavedModel, corpus: Corpus) -> None:
    """The tokens that were read just now against those that the checkpoint was trained on."""
    about = saved.manifest.about
    if about.get("corpus") == corpus.digest:
        return
    theirs, ours = about.get("text", {}), corpus.about_text
    if theirs.get("digest") == ours["digest"]:
        how = "the files are the same, but another tokenizer was learned from them (by another version of tokenizers?)"
    else:
        how = changes_since(Path(config.out), config.model.vocab_size, str(theirs.get("digest")), corpus.text) or (
            f"{theirs.get('files')} files with {theirs.get('bytes')} bytes then, {ours['files']} with {ours['bytes']} now"
        )
    raise ValueError(
        f"checkpoint {saved.manifest.name} was trained on another text (corpus): {how}. Put the files back as they were, or "
        f"begin a new run in another folder. Now: {corpus.text.describe()}"
    )
