"""What `engrid up` is asked for, and its record of what it started."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

MEMORY_RESOURCE = "engrid_memory"
"""Ray resource: MiB a node gives to tables (whole numbers, as Ray wants them)."""
COMPUTE_RESOURCE = "engrid_compute"
"""Ray resource: compute workers a node runs."""


def default_run_dir() -> Path:
    """Where the directory file and the record of a cluster lie, unless told otherwise."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "engrid"


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """A cluster to bring up."""

    run_dir: Path
    shards: int = 2
    workers: int = 1
    memory_gib: float | None = None
    """GiB of rows and optimizer state per shard; None: a share of half of what is free here, or of what the nodes of
    a joined cluster offer."""
    address: str | None = None
    """Ray cluster to join (host:port, or auto); None: start Ray on this machine."""
    redis: str | None = None
    """Directory for more than one host; None: a file in run_dir."""
    timeout: float = 120.0
    """Seconds until every shard and worker must be healthy."""

    def __post_init__(self) -> None:
        if self.shards < 1 or self.workers < 0:
            raise ValueError(
                f"shards {self.shards}, workers {self.workers}: give at least 1 shard, and no fewer than 0 workers"
            )
        if self.memory_gib is not None and self.memory_gib <= 0:
            raise ValueError(f"memory {self.memory_gib} GiB per shard: give a positive number")

    @property
    def directory(self) -> str:
        """URL of the directory."""
        return self.redis or f"file:{self.run_dir.resolve()}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one `engrid up` has started, written before each thing is, so that `engrid down` finds it all."""

    identity: str
    """Tells this cluster's actors and files from those of another on the same Ray or in the same run directory."""
    directory: str
    ray_address: str | None = None
    ray_pid: int | None = None
    """Our Ray head and leader of its process group; None where a cluster was joined."""
    ray_temp: str | None = None
    """Folder of our Ray, named in the environment of each of its processes."""
    memory_mib: int = 0
    """Of rows and optimizer state, per shard."""
    host: str | None = None
    """Where shards and workers listen; None: at the address of their Ray node."""
    actors: list[str] = field(default_factory=list)
    """Names of the actors asked for."""
    shards: dict[str, str] = field(default_factory=dict)
    """Addresses of the shards, by name."""
    workers: dict[str, str] = field(default_factory=dict)
    """Addresses of the compute workers, by name."""
    ready: bool = False

    @property
    def namespace(self) -> str:
        """Ray namespace of our actors."""
        return f"engrid-{self.identity}"

    @staticmethod
    def path(run_dir: Path) -> Path:
        return run_dir / "cluster.json"

    def state(self, run_dir: Path) -> Path:
        """Folder for what shards keep across restarts, on each host."""
        return run_dir.resolve() / f"state-{self.identity}"

    def save(self, run_dir: Path) -> None:
        """By temp file and rename."""
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary = self.path(run_dir).with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        temporary.replace(self.path(run_dir))

    @classmethod
    def load(cls, run_dir: Path) -> Record | None:
        """None where no cluster is up."""
        path = cls.path(run_dir)
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is no record of a cluster ({error}); stop its processes by hand and remove it"
            ) from error

    def changed(self, run_dir: Path, **changes: Any) -> Record:
        """The record with changes, saved."""
        record = replace(self, **changes)
        record.save(run_dir)
        return record


class ClusterError(Exception):
    """The cluster could not be brought up or found. The message names the part and what to do."""


def require_cluster(run_dir: Path) -> Record:
    """The record of the cluster that is up; raises ClusterError where none is."""
    record = Record.load(run_dir)
    if record is None or not record.ready:
        raise ClusterError(f"no cluster is up in {run_dir}; start one with: engrid up --run-dir {run_dir}")
    return record
