"""The command line as a user runs it: real processes, a real Ray of the test's own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from engrid.cluster.config import Record
from engrid.cluster.ray_head import MARK, processes_with

ENVIRONMENT = {**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
ENGRID = [sys.executable, "-m", "engrid.cli.app"]


def engrid(*arguments, timeout=120, env=None):
    """Runs one command to its end."""
    return subprocess.run(
        [*ENGRID, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**ENVIRONMENT, **(env or {})},
    )


def start_engrid(*arguments, env=None):
    """Starts one command in a process group of its own, as a shell does."""
    return subprocess.Popen(
        [*ENGRID, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**ENVIRONMENT, **(env or {})},
        start_new_session=True,
        # A shell that runs the tests in the background leaves SIGINT ignored, and a child would ignore it too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def succeeded(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def engrid_processes(mark=f"{MARK}="):
    """Every process of this machine that a Ray of Engrid's started, or that has another mark in its environment."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes():
                    found.add(int(entry.name))
    return found


@contextmanager
def cluster_up(run_dir, *options):
    """`engrid up`, then its record; `engrid down` at the end, after which no process of it may be left."""
    succeeded(engrid("up", "--run-dir", run_dir, "--memory", "0.25", *options))
    record = Record.load(run_dir)
    try:
        yield record
    finally:
        succeeded(engrid("down", "--run-dir", run_dir))
        assert processes_with(record.ray_temp) == set()


def tiny_training(folder: Path) -> Path:
    """A TrainConfig of a second or two, as a file for `engrid train --config`."""
    from engrid.worker.config import TrainConfig, demo_model
    from engrid.worker.train.text import standard_library

    values = TrainConfig(run="tiny", out=str(folder), steps=3, batch=2, length=32, evaluations=1).to_json()
    engram = {**demo_model().to_json()["engram"], "vocab_size": [500, 700], "heads": 2, "row_width": 8}
    values["model"] |= {"vocab_size": 300, "d_model": 32, "experts": 2, "context": 64, "engram": engram}
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for name in ("abc", "ast", "base64", "bisect", "calendar", "cmd", "code", "codecs", "copy", "csv", "dis", "enum"):
        shutil.copy(standard_library() / f"{name}.py", text)
    values["text"] = str(text)
    path = folder / "tiny.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path
