"""What `engrid up` is asked for, and its record of what it started."""

from __future__ import annotations

import json
import math
import os
import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from engrid.directory import expand_home, folder_source, is_address, masked, redis_url

MEMORY_RESOURCE = "engrid_memory"
"""Ray resource: MiB a node gives to tables (whole numbers, as Ray wants them)."""
COMPUTE_RESOURCE = "engrid_compute"
"""Ray resource: compute workers a node runs."""


def default_run_dir() -> Path:
    """Where the directory file and the record of a cluster lie, unless told otherwise. Raises ClusterError without a home."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():  # the specification has a relative one passed over
        try:
            state = expand_home(Path("~/.local/state"))
        except ValueError as error:
            raise ClusterError(f"{error}; give --run-dir, or set HOME or XDG_STATE_HOME") from error
    return state / "engrid"


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
    redis: str | None = field(default=None, repr=False)
    """Directory for more than one host: a URL of Redis, or its host:port; None: a file in run_dir."""
    checkpoints: tuple[Path, ...] = ()
    """Folders in which the shards may write and read checkpoints; none: the working directory. Where the directory is a file,
    commands of this user may name others as well."""
    timeout: float = 120.0
    """Seconds until every shard and worker must be healthy."""

    def __post_init__(self) -> None:
        if self.shards < 1 or self.workers < 0:
            raise ValueError(
                f"shards {self.shards}, workers {self.workers}: give at least 1 shard, and no fewer than 0 workers"
            )
        if self.memory_gib is not None and not 0 < self.memory_gib < math.inf:
            raise ValueError(f"memory {self.memory_gib} GiB per shard: give a positive number")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout {self.timeout}: give a positive number of seconds")
        if self.address is not None and self.address != "auto" and not is_address(self.address):
            raise ValueError(f"address {self.address!r}: give HOST:PORT of a Ray head, or auto")
        if self.redis is not None:
            redis_url(self.redis)

    @property
    def directory(self) -> str:
        """The directory, as `engrid.directory.read_source` reads it from any working folder."""
        return redis_url(self.redis) if self.redis is not None else folder_source(self.run_dir)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one `engrid up` has started, written before each thing is, so that `engrid down` finds it all."""

    identity: str
    """Tells this cluster's actors and files from those of another on the same Ray or in the same run directory."""
    directory: str = field(repr=False)
    run_dir: str = ""
    """Absolute."""
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
    kept: bool = False
    """Nothing runs: the cluster was taken down, and its shards' state folders are there for the next `engrid up`."""
    from_kept: bool = False
    """An `engrid up` that goes on from kept rows is not done yet; where it is cut off, they are kept still."""

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

    def start_again(self, shard: str) -> str:
        """The command that starts a shard again where it was, from what it has kept."""
        where = f"--run-dir {shlex.quote(self.run_dir)}"
        if not self.directory.startswith("file:"):
            where += f" --redis {shlex.quote(masked(self.directory))}"
        state = shlex.quote(str(self.state(Path(self.run_dir)) / shard))
        return f"engrid shard --state {state} --listen {self.shards[shard]} --memory {self.memory_mib / 1024:g} {where}"

    def save(self, run_dir: Path) -> None:
        """By temp file and rename; for this user alone, as the directory's URL may hold a password."""
        make_run_dir(run_dir)
        temporary = self.path(run_dir).with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
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


def make_run_dir(run_dir: Path) -> None:
    """Makes the folder, for this user alone; one that is there stays as it is."""
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        run_dir.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        words = "a file is in its place" if isinstance(error, FileExistsError) else error.strerror
        raise ClusterError(f"run directory {run_dir} cannot be made: {words}; give another --run-dir") from error


class ClusterError(Exception):
    """The cluster could not be brought up or found. The message names the part and what to do."""


def require_cluster(run_dir: Path) -> Record:
    """The record of the cluster that is up; raises ClusterError where none is."""
    record = Record.load(run_dir)
    if record is not None and record.ready:
        return record
    start = f"engrid up --run-dir {shlex.quote(str(run_dir))}"
    if record is not None and not record.kept:
        raise ClusterError(
            f"engrid up is not done in {run_dir}; wait for it, or where it was cut off give it again: {start}"
        )
    raise ClusterError(f"no cluster is up in {run_dir}; start one with: {start}")
