"""What an import brings in: a shard runs, and a client works, where neither torch nor Ray is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT = "import sys; sys.modules.update(dict.fromkeys(['torch', 'ray', 'triton', 'tokenizers', 'safetensors']));"


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    "module",
    ["engrid.client", "engrid.shard.grpc.server", "engrid.directory", "engrid.cluster.train", "engrid.cli.ids"],
)
def test_imports_neither_torch_nor_ray(module):
    """The commands among them answer bad input without waiting seconds for it."""
    done = run(f"import sys, {module}; print([name for name in ('torch', 'ray', 'triton') if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("module", ["engrid.cli.app", "engrid.cluster.actors"])
def test_imports_nothing_of_ours_but_the_command_line(module):
    done = run(
        f"import sys, {module}; print(sorted(name for name in sys.modules if name.split('.')[0] in {{'torch', 'ray', 'grpc', 'engrid'}}))"
    )
    ours = {
        "engrid.cli.app": [
            "engrid.cli",
            *(
                f"engrid.cli.{name}"
                for name in ("app", "bench", "checkpoints", "cluster", "console", "demo", "generate", "ids")
            ),
            *(f"engrid.cli.{name}" for name in ("options", "shard", "terminal", "train", "versions")),
            *("engrid.cluster", "engrid.cluster.interrupts", "engrid.host", "engrid.host.search_path"),
        ],
        "engrid.cluster.actors": ["engrid.cluster", "engrid.cluster.actors"],
    }
    assert done.stdout.strip() == str(["engrid", *ours[module]]), done.stderr


def test_hashing_needs_numpy_alone():
    """Row ids of canonical ids, where nothing else of ours, nor what it needs, is installed."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'ray', 'triton', 'tokenizers', 'safetensors', 'grpc', "
        "'google', 'redis']));"
        "import numpy as np; from engrid.addressing.spec import EngramSpec; from engrid.addressing.hashing import NgramHasher;"
        "spec = EngramSpec(layers=(1,), max_ngram=3, heads=2, vocab_size=(11, 13), row_width=4);"
        "print(NgramHasher(spec, 100, 0).row_ids(np.array([[1, 2, 3]]), 1).shape)"
    )
    done = run(code)
    assert done.stdout.strip() == "(1, 3, 4)", done.stderr


def test_engrid_shard_serves_where_torch_and_ray_are_missing(tmp_path: Path):
    code = WITHOUT + "from engrid.cli.app import main; main()"
    shard = subprocess.Popen(
        [sys.executable, "-c", code, "shard", "--run-dir", str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        line = shard.stdout.readline()
        assert "serves at 127.0.0.1:" in line
        rows = run(
            WITHOUT
            + "import numpy as np; from engrid.client import MemoryClient; from engrid.control import create_tables;"
            "from engrid.tables import TableSpec;"
            "spec = TableSpec(name='t', rows=100, row_format='float32', width=4, seed=0, layer=0, init_std=1.0, optimizer=None);"
            "client = MemoryClient('file:' + sys.argv[1]); create_tables(client, [spec]);"
            "print(client.lookup('t', np.arange(3)).shape); client.close()",
            str(tmp_path),
        )
        assert rows.stdout.strip() == "(3, 16)", rows.stderr
    finally:
        shard.terminate()
        assert shard.wait(10) == 0
        shard.stdout.close()
