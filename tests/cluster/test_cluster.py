"""`engrid up` to `engrid down` on a real Ray, and what goes on when Ray does not."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from engrid.addressing.canonical import CanonicalVocabulary
from engrid.addressing.hashing import NgramHasher
from engrid.client import MemoryClient
from engrid.cluster.config import Record
from engrid.cluster.ray_head import free_port, new_temp, processes_with, start_head, stop_head, use_token, wait_for_head
from engrid.control.tables import create_tables
from engrid.tables import initial_rows
from engrid.worker.saved_model import open_checkpoint
from tests.clusters import engrid, start_engrid, succeeded, tiny_training
from tests.shards import made_by, table

pytestmark = pytest.mark.e2e


def command_line(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def test_up_returns_when_all_is_healthy_and_records_it(cluster, run_dir):
    assert list(cluster.shards) == ["shard-0", "shard-1"]
    assert list(cluster.workers) == ["worker-0", "worker-1"]
    shown = succeeded(engrid("status", "--run-dir", run_dir))
    for name, address in {**cluster.shards, **cluster.workers}.items():
        assert name in shown
        assert address in shown
    assert "not reachable" not in shown


def test_shards_and_workers_are_processes_of_their_own(cluster):
    processes = [command_line(pid) for pid in processes_with(cluster.ray_temp)]
    assert sum("ray::ShardActor" in each for each in processes) == 2
    assert sum("ray::ComputeActor" in each for each in processes) == 2


def test_rays_token_is_for_this_user_alone(cluster):
    assert (Path(cluster.ray_temp) / "token").stat().st_mode & 0o077 == 0


def test_a_second_up_is_refused_and_the_first_goes_on(cluster, run_dir):
    refused = engrid("up", "--run-dir", run_dir)
    assert refused.returncode == 1
    assert "is up in" in refused.stderr
    assert f"engrid down --run-dir {run_dir}" in refused.stderr.replace("\n", " ")
    assert "not reachable" not in succeeded(engrid("status", "--run-dir", run_dir))


def test_shards_serve_the_placement_to_a_client_without_a_directory(cluster):
    with MemoryClient(cluster.directory) as client:
        placement = create_tables(client, [table("kept")])
    with MemoryClient(cluster.shards["shard-1"]) as client:
        assert client.placement == placement
        assert client.lookup("kept", np.arange(1000)).shape == (1000, 32)


def test_train_and_generate_as_a_user_would(trained, run_dir):
    assert "validation loss" in trained
    assert "after 3 steps" in trained
    assert str(run_dir / "checkpoint") in trained
    checkpoint = ["--run-dir", run_dir, "--checkpoint", run_dir / "checkpoint"]
    written = succeeded(engrid("generate", "import os", *checkpoint, "--max-new-tokens", 5))
    assert written.startswith("import os")
    assert "5 tokens" in written
    drafted = succeeded(engrid("generate", "import os", *checkpoint, "--max-new-tokens", 5, "--draft", 3))
    assert "drafted tokens accepted" in drafted
    assert drafted.splitlines()[0] == written.splitlines()[0]
    shown = succeeded(engrid("status", "--run-dir", run_dir))
    assert "tiny.engrid.1" not in shown
    assert "tiny.engram.1" in shown


def test_ids_of_a_checkpoint_are_those_that_its_model_asks_for(trained, run_dir):
    saved = open_checkpoint(run_dir / "checkpoint")
    tokenizer = Tokenizer.from_str(saved.read_file("tokenizer.json").decode())
    canonical = CanonicalVocabulary(tokenizer)
    text, layer = "import os, sys", saved.model.engram.layers[-1]
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    rows = NgramHasher.over(saved.model.engram, canonical).row_ids(canonical.map(np.array([token_ids])), layer)[0]
    shown = engrid("ids", text, "--checkpoint", run_dir / "checkpoint", "--layer", layer, "--json")
    found = json.loads(succeeded(shown))
    assert found["token_ids"] == token_ids
    assert found["row_ids"] == rows.tolist()
    refused = engrid("ids", text, "--checkpoint", run_dir / "checkpoint", "--layer", 99)
    assert "layer 99: checkpoint step-" in refused.stderr


def test_publish_and_versions_as_a_user_would(trained, run_dir):
    where = ["--run-dir", run_dir]
    published = succeeded(engrid("publish", run_dir / "checkpoint", *where))
    version = published.split()[1]
    assert version.startswith("3-")
    assert f"version {version} of run tiny is current" in published
    shown = succeeded(engrid("versions", *where))
    assert version in shown
    assert "current" in shown
    assert "dropped nothing" in succeeded(engrid("versions", "--prune", "tiny", *where))
    refused = engrid("versions", "--rollback", "tiny", *where)
    assert refused.returncode == 1
    assert f"published: {version}" in refused.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("prompt", "match"), [("", "the prompt is empty"), ("x = 1\n" * 200, "the model's context is 64")]
)
def test_a_prompt_empty_or_too_long_is_named(trained, run_dir, prompt, match):
    refused = engrid("generate", prompt, "--run-dir", run_dir, "--checkpoint", run_dir / "checkpoint")
    assert refused.returncode == 1
    assert match in refused.stderr.replace("\n", " ")


def test_a_folder_without_checkpoint_is_named(cluster, run_dir, tmp_path):
    refused = engrid("generate", "x", "--run-dir", run_dir, "--checkpoint", tmp_path)
    assert refused.returncode == 1
    assert "holds no checkpoint" in refused.stderr


def test_ctrl_c_in_training_saves_and_leaves_the_cluster_ready_for_the_next(cluster, run_dir):
    config = tiny_training(run_dir)
    options = ["--run-dir", run_dir, "--config", config, "--run", "cut"]
    training = start_engrid("train", *options, "--out", run_dir / "cut", "--steps", 100_000)
    with MemoryClient(cluster.directory) as client:
        wait_for(lambda: steps_of(client, "cut.engram.1") > 2, 60)
    training.send_signal(signal.SIGINT)
    printed, said = training.communicate(timeout=60)
    assert training.returncode == 130, said
    assert "stopped after step" in printed
    assert f"go on with: engrid train --resume --out {run_dir / 'cut'} --run-dir {run_dir}" in printed
    wait_for(lambda: "training" not in succeeded(engrid("status", "--run-dir", run_dir)), 30)
    refused = engrid("train", *options, "--out", run_dir / "another")
    assert refused.returncode == 1
    assert "--replace" in refused.stderr
    succeeded(engrid("train", *options, "--out", run_dir / "another", "--replace"))


def steps_of(client, name):
    client.connections.refresh()
    if not client.connections.epoch or name not in client.placement.tables:
        return 0
    return max((step for _, step in made_by(client, name)), default=0)  # shards may not know of the table yet


def wait_for(condition, seconds):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not come about in time"
        time.sleep(0.1)


def test_lookups_go_on_within_their_deadline_while_ray_stands_still(cluster):
    """Ray's GCS and raylet are stopped for 5 s; no lookup asks them anything."""
    spec = table("steady", rows=5000)
    ids = np.random.default_rng(0).integers(0, 5000, 2000)
    with MemoryClient(cluster.directory) as client:
        create_tables(client, [spec])
        expected = initial_rows(spec, 0, 5000)[ids].view(np.uint8)
        ray = [pid for pid in processes_with(cluster.ray_temp) if is_ray_itself(pid)]
        assert len(ray) >= 2
        for pid in ray:
            os.kill(pid, signal.SIGSTOP)
        try:
            until, count = time.monotonic() + 5.0, 0
            while time.monotonic() < until:
                assert np.array_equal(client.lookup("steady", ids, timeout=1.0), expected)
                count += 1
        finally:
            for pid in ray:
                os.kill(pid, signal.SIGCONT)
        assert count > 50
        with MemoryClient(cluster.directory) as new:
            assert np.array_equal(new.lookup("steady", ids, timeout=1.0), expected)


def is_ray_itself(pid):
    return any(name in command_line(pid).split()[0] for name in ("gcs_server", "raylet/raylet"))


@pytest.fixture
def free_ray():
    """A Ray that is not Engrid's, with room for several clusters; yields its address and what it takes to join it."""
    temp, port = new_temp(), free_port()
    pid = start_head(temp, port, memory_mib=1024, workers=2)
    try:
        wait_for_head(temp, pid, port, time.monotonic() + 60)
        yield f"127.0.0.1:{port}", use_token(temp)
    finally:
        stop_head(pid, temp)
        assert processes_with(temp) == set()


def test_clusters_on_one_ray_stay_apart(free_ray, tmp_path):
    """Taking one down leaves the other and the Ray; a third finds no room and leaves both."""
    address, token = free_ray

    def up(name, *options):
        return engrid("up", "--run-dir", tmp_path / name, "--address", address, "--shards", 1, *options, env=token)

    succeeded(up("a", "--memory", "0.25"))
    succeeded(up("b"))
    refused = up("c", "--workers", "0", "--memory", "0.1")
    assert refused.returncode == 1
    assert "room for 0" in refused.stderr
    assert "Nothing was started" in refused.stderr.replace("\n", " ")
    assert not Record.path(tmp_path / "c").exists()
    assert Record.load(tmp_path / "b").memory_mib == 768, "what the first left"
    stopped = succeeded(engrid("down", "--run-dir", tmp_path / "a", env=token))
    assert stopped.strip() == "stopped shard-0, worker-0"
    assert "not reachable" not in succeeded(engrid("status", "--run-dir", tmp_path / "b"))
    succeeded(engrid("down", "--run-dir", tmp_path / "b", env=token))


def test_a_ray_that_is_not_there_is_named(tmp_path):
    refused = engrid("up", "--run-dir", tmp_path, "--address", "127.0.0.1:1")
    assert refused.returncode == 1
    assert "no Ray cluster answers at 127.0.0.1:1" in refused.stderr
    assert not Record.path(tmp_path).exists()
