"""Every command ends by its own limit, shows no password, and leaves alone what is another's. No Ray starts here."""

import json
import os
import signal
import socket
import time
import uuid
from pathlib import Path

import pytest

from engrid.cluster.config import ClusterConfig, ClusterError, Record
from engrid.cluster.launch import check_directory_free
from engrid.cluster.ray_calls import check_listens
from engrid.cluster.ray_head import check_temp
from engrid.cluster.run_lock import changing
from engrid.directory import DirectoryChangedError, open_directory
from tests.clusters import engrid, succeeded
from tests.conformance.directory import record
from tests.redis_server import running_redis
from tests.shards import local_shards, shard_process

pytestmark = pytest.mark.e2e


def test_a_port_that_is_no_ray_is_given_up_in_time(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        refused = engrid("up", "--run-dir", tmp_path, "--address", address, "--timeout", 8)
        assert refused.returncode == 1
        assert f"no Ray cluster answers at {address}: " in refused.stderr
        assert "no answer within 8 s" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1, "none of Ray's own lines"
        assert time.monotonic() - started < 60
    assert not Record.path(tmp_path).exists()


def test_auto_with_a_ray_that_is_dead_is_named_at_once(tmp_path):
    refused = engrid("up", "--run-dir", tmp_path, "--address", "auto", env={"RAY_ADDRESS": "127.0.0.1:1"})
    assert refused.returncode == 1
    assert "no Ray cluster answers at auto, which means 127.0.0.1:1" in refused.stderr
    with pytest.raises(ClusterError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        check_listens("127.0.0.1:1", {})


@pytest.mark.parametrize("address", ["", "local", "ray://h:1", "host", "http://h:1", "host:99999"])
def test_an_address_that_is_no_head_is_refused(tmp_path, address):
    with pytest.raises(ValueError, match=r"give HOST:PORT of a Ray head, or auto"):
        ClusterConfig(run_dir=tmp_path, address=address)


def test_status_and_versions_end_in_time_where_shards_hang(tmp_path):
    with shard_process(tmp_path, "s0") as (first, _), shard_process(tmp_path, "s1") as (second, _):
        for process in (first, second):
            process.send_signal(signal.SIGSTOP)
        assert succeeded(engrid("status", "--run-dir", tmp_path, timeout=40)).count("no answer") == 2
        for command in (["versions"], ["checkpoint", "save"]):
            refused = engrid(*command, "--run-dir", tmp_path, timeout=40)
            assert refused.returncode == 1
            assert "no answer from s0 at" in refused.stderr
            assert "s1 at" in refused.stderr


def test_one_command_at_a_time_changes_a_run_directory(tmp_path):
    with changing(tmp_path, "engrid up"):
        refused = engrid("down", "--run-dir", tmp_path)
    assert refused.returncode == 1
    assert f"engrid up (process {os.getpid()}) is at work in {tmp_path}" in refused.stderr
    assert "no cluster is up" in succeeded(engrid("down", "--run-dir", tmp_path))


def test_a_directory_in_use_is_refused(tmp_path):
    with local_shards(tmp_path, 1) as (shard,):
        refused = engrid("up", "--run-dir", tmp_path, "--memory", "0.1")
        assert refused.returncode == 1
        assert f"is in use: shard s0 serves at {shard.address}" in refused.stderr


def test_a_shard_that_comes_between_the_look_and_the_start_is_not_forgotten(tmp_path):
    registered = check_directory_free(f"file:{tmp_path}")
    directory = open_directory(tmp_path)
    directory.register(record())
    with pytest.raises(DirectoryChangedError, match="s0 came to or left"):
        directory.clear(registered=registered)
    assert directory.shards() == {"s0": record()}


def test_a_folder_of_our_ray_that_lets_others_in_is_refused(tmp_path):
    tmp_path.chmod(0o700)
    check_temp(str(tmp_path))
    for mode in (0o777, 0o750, 0o701):
        tmp_path.chmod(mode)
        with pytest.raises(ClusterError, match="is another's or lets others in"):
            check_temp(str(tmp_path))
    tmp_path.chmod(0o700)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ClusterError, match="is another's"):
        check_temp(str(tmp_path / "link"))


def test_a_password_of_redis_is_shown_nowhere(tmp_path):
    secret = uuid.uuid4().hex
    with running_redis(tmp_path) as server:
        url = f"redis://me:{secret}@127.0.0.1:{server.port}/0?prefix=x"
        made = Record(identity="x", directory=url, run_dir=str(tmp_path), shards={"s0": "127.0.0.1:1"}, ready=True)
        made.save(tmp_path)
        assert secret in Record.path(tmp_path).read_text()
        assert Record.path(tmp_path).stat().st_mode & 0o077 == 0
        said = [
            engrid("status", "--run-dir", tmp_path),
            engrid("versions", "--run-dir", tmp_path),
            engrid("shard", "--redis", url),
            engrid("shard", "--redis", url.replace("redis:", "http:")),
            engrid("up", "--redis", url, "--run-dir", tmp_path / "new"),
            engrid("up", "--redis", f"me:{secret}@127.0.0.1:{server.port}", "--run-dir", tmp_path / "new"),
        ]
        for each in said:
            assert secret not in each.stdout + each.stderr
        assert secret not in repr(made) + repr(ClusterConfig(run_dir=tmp_path, redis=url)) + made.start_again("s0")


def test_a_record_that_others_could_read_is_replaced_by_one_that_they_cannot(tmp_path):
    beside = Record.path(tmp_path).with_suffix(".tmp")
    beside.write_text("left by a killed command")
    beside.chmod(0o644)
    Record(identity="x", directory="file:/x").save(tmp_path)
    assert Record.path(tmp_path).stat().st_mode & 0o077 == 0
    assert json.loads(Record.path(tmp_path).read_text())["identity"] == "x"


@pytest.mark.parametrize("source", ["localhost:6379", "", "/a/folder", "file:/x", "localhost"])
def test_an_address_without_a_scheme_is_redis_or_refused_and_never_a_folder(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if source == "localhost:6379":
        assert ClusterConfig(run_dir=tmp_path, redis=source).directory == "redis://localhost:6379"
    else:
        for command in ("up", "shard"):
            refused = engrid(command, "--redis", source)
            assert refused.returncode != 0
            assert "names no Redis: give redis://HOST:PORT" in refused.stderr
    assert list(Path.cwd().iterdir()) == []
