"""What README shows is there and runs. Its commands on a cluster: e2e/test_readme.py."""

import re
import subprocess
import sys
from pathlib import Path

from tests.shards import shard_process

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs_again_and_after_the_shard_was_started_again(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert '"/tmp/engrid"' in example
    code = example.replace("/tmp/engrid", str(tmp_path / "run")) + "\nassert rows.shape == (3, 32)\n"
    for steps in ((1, 2), (3, 4)):
        with shard_process(tmp_path / "run", "s0", "--state", str(tmp_path / "state")):  # at another port each time
            for step in steps:
                done = subprocess.run(
                    [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
                )
                assert done.returncode == 0, done.stderr
                assert done.stdout.startswith(f"step {step}: [")


def test_every_path_named_exists():
    root = Path(__file__).parents[1]
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README) + re.findall(
        r"`((?:model|services)/[a-z_/]+\.py)`", README
    ):
        assert (root / path).exists(), path
