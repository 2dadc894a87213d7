"""The shell's environment and its working folder are the user's, and touch no process of ours."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from engrid.client import MemoryClient
from engrid.cluster.config import Record
from engrid.cluster.environment import child_environment
from engrid.cluster.ray_calls import connected
from engrid.cluster.ray_head import processes_with, ray_environment
from engrid.control.tables import create_tables
from tests.clusters import ENVIRONMENT, engrid, succeeded
from tests.shards import shard_process, table

pytestmark = pytest.mark.e2e

DEAD_PROXY = {
    name: "http://127.0.0.1:1"
    for each in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
    for name in (each, each.upper())
}
SHADOWS = ("random", "queue", "torch", "ray", "grpc", "numpy", "json", "logging", "typer", "selectors")


@pytest.fixture
def hostile(tmp_path):
    """A working folder with modules of names that we import; each leaves a file beside if it is run."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(
            f"open({str(tmp_path / f'ran-{name}')!r}, 'w').close()\nraise SystemExit(7)\n"
        )
    yield folder
    assert [each.name for each in tmp_path.glob("ran-*")] == []


@contextmanager
def shard_in(folder, command, run_dir):
    environment = {**ENVIRONMENT, **DEAD_PROXY}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert "serves at" in process.stdout.readline(), process.stderr.read()
        yield
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("module", ["engrid.shard", "engrid.cli.app"])
def test_modules_in_the_working_folder_of_a_shard_are_not_run(hostile, tmp_path, module):
    options = {
        "engrid.shard": ["--name", "s0", "--directory", f"file:{tmp_path}"],
        "engrid.cli.app": ["shard", "--run-dir", str(tmp_path)],
    }[module]
    with shard_in(hostile, [sys.executable, "-m", module, *options], tmp_path), MemoryClient(tmp_path) as client:
        create_tables(client, [table()])
        assert len(client.lookup("t", np.arange(3))) == 3


@pytest.mark.parametrize("path", [f"{os.pathsep}/nowhere", f"/nowhere{os.pathsep}"])
def test_an_empty_entry_of_pythonpath_runs_nothing_of_the_working_folder(hostile, tmp_path, path, monkeypatch):
    """`PYTHONPATH=$PYTHONPATH:/mine` leaves one."""
    monkeypatch.chdir(hostile)
    done = engrid("versions", "--run-dir", tmp_path / "none", env={"PYTHONPATH": path})
    assert "nothing is up" in done.stderr


def test_a_proxy_of_the_shell_is_not_asked_for_shards(tmp_path, monkeypatch):
    for name, value in DEAD_PROXY.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("no_proxy", raising=False)
    with shard_process(tmp_path), MemoryClient(tmp_path) as client:
        create_tables(client, [table()])
        started = time.monotonic()
        assert len(client.lookup("t", np.arange(3), timeout=30.0)) == 3
        assert time.monotonic() - started < 25
        assert "not reachable" not in succeeded(engrid("status", "--run-dir", tmp_path, env=DEAD_PROXY))


def test_a_cluster_comes_up_in_a_hostile_shell_and_none_of_it_is_passed_on(hostile, tmp_path):
    """Modules in the working folder, a dead proxy, another Ray's address, a relative PYTHONPATH."""
    run_dir = tmp_path / "a #1?"
    shell = {
        **ENVIRONMENT,
        **DEAD_PROXY,
        "RAY_ADDRESS": "127.0.0.1:1",
        "RAY_NAMESPACE": "other",
        "RAY_TMPDIR": "/nowhere",
        "PYTHONPATH": "lib",
        "LC_ALL": "C",
    }

    def run(*words):
        command = [sys.executable, "-P", "-m", "engrid.cli.app", *words, "--run-dir", "../a #1?"]
        return subprocess.run(
            command,
            cwd=hostile,
            env=shell,
            capture_output=True,
            text=True,
            timeout=150,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    try:
        succeeded(run("up", "--shards", "1", "--workers", "1", "--memory", "0.1"))
        record = Record.load(run_dir)
        assert "idle" in succeeded(run("status"))
        with connected(record.ray_address, record.namespace, ray_environment(record.ray_temp), seconds=60):
            pass
        for pid in processes_with(record.ray_temp):
            seen = environment_of(pid)
            assert not {name for name in seen if name.lower() in DEAD_PROXY}
            assert seen.get("RAY_ADDRESS") != "127.0.0.1:1"
            assert seen["PYTHONSAFEPATH"] == "1"
            assert not {"RAY_TMPDIR", "RAY_NAMESPACE"} & seen.keys()
            assert str(Path(f"/proc/{pid}/cwd").readlink()).startswith(record.ray_temp)
            assert seen["PYTHONPATH"] == str(hostile / "lib")
    finally:
        succeeded(run("down"))


def environment_of(pid):
    with open(f"/proc/{pid}/environ", "rb") as file:  # noqa: PTH123
        pairs = [each.partition(b"=") for each in file.read().split(b"\0") if each]
    return {name.decode(): value.decode(errors="replace") for name, _, value in pairs}


def test_what_is_passed_on():
    shell = {
        "HTTP_PROXY": "x",
        "No_Proxy": "y",
        "RAY_AUTH_MODE": "token",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": ":a::/b",
    }
    ours = child_environment(shell, keep_ray=False)
    assert ours == {
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": f"{os.path.abspath('a')}:/b",  # noqa: PTH100
        "PYTHONSAFEPATH": "1",
        "PYTHONUTF8": "1",
    }
    assert child_environment(shell, keep_ray=True)["RAY_AUTH_MODE"] == "token"
    assert "PYTHONPATH" not in child_environment({"PYTHONPATH": ""}, keep_ray=False)


@pytest.mark.parametrize("home", [{"HOME": "relative"}, {"HOME": "relative", "XDG_STATE_HOME": "relative"}], ids=str)
def test_without_a_home_the_run_directory_is_asked_for(home, tmp_path):
    refused = subprocess.run(
        [sys.executable, "-P", "-m", "engrid.cli.app", "status"],
        cwd=tmp_path, env={**ENVIRONMENT, "XDG_STATE_HOME": "", **home}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "give --run-dir, or set HOME" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_command_whose_working_folder_was_removed_works_with_absolute_paths(tmp_path):
    gone = tmp_path / "gone"
    script = f"""
import os, sys
os.mkdir({str(gone)!r}); os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})
os.execv(sys.executable, [sys.executable, "-P", "-m", "engrid.cli.app", *sys.argv[1:]])
"""

    def run(*words):
        command = [sys.executable, "-c", script, *words]
        return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)

    with shard_process(tmp_path / "run"):
        assert "s0" in succeeded(run("status", "--run-dir", str(tmp_path / "run")))
        refused = run("status", "--run-dir", "run")
        assert refused.returncode == 1
        assert "Traceback" not in refused.stderr
        assert "the working folder is gone" in refused.stderr
