"""`engrid shard`, `engrid status` and what the commands say to bad input; no Ray."""

import signal
from contextlib import contextmanager

import pytest

from engrid.client import MemoryClient, create_tables
from engrid.rpc.errors import OutOfMemoryError
from tests.clusters import engrid, start_engrid, succeeded
from tests.shards import table


@contextmanager
def shard(run_dir, *options):
    process = start_engrid("shard", "--run-dir", run_dir, *options)
    try:
        line = process.stdout.readline()
        assert "serves at" in line, process.stderr.read()
        yield process, line.split()[1], line.split()[-1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_shard_serves_until_a_signal_and_leaves_the_directory(tmp_path, number):
    with shard(tmp_path) as (process, name, address):
        with MemoryClient(f"file:{tmp_path}") as client:
            create_tables(client, [table()])
        shown = succeeded(engrid("status", "--run-dir", tmp_path))
        assert name in shown
        assert address in shown
        assert "1,000" in shown, "the table's rows"
        process.send_signal(number)
        assert process.wait(10) == 0
    gone = engrid("status", "--run-dir", tmp_path)
    assert gone.returncode == 1
    assert "nothing is up" in gone.stderr


def test_status_says_of_a_killed_shard_that_it_is_not_reachable(tmp_path):
    with shard(tmp_path) as (process, name, _):
        process.kill()
        process.wait()
        shown = succeeded(engrid("status", "--run-dir", tmp_path))
        assert "not reachable" in shown
        assert name in shown


def test_two_shards_on_one_port_are_refused_with_the_port(tmp_path):
    with shard(tmp_path) as (_, _, address):
        second = engrid("shard", "--run-dir", tmp_path, "--listen", address)
        assert second.returncode == 1
        assert f"cannot listen on {address}: the port is in use" in second.stderr
        assert "Traceback" not in second.stderr


def test_two_shards_of_one_name_are_refused_with_the_address_of_the_first(tmp_path):
    with shard(tmp_path, "--name", "s0") as (_, _, address):
        second = engrid("shard", "--run-dir", tmp_path, "--name", "s0")
        assert second.returncode == 1
        assert "shard name s0 is taken" in second.stderr
        assert address in second.stderr


def test_a_table_too_large_for_the_shards_is_refused_before_anything_is_allocated(tmp_path):
    with shard(tmp_path, "--memory", "0.001"), MemoryClient(f"file:{tmp_path}") as client:
        with pytest.raises(
            OutOfMemoryError, match=r"would hold 9.16 MiB .* over its limit of 1.02 MiB; use more shards"
        ):
            create_tables(client, [table("large", rows=300_000)])
        create_tables(client, [table("small")])
        assert list(client.placement.tables) == ["small"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["shard", "--listen", "nonsense"], "listen 'nonsense': give HOST:PORT"),
        (["shard", "--memory", "-1"], "memory_bytes -1073741824"),
        (["shard", "--listen", "203.0.113.9:1"], "cannot listen on 203.0.113.9:1"),
        (["shard", "--redis", "http://x"], "directory 'http://x' is unknown"),
        (["up", "--shards", "0"], "give at least 1 shard"),
        (["up", "--memory", "90000"], "this machine has"),
        (["down"], ""),
        (["train"], "no cluster is up"),
        (["train", "--steps", "0"], "steps is 0; give an integer from 1"),
        (["train", "--memory", "disk"], "memory 'disk': give one of remote, in_process, off"),
        (["train", "--config", "/nowhere.json"], "/nowhere.json"),
        (["generate", "x"], "no cluster is up"),
        (["status"], "nothing is up"),
    ],
)
def test_bad_input_is_named_in_one_line(tmp_path, arguments, match):
    done = engrid(*arguments, "--run-dir", tmp_path)
    assert done.returncode == (0 if arguments == ["down"] else 1)
    assert match in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_every_command_has_help():
    commands = ["up", "down", "status", "shard", "train", "generate", "ids", "demo"]
    shown = succeeded(engrid("--help"))
    assert all(command in shown for command in commands)
    for command in commands:
        assert "--help" in succeeded(engrid(command, "--help"))
