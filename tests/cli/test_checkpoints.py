"""`engrid checkpoint` over shards that were started by hand, without Ray or a worker."""

import os
import subprocess
import sys

import numpy as np
import pytest

from engrid.client import MemoryClient, TrainingRun
from engrid.control.tables import create_tables
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
    command = [sys.executable, "-m", "engrid.cli.app", "checkpoint", *map(str, arguments)]
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


def test_any_tables_are_saved_published_and_read_by_what_they_are_named(trained, tmp_path):
    folder, client, _run = trained
    saved = tmp_path / "saved"
    create_tables(client, [table("plain"), table("other", rows=70)])
    two = TrainingRun(client, run="plain-1", attempt=1, worker=0, workers=1, tables=["plain", "other"])
    two.push({"plain": (np.arange(9), np.ones((9, 8), np.float32))}, step=1, learning_rate=0.5)
    where = ["--folder", saved, "--run-dir", folder]
    done = engrid("save", "--tables", "plain,other", *where)
    assert "rows and optimizer state of plain, other" in done.stdout, done.stderr
    expected = client.lookup("plain", np.arange(1000), step=1).tobytes()
    two.push({"plain": (np.arange(9), np.ones((9, 8), np.float32))}, step=2, learning_rate=0.5)
    command = [sys.executable, "-m", "engrid.cli.app", "publish", str(saved), "--run-dir", str(folder)]
    published = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60, check=False, env=WIDE)
    assert "of run plain-1 is current" in published.stdout, published.stderr
    client.connections.refresh()
    (version,) = client.placement.versions["plain-1"]
    assert client.lookup(f"plain@{version.name}", np.arange(1000)).tobytes() == expected
    assert version.checkpoint == str(saved / "step-00000001")
    assert "plain stand at different steps" in engrid("save", "--tables", f"{NAME},plain", *where).stderr
    assert "table nothing is not there" in engrid("save", "--tables", "nothing", *where).stderr
    assert f"table plain@{version.name} is sealed" in engrid("save", "--tables", f"plain@{version.name}", *where).stderr


def test_restoring_over_another_runs_steps_is_refused(trained, tmp_path):
    folder, client, _run = trained
    where = ["--folder", tmp_path / "saved", "--run-dir", folder]
    assert engrid("save", "--run", "mine", *where).returncode == 0
    create_tables(client, [table(NAME, optimizer="adam")], replace=True)
    theirs = TrainingRun(client, run="theirs-1", attempt=1, worker=0, workers=1, tables=[NAME])
    push(theirs, 1)
    before = client.lookup(NAME, np.arange(1000), step=1).tobytes()
    refused = engrid("restore", *where)
    assert refused.returncode == 1
    assert "hold rows of run theirs-1 (step 1), which would be lost" in refused.stderr
    assert client.lookup(NAME, np.arange(1000), step=1).tobytes() == before
    assert engrid("restore", "--replace", *where).returncode == 0


def test_what_is_not_there_is_named(trained, tmp_path):
    folder, *_ = trained
    (tmp_path / "empty").mkdir()
    where = ["--folder", tmp_path / "empty", "--run-dir", folder]
    assert "no tables of run other" in engrid("save", "--run", "other", *where).stderr
    assert "holds no complete checkpoint" in engrid("restore", *where).stderr
    assert "no checkpoint step-00000009" in engrid("restore", "step-00000009", *where).stderr
    assert "is no folder" in engrid("list", "--folder", tmp_path / "nowhere").stderr
