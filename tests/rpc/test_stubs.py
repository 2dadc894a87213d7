"""The stubs checked in are what the .proto files give."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATOR = ROOT / ".venv-stubs" / "bin" / "python"


@pytest.mark.parametrize("name", ["memory", "compute"])
def test_stubs_are_not_stale(name, tmp_path):
    assert GENERATOR.exists(), "the stub generator is not installed; run `make stubs` or `make test`"
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [GENERATOR, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", *out, f"engrid/v1/{name}.proto"]
    subprocess.run(command, check=True)
    for made in tmp_path.rglob("*.py*"):
        kept = ROOT / "proto" / made.relative_to(tmp_path)
        assert kept.read_text() == made.read_text(), f"{kept.name} is stale; run `make stubs`"
