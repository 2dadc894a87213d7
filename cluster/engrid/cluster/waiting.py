"""A shard that is away while a run goes on: said while the run waits for it, and what to type to have it back."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from engrid.directory import masked
from engrid.worker.config import TrainConfig
from engrid.worker.saved_model import FOLDER

from .config import ClusterError, Record
from .status import away, shards_of

QUIET_SECONDS = 3.0
"""Without a word from the run after which the shards are asked."""
ASK_SECONDS = 3.0
"""A shard on a busy machine has to answer."""


class ShardWatch:
    """Asks the shards for their health while a run says nothing, in a thread of its own, until the block ends."""

    def __init__(self, record: Record, console: Console) -> None:
        self.tell: Callable[[str], None] = lambda _: None
        """Gets "waiting for shard-1, 12 s", again and again."""
        self._record, self._console = record, console
        self._heard = time.monotonic()
        self._away: dict[str, float] = {}
        """When each shard was first found away."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="engrid shard watch", daemon=True)

    def __enter__(self) -> ShardWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def heard(self) -> None:
        """The run goes on."""
        self._heard = time.monotonic()

    def _watch(self) -> None:
        while not self._done.wait(1.0):
            if time.monotonic() - self._heard < QUIET_SECONDS:
                self._away = {}
                continue
            self._look()

    def _look(self) -> None:
        shards = shards_of(self._record)
        found = away(shards, timeout=ASK_SECONDS)
        now, heard = time.monotonic(), self._heard
        if self._done.is_set() or now - heard < QUIET_SECONDS:
            return
        for name in found:
            if name not in self._away:
                self._console.print(
                    f"{name} does not answer, and the run waits for it; start it again with: "
                    f"{self._record.start_again(name)}",
                    style="yellow",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
        self._away = {name: self._away.get(name, heard) for name in found}
        if found:
            self.tell(f"waiting for {', '.join(found)}, {now - min(self._away.values()):.0f} s")


def with_cure(record: Record, config: TrainConfig, error: Exception) -> Exception:
    """The error, and where shards or workers are away what starts each again and goes on with the run."""
    lost = away(shards_of(record), timeout=ASK_SECONDS)
    workers = away(record.workers, timeout=ASK_SECONDS)
    if not lost and not workers:
        return error
    if workers:  # a shard can be started by hand, a worker with Ray alone
        run_dir = f"--run-dir {shlex.quote(record.run_dir)}"
        count = f"--shards {len(record.shards)} --workers {len(record.workers)}"
        if not record.directory.startswith("file:"):
            count += f" --redis {shlex.quote(masked(record.directory))}"
        start = f"Start {', '.join([*workers, *lost])} again: engrid down --keep-rows {run_dir} ; engrid up {count} {run_dir}"
    else:
        again = "; ".join(record.start_again(name) for name in lost)
        start = f"Start {', '.join(lost)} again, and stop it first where its process hangs: {again}"
    where = f"--out {shlex.quote(config.out)} --run-dir {shlex.quote(record.run_dir)}"
    if any(Path(config.out, FOLDER).glob("step-*")):
        then = f"then go on from the newest checkpoint: engrid train --resume {where}"
    else:
        then = "no checkpoint was made yet (--checkpoint-every N), so the run begins anew"
    return ClusterError(f"{error}. {start} ; {then}")
