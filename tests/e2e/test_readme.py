"""README's commands, word for word and in order, by a user with an empty home: once, and once more."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clusters import engrid_processes

pytestmark = pytest.mark.e2e

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def commands(heading):
    """The lines of the first block under a heading."""
    section = README.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.search(r"```\n(.*?)```", section, re.DOTALL)[1].splitlines()


@pytest.fixture
def shell(tmp_path):
    """Runs a line in a folder that is none of ours, engrid on the path as after activating the environment."""
    home, folder = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    folder.mkdir()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"HOME": str(home), "PATH": path, "LANG": "C.UTF-8"}

    def run(line):
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout

    return run


@pytest.mark.timeout(600)
def test_the_commands_run_as_they_stand_twice(shell):
    install, *lines = commands("Use it piece by piece")
    assert install == "make install && . .venv/bin/activate"
    before = engrid_processes()
    for _ in range(2):
        shown = {line: shell(line) for line in lines}
        generated = next(text for line, text in shown.items() if line.startswith("engrid generate"))
        assert generated.startswith("def main(")
    assert engrid_processes() - before == set()
