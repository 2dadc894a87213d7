"""What a run says while a shard is away, and what its error says to type."""

import os
import re
import shlex
import signal
import subprocess
import time
from dataclasses import replace

import pytest
from rich.console import Console

from engrid.cluster.config import Record
from engrid.cluster.waiting import ShardWatch, with_cure
from engrid.directory import folder_source, open_directory
from engrid.rpc.errors import ShardUnavailableError
from engrid.worker.config import TrainConfig
from tests.clusters import ENGRID, ENVIRONMENT, cluster_up, start_engrid, tiny_training
from tests.shards import local_shards

pytestmark = pytest.mark.e2e


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Two shards, the second of which has gone."""
    monkeypatch.setattr("engrid.cluster.waiting.ASK_SECONDS", 1.0)
    with local_shards(tmp_path, 2) as (first, second):
        shards = {"s0": first.address, "s1": second.address}
        second.stop(0)
        yield Record(
            identity="i",
            directory=folder_source(tmp_path),
            run_dir=str(tmp_path),
            shards=shards,
            memory_mib=256,
            ready=True,
        )


def wait_for(condition, seconds=30.0):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "did not come about in time"
        time.sleep(0.05)
    return found


def test_a_shard_that_is_away_is_named_once_with_its_command_and_counted(record, monkeypatch):
    monkeypatch.setattr("engrid.cluster.waiting.QUIET_SECONDS", 0.0)
    console, told = Console(record=True, width=300, file=open(os.devnull, "w")), []  # noqa: PTH123, SIM115
    with ShardWatch(record, console) as watch:
        watch.tell = told.append
        wait_for(lambda: len(told) > 1)
    console.file.close()
    assert re.fullmatch(r"waiting for s1, \d+ s", told[-1])
    said = console.export_text()
    assert said.count("s1 does not answer, and the run waits for it; start it again with: engrid shard --state") == 1
    assert f"--listen {record.shards['s1']} --memory 0.25 --run-dir" in said
    assert "s0" not in said


def test_nothing_is_said_while_the_run_goes_on(record):
    told = []
    with ShardWatch(record, Console(quiet=True)) as watch:
        watch.tell = told.append
        for _ in range(24):
            watch.heard()
            time.sleep(0.05)
    assert told == []


def test_an_error_names_the_shards_that_are_away_and_what_to_type(record, tmp_path):
    config = TrainConfig(run="r", out=str(tmp_path / "out put"))
    error = ShardUnavailableError("worker-0: shard s1 is gone")
    cured = str(with_cure(record, config, error))
    assert cured.startswith("worker-0: shard s1 is gone. Start s1 again")
    assert record.start_again("s1") in cured
    assert "no checkpoint was made yet" in cured
    (tmp_path / "out put" / "checkpoint" / "step-00000004").mkdir(parents=True)
    resume = f"engrid train --resume --out '{config.out}' --run-dir {record.run_dir}"
    assert str(with_cure(record, config, error)).endswith(resume)


def test_a_worker_that_is_away_is_started_again_with_its_cluster(record):
    gone = replace(record, workers={"worker-0": record.shards["s1"]})
    cured = str(with_cure(gone, TrainConfig(run="r", out="o"), ShardUnavailableError("worker-0 is gone")))
    again = f"engrid down --keep-rows --run-dir {record.run_dir} ; engrid up --shards 2 --workers 1 --run-dir {record.run_dir}"
    assert f"Start worker-0, s1 again: {again} ;" in cured


def test_an_error_of_another_kind_stays_itself(tmp_path):
    with local_shards(tmp_path, 1) as (shard,):
        healthy = Record(identity="i", directory=folder_source(tmp_path), shards={"s0": shard.address}, ready=True)
        error = ValueError("the text is empty")
        assert with_cure(healthy, TrainConfig(run="r", out="o"), error) is error


@pytest.mark.faults
def test_a_run_goes_on_once_the_named_command_has_started_the_killed_shard_again(tmp_path):
    run_dir = tmp_path / "run"
    with cluster_up(run_dir, "--shards", 2, "--workers", 1) as record:
        options = ["--run-dir", run_dir, "--config", tiny_training(tmp_path), "--out", tmp_path / "out"]
        training = start_engrid("train", *options, "--steps", 500)
        directory = open_directory(run_dir)
        state = record.state(run_dir) / "shard-1"
        wait_for(lambda: state.exists() and sum(each.stat().st_size for each in state.rglob("*.log")) > 10_000, 90)
        os.kill(directory.shards()["shard-1"].pid, signal.SIGKILL)
        said = "shard-1 does not answer, and the run waits for it"
        line = wait_for(
            lambda: next((line for line in iter(training.stdout.readline, "") if line.startswith(said)), "")
        )
        command = shlex.split(line.partition("start it again with: ")[2])
        shard = subprocess.Popen([*ENGRID, *command[1:]], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        try:
            assert "serves at" in shard.stdout.readline()
            out, said = training.communicate(timeout=220)
            assert training.returncode == 0, out + said
            assert "after 500 steps" in out
        finally:
            training.kill()
            shard.kill()
            shard.communicate()
