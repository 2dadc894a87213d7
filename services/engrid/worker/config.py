"""What a worker is started with, and what a training run is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, get_args

from engrid.addressing.spec import EngramSpec
from engrid.model.config import ModelConfig
from engrid.tables import NAME, check_float, check_int, check_keys

MOST_STALENESS = 16
"""Each step of it is a batch of rows kept."""

Memory = Literal["remote", "in_process", "off"]
"""Where a run's tables live: in the shards, in the worker's own memory, or nowhere (no Engram)."""


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """Who a worker is and where its memory is."""

    name: str
    listen: str = "127.0.0.1:0"
    """host:port; port 0 for any free one."""
    advertise_host: str | None = None
    """Host that clients reach us by, where `listen` binds all interfaces."""
    directory: str | os.PathLike[str] = field(repr=False)
    """A run directory (a path object or file:PATH), or redis://[USER:PASSWORD@]HOST:PORT[/DB][?prefix=NAME]."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int | None = None
    """Threads of torch on the CPU; None: as torch finds fit."""
    push_timeout: float = 60.0
    """Seconds a push may take; so long does training wait for a shard that is being started again."""
    shared_memory: bool = True
    """Map sealed tables of shards on this host, where that is possible."""
    cache_bytes: int = 64 << 20
    """For rows of sealed tables read over gRPC; 0: none."""
    reply_timeout: float = 30.0
    """Seconds a client may leave a reply untaken before its call is ended."""
    models: int = 2
    """Loaded at the same time, at most: those used last."""

    def __post_init__(self) -> None:
        check_int("models", self.models, 1, 2**31)


def demo_model() -> ModelConfig:
    """A model that two cores train in two minutes."""
    return ModelConfig(
        vocab_size=4096,
        d_model=128,
        layers=4,
        heads=4,
        kv_heads=2,
        context=256,
        experts=8,
        top_k=2,
        shared_experts=1,
        expert_width=128,
        engram=EngramSpec(
            layers=(1, 2), max_ngram=3, heads=4, vocab_size=(50_000, 150_000), row_width=32, pad_token_id=0
        ),
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. The same on every worker but for the rank."""

    run: str
    """Name of the run; its tables are called RUN.engram.LAYER."""
    out: str
    """Folder for the corpus and the checkpoint, seen by all workers."""
    text: tuple[str, ...] = ()
    """Folders and files of text to train on (.py, .txt, .md, .jsonl); one may be given as a string. None: the standard
    library of the worker's Python."""
    memory: Memory = "remote"
    model: ModelConfig = field(default_factory=demo_model)
    steps: int = 300
    batch: int = 8
    """Sequences per worker and step."""
    length: int = 256
    """Tokens per sequence, at most the model's context."""
    learning_rate: float = 3e-3
    """Peak, of the dense weights."""
    table_learning_rate_ratio: float = 5.0
    """Learning rate of rows over that of dense weights (docs/engram.md, 7)."""
    warmup: int = 20
    """Steps to the peak; a cosine to a tenth of it follows."""
    seed: int = 0
    """Of the weights, the rows and the order of the data."""
    staleness: int = 0
    """Steps by which the rows that a step reads may lag behind: 0 is synchronous; -1: whatever is there, asked for one step
    early. Rows are asked for so many steps before they are needed."""
    durable: bool = False
    """Each step is on the shards' disks before the next begins."""
    evaluations: int = 8
    """Points of the validation curve, the last after the last step; 0: only train and measure speed."""
    save: bool = True
    """Write a checkpoint at the end."""
    checkpoint_every: int = 0
    """Steps from one checkpoint to the next while training; 0: none."""
    full_every: int = 10
    """Checkpoints from one that holds all rows to the next; those between hold the rows that changed. 1: all are full."""
    keep: int = 3
    """Checkpoints that stay, the newest, and those they build on; 0: all."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""
    replace: bool = False
    """Take the place of live tables that hold steps of another run of this name; else such a run is refused."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", _texts(self.text))
        if not isinstance(self.run, str) or not NAME.fullmatch(self.run):
            raise ValueError(f"run {self.run!r}: give letters, digits, '.', '_' and '-', not starting with a sign")
        if not isinstance(self.out, str) or not self.out:
            raise ValueError(f"out is {self.out!r}; give a folder")
        if self.memory not in get_args(Memory):
            raise ValueError(f"memory {self.memory!r}: give one of {', '.join(get_args(Memory))}")
        if not isinstance(self.model, ModelConfig):
            raise ValueError(f"model is {self.model!r}; give a ModelConfig")  # noqa: TRY004 - one error type for JSON
        for name in ("durable", "save", "resume", "replace"):
            if not isinstance(asdict(self)[name], bool):
                raise ValueError(f"{name} is {asdict(self)[name]!r}; give true or false")  # noqa: TRY004
        self._check_numbers()
        if self.length > self.model.context:
            raise ValueError(f"length {self.length} is over the model's context of {self.model.context}")
        if self.memory != "off" and self.model.engram is None:
            raise ValueError(f"memory is {self.memory!r}, but the model has no engram; give it one, or memory 'off'")

    def _check_numbers(self) -> None:
        values = asdict(self)
        for name, least in {
            "steps": 1,
            "batch": 1,
            "length": 1,
            "warmup": 0,
            "seed": 0,
            "evaluations": 0,
            "checkpoint_every": 0,
            "full_every": 1,
            "keep": 0,
        }.items():
            check_int(name, values[name], least, 2**63)
        check_int("staleness", self.staleness, -1, MOST_STALENESS + 1)
        for name in ("learning_rate", "table_learning_rate_ratio"):
            check_float(name, values[name], 1e-30, 1e30)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "text": list(self.text), "model": self.model.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        check_keys("TrainConfig", values, {each.name for each in fields(cls)})
        return cls(**{**values, "model": ModelConfig.from_json(values["model"])})


def _texts(value: object) -> tuple[str, ...]:
    texts = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(each, str) and each for each in texts):
        raise ValueError(f"text is {value!r}; give paths of folders and files, or none for the standard library")
    return tuple(texts)
