"""Closing a client ends what waits for a shard, at once: a push, a checkpoint, a change to the tables."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from engrid.client import ClientConfig, MemoryClient, TrainingRun
from engrid.control.checkpoints import CheckpointSave
from engrid.control.tables import create_tables
from engrid.rpc.errors import EngridError
from tests.shards import shard_process, table
from tests.worker.conftest import within


def push(client, run, folder):
    run.push({"t": (np.arange(3), np.ones((3, 8), np.float32))}, step=1, learning_rate=0.1)


def save(client, run, folder):
    CheckpointSave(client, folder / "saved", run="r", attempt=1, step=0, tables=["t"])


def make(client, run, folder):
    create_tables(client, [table("more")])


def state_of(process):
    """T once it is stopped, Z once it is dead."""
    return Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]


@pytest.mark.parametrize("what", [push, save, make], ids=lambda what: what.__name__)
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL], ids=lambda how: how.name)
def test_closing_a_client_ends_what_it_waits_for(tmp_path, what, how):
    patient = ClientConfig(
        push_timeout=60.0, begin_timeout=60.0, admin_timeout=60.0, checkpoint_timeout=60.0, timeout=60.0
    )
    with shard_process(tmp_path / "run", "s0") as (process, _), ThreadPoolExecutor(1) as thread:
        client = MemoryClient(f"file:{tmp_path / 'run'}", patient)
        create_tables(client, [table("t")])
        run = TrainingRun(client, run="r", attempt=1, worker=0, workers=1, tables=["t"])
        process.send_signal(how)
        assert within(10, lambda: state_of(process) in "TZ")
        waiting = thread.submit(what, client, run, tmp_path)
        started = time.monotonic()
        with suppress(TimeoutError):  # a shard that was killed may be found out at once
            waiting.exception(timeout=0.5)
        client.close()
        assert isinstance(waiting.exception(timeout=20), EngridError)
        assert time.monotonic() - started < 20
    with pytest.raises(EngridError):
        run.push({}, step=2, learning_rate=0.1)
