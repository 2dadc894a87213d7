"""`engrid checkpoint` over shards that were started by hand, without Ray or a worker."""

import os
import subprocess
import sys

import numpy as np
import pytest

from engrid.client import MemoryClient, TrainingRun, create_tables
from tests.shards import local_shards, table

NAME = "mine.engram.1"
WIDE = {**os.environ, "COLUMNS": "500"}


@pytest.fixture
def trained(tmp_path):
    """Two shards with a table that took one step: (run directory, client, run)."""
    folder = tmp_path / "run"
    with local_shards(folder, 2), MemoryClient(f"file:{folder}") as client:
        create_tables(client, [table(NAME, optimizer="adam")])
        run = TrainingRun(client, run="mine-1", attempt=1, worker=0, workers=1, tables=[NAME])
        push(run, 1)
        yield folder, client, run


def push(run, step):
    run.push({NAME: (np.arange(500), np.ones((500, 8), np.float32))}, step=step, learning_rate=0.1)


def engrid(*arguments):
    command = [sys.executable, "-m", "engrid.cluster.cli", "checkpoint", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60, check=False, env=WIDE)


def test_saved_listed_verified_and_restored(trained, tmp_path):
    folder, client, run = trained
    saved = tmp_path / "saved"
    where = ["--folder", saved, "--run-dir", folder]
    before = client.lookup(NAME, np.arange(1000)).tobytes()
    done = engrid("save", "--run", "mine", *where)
    assert "step-00000001" in done.stdout.replace("\n", ""), done.stderr
    assert "no dense weights" in done.stdout
    push(run, 2)
    assert client.lookup(NAME, np.arange(1000)).tobytes() != before
    assert "step-00000001" in engrid("list", "--folder", saved).stdout
    assert "every byte is as it was written" in engrid("verify", "--folder", saved).stdout
    restored = engrid("restore", *where)
    assert "attempts before 2 are fenced" in restored.stdout.replace("\n", " "), restored.stderr
    assert client.lookup(NAME, np.arange(1000)).tobytes() == before

    path = saved / "step-00000001" / "tables" / f"{NAME}-00001.exp_avg.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    wrong = engrid("verify", "step-00000001", "--folder", saved)
    assert wrong.returncode == 1
    assert f"step-00000001/tables/{NAME}-00001.exp_avg.safetensors is damaged" in wrong.stderr
    refused = engrid("restore", *where)
    assert refused.returncode == 1
    assert f"{NAME}-00001.exp_avg.safetensors" in refused.stderr.replace("\n", "")


def test_what_is_not_there_is_named(trained, tmp_path):
    folder, *_ = trained
    (tmp_path / "empty").mkdir()
    where = ["--folder", tmp_path / "empty", "--run-dir", folder]
    assert "no tables of run other" in engrid("save", "--run", "other", *where).stderr
    assert "holds no complete checkpoint" in engrid("restore", *where).stderr
    assert "no checkpoint step-00000009" in engrid("restore", "step-00000009", *where).stderr
    assert "is no folder" in engrid("list", "--folder", tmp_path / "nowhere").stderr
