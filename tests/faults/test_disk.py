"""Disks that are full, read-only or damaged, under real shards."""

import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from engrid.client import MemoryClient, TrainingRun
from engrid.client.config import ClientConfig
from engrid.control.tables import create_tables
from engrid.rpc.errors import DiskFullError, ShardUnavailableError
from tests.clusters import ENGRID
from tests.mortal import SPEC, MortalShard, Pushers, free_port
from tests.shards import local_shards, table

MIB = 1 << 20


@contextmanager
def mounted(folder, *options):
    """A tmpfs at `folder`; where it cannot be mounted the test is skipped."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", *options, "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def push_until_full(pushers):
    """Returns what the refusal says."""
    for _ in range(2000):
        try:
            pushers.push()
        except DiskFullError as refused:
            return str(refused)
    pytest.fail("the disk never was full")


@pytest.mark.parametrize("durable", [True, False], ids=["durable", "memory"])
def test_full_disk_refuses_pushes_and_the_same_push_goes_through_once_there_is_room(tmp_path, durable):
    with (
        mounted(tmp_path / "small", "-o", "size=3m") as disk,
        MortalShard(tmp_path, state=disk / "state") as shard,
        MemoryClient(f"file:{tmp_path}") as client,
    ):
        create_tables(client, [SPEC])
        with Pushers(tmp_path, workers=1, durable=durable, seed=3) as pushers:
            pushers.push()
            filler = disk / "filler"
            filler.write_bytes(bytes(2 * MIB))
            told = push_until_full(pushers)
            assert "make room on the disk" in told
            assert "No space left" in told
            pushers.check()  # reads go on, and hold what was acknowledged
            with pytest.raises(DiskFullError):
                pushers.push_again()
            filler.unlink()
            pushers.push_again()
            pushers.check()
            pushers.push()
            shard.kill()
            shard.start()
            pushers.check()
            pushers.push()
            pushers.check()


@pytest.mark.parametrize("free", [MIB // 2, 6 * MIB], ids=["seen before it begins", "found while it is written"])
def test_base_that_does_not_fit_the_disk_leaves_no_files_and_pushes_go_on(tmp_path, free, monkeypatch):
    spec = table("large", rows=40_000, width=16)
    with mounted(tmp_path / "small", "-o", "size=2m") as disk:
        monkeypatch.setattr("engrid.storage.disk.LocalDisk.free_bytes", lambda _: free)
        kept = {"state": disk / "state", "listen": f"127.0.0.1:{free_port()}", "log_bytes": 50_000}
        with local_shards(tmp_path, 1, **kept) as (server,), MemoryClient(f"file:{tmp_path}") as client:
            create_tables(client, [SPEC, spec])
            with Pushers(tmp_path, workers=1, durable=False, seed=4) as pushers:
                for _ in range(50):
                    pushers.push_through(DiskFullError)
                pushers.check()
                server.stop()
                base = disk / "state" / "base"
                assert not base.exists() or not list(base.iterdir())
        with local_shards(tmp_path, 1, **kept), MemoryClient(f"file:{tmp_path}") as client:
            run = TrainingRun(client, run="r", attempt=2, worker=0, workers=1, tables=["t"])
            assert run.step == 50


def refused_to_start(command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def start_by_hand(folder, state):
    return [sys.executable, "-m", "engrid.shard", "--name", "s0", "--directory", f"file:{folder}", "--state", state]


def start_by_command(folder, state):
    return [*ENGRID, "shard", "--name", "s0", "--run-dir", folder, "--state", state]


STARTS = pytest.mark.parametrize("start", [start_by_hand, start_by_command])


@STARTS
def test_read_only_state_folder_is_refused_at_the_start(tmp_path, start):
    with mounted(tmp_path / "disk", "-o", "size=1m,ro") as disk:
        told = refused_to_start(start(tmp_path, disk / "state"))
    assert "Read-only file system" in told
    assert str(disk) in told


def test_disk_that_becomes_read_only_refuses_pushes_and_reads_go_on(tmp_path, monkeypatch):
    """As a file system does that the kernel no longer trusts."""
    config = ClientConfig(push_timeout=0.5)
    kept = {"state": tmp_path / "state", "listen": f"127.0.0.1:{free_port()}"}
    with (
        local_shards(tmp_path, 1, **kept),
        MemoryClient(f"file:{tmp_path}", config=config) as client,
    ):
        create_tables(client, [SPEC])
        with Pushers(tmp_path, workers=1, durable=True, seed=5, push_timeout=0.5) as pushers:
            pushers.push()
            with monkeypatch.context() as read_only:
                read_only.setattr("engrid.storage.disk.os.writev", refuse)
                with pytest.raises(ShardUnavailableError, match=r"Read-only.*Look at the disk, then start the shard"):
                    pushers.push()
            pushers.check()
            with pytest.raises(ShardUnavailableError, match="takes nothing more"):
                pushers.push_again()
            pushers.check()
    with local_shards(tmp_path, 1, **kept), MemoryClient(f"file:{tmp_path}") as client:
        run = TrainingRun(client, run="r", attempt=2, worker=0, workers=1, tables=["t"])
        assert run.step == 1


def refuse(*_):
    raise OSError(30, os.strerror(30))


@STARTS
def test_damage_in_the_middle_of_the_log_is_refused_and_named(tmp_path, start):
    with MortalShard(tmp_path) as shard, MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [SPEC])
        with Pushers(tmp_path, durable=True, seed=6) as pushers:
            for _ in range(20):
                pushers.push()
            shard.kill()
            (segment,) = (shard.state / "log").iterdir()
            content = bytearray(segment.read_bytes())
            middle = len(content) // 2
            content[middle] ^= 1
            segment.write_bytes(content)
            told = refused_to_start(start(tmp_path, shard.state))
            assert segment.name in told
            record_at = int(re.search(r"byte\s+(\d+)", told)[1])
            assert middle - 5000 < record_at <= middle, "where the record begins that holds the damaged byte"
            assert "restore a checkpoint" in told
            assert segment.read_bytes() == content, "left as it was"
            content[middle] ^= 1
            segment.write_bytes(content)
            shard.start()
            pushers.check()


def test_damaged_base_is_refused_and_named(tmp_path):
    with MortalShard(tmp_path, "s0", "--log-bytes", "5000") as shard, MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [SPEC])
        with Pushers(tmp_path, durable=True, seed=7) as pushers:
            for _ in range(30):
                pushers.push()
            deadline = time.monotonic() + 10
            while not (bases := list(shard.state.glob("base/0*/tables/*"))):
                assert time.monotonic() < deadline
                pushers.push()
            shard.kill()
            damaged = max(shard.state.glob("base/0*/tables/*"))
            content = bytearray(damaged.read_bytes())
            content[-9] ^= 16
            damaged.write_bytes(content)
            told = refused_to_start(start_by_hand(tmp_path, shard.state))
            assert damaged.name in told.replace("\n", ""), bases
