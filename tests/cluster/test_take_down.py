"""Two `up` at once, rows kept from one `up` to the next, a shard started again by hand; each on a real Ray."""

import os
import shlex
import signal
import stat
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from engrid.client import MemoryClient, TrainingRun
from engrid.cluster.config import Record
from engrid.cluster.ray_head import check_temp, processes_with
from engrid.control.tables import create_tables
from engrid.directory import open_directory
from engrid.tables import decode_rows
from tests.clusters import ENGRID, ENVIRONMENT, engrid, start_engrid, succeeded
from tests.shards import table

pytestmark = pytest.mark.e2e

UP = ["--shards", 2, "--workers", 0, "--memory", "0.1"]
IDS = np.arange(1000)


def rows_of(run_dir):
    with MemoryClient(run_dir) as client:
        raw = client.lookup("t", IDS, step=1, timeout=20.0)
        return decode_rows(np.ascontiguousarray(raw), "float32", 8)


def wait_for(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not come about in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("kept") / "a#1 ?"
    yield run_dir
    succeeded(engrid("down", "--run-dir", run_dir))


@pytest.fixture(scope="module")
def second(run_dir):
    """What a second `up` says while the first, which goes on, is at work."""
    first = start_engrid("up", "--run-dir", run_dir, *UP)
    wait_for(lambda: (run_dir / "cluster.lock").exists() and (run_dir / "cluster.lock").read_text())
    refused = [engrid("up", "--run-dir", run_dir, *UP), engrid("down", "--run-dir", run_dir)]
    out, said = first.communicate(timeout=120)
    assert first.returncode == 0, out + said
    return first.pid, refused


def test_a_second_up_and_a_down_are_told_which_process_is_at_work(second, run_dir):
    first, refused = second
    for each in refused:
        assert each.returncode == 1
        assert f"engrid up (process {first}) is at work in {run_dir}" in each.stderr
    assert "not reachable" not in succeeded(engrid("status", "--run-dir", run_dir))


def test_what_lies_on_disk_is_for_this_user_alone(second, run_dir):
    record = Record.load(run_dir)
    assert stat.S_IMODE(Record.path(run_dir).stat().st_mode) == 0o600
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE(Path(record.ray_temp).stat().st_mode) == 0o700, "what Ray makes below it, all can write to"
    assert stat.S_IMODE(Path(record.ray_temp, "token").stat().st_mode) == 0o600
    check_temp(record.ray_temp)


def test_kept_rows_are_there_in_the_next_cluster(second, run_dir):
    with MemoryClient(run_dir) as client:
        create_tables(client, [table()])
        run = TrainingRun(client, run="r", attempt=1, worker=0, workers=1, tables=["t"])
        run.push({"t": (IDS, np.ones((1000, 8), np.float32))}, step=1, learning_rate=0.5)
    before, addresses = rows_of(run_dir), Record.load(run_dir).shards
    said = succeeded(engrid("down", "--keep-rows", "--run-dir", run_dir))
    assert "kept t at step 1; go on with: engrid up --run-dir" in said
    assert "keeps the rows of 2 shards" in engrid("status", "--run-dir", run_dir).stderr
    fewer = engrid("up", "--run-dir", run_dir, "--shards", 1)
    assert fewer.returncode == 1
    assert "keeps the rows of 2 shards" in fewer.stderr
    killed = start_engrid("up", "--run-dir", run_dir, *UP)
    wait_for(lambda: (record := Record.load(run_dir)).ray_pid and record.from_kept)
    killed.kill()
    killed.communicate()
    assert "engrid up is not done in" in engrid("train", "--run-dir", run_dir).stderr
    succeeded(engrid("up", "--run-dir", run_dir, *UP))  # stops what the killed one left, and keeps the rows
    assert Record.load(run_dir).shards != addresses, "they were told of the new ones"
    assert np.array_equal(rows_of(run_dir), before)


def test_a_killed_shard_is_started_again_by_the_command_that_is_named(second, run_dir):
    before = rows_of(run_dir)
    directory = open_directory(run_dir)
    killed = directory.shards()["shard-1"]
    os.kill(killed.pid, signal.SIGKILL)
    wait_for(lambda: "not reachable" in succeeded(engrid("status", "--run-dir", run_dir)))
    refused = engrid("versions", "--run-dir", run_dir)
    assert refused.returncode == 1
    again = refused.stderr.rpartition(": ")[2].strip()
    assert again == Record.load(run_dir).start_again("shard-1")
    command = shlex.split(again)
    assert command[0] == "engrid"
    shard = subprocess.Popen([*ENGRID, *command[1:]], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    try:
        assert "serves at" in shard.stdout.readline()
        assert directory.shards()["shard-1"].address == killed.address
        assert np.array_equal(rows_of(run_dir), before)
        said = succeeded(engrid("down", "--run-dir", run_dir))
        assert "discarded t at step 1" in said
        assert f"shard-1 was started by hand and goes on, its state folder too; stop it with: kill {shard.pid}" in said
        assert directory.shards().keys() == {"shard-1"}
    finally:
        shard.kill()
        shard.communicate()


@pytest.mark.faults
@pytest.mark.parametrize("hung", ["gcs_server", "raylet/raylet", "ray::ShardActor"])
def test_down_ends_by_itself_whatever_hangs(tmp_path, hung):
    succeeded(engrid("up", "--run-dir", tmp_path, *UP))
    record = Record.load(tmp_path)
    stopped = [pid for pid in processes_with(record.ray_temp) if hung in Path(f"/proc/{pid}/cmdline").read_text()]
    assert stopped
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    assert "stopped shard-0, shard-1, Ray" in succeeded(engrid("down", "--run-dir", tmp_path, timeout=150))
    assert processes_with(record.ray_temp) == set()
    assert not Path(record.ray_temp).exists()
