"""What README shows runs."""

import re
import subprocess
import sys
from pathlib import Path

from tests.shards import shard_process

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_example_runs_against_a_shard(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert '"/tmp/engrid"' in example
    code = example.replace("/tmp/engrid", str(tmp_path)) + "\nassert rows.shape == (3, 128)\n"
    with shard_process(tmp_path):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_every_path_named_exists():
    root = Path(__file__).parents[1]
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README) + re.findall(
        r"`((?:model|services)/[a-z_/]+\.py)`", README
    ):
        assert (root / path).exists(), path
