"""`engrid bench`: each subcommand as a smoke run, and what it refuses."""

import json
import os

import pytest

from tests.clusters import engrid, succeeded

DATA_MARKS = {
    "uncached_vs_socket",
    "uncached_vs_redis",
    "uncached_vs_ray_call",
    "uncached_vs_mooncake",
    "one_token_vs_echo",
    "one_token_p99_over_p50",
    "shared_memory_vs_local",
    "text_hot_vs_local",
    "text_warm_vs_local",
    "text_cold_vs_naive",
    "model_prefill_vs_local",
    "model_decode_vs_local",
    "exposed_wait_share",
    "table_4g_vs_64m",
    "clients_8_vs_1",
}
TRAIN_MARKS = {
    "push_vs_local",
    "durable_vs_bound",
    "replay_vs_live",
    "train_vs_local",
    "checkpoint_step_slowdown",
    "load_vs_disk",
}
PNG = b"\x89PNG"


def bench(name, path, *options, env=None):
    """What a smoke run printed and wrote."""
    printed = succeeded(engrid("bench", name, "--quick", "--repeats", 1, "--json", path, *options, env=env))
    assert path.with_suffix(".png").read_bytes().startswith(PNG)
    return printed, json.loads(path.read_text())


@pytest.fixture
def no_peers(tmp_path):
    """The environment of a command that finds none of the other systems."""
    for name in ("hiredis", "ray", "mooncake"):
        (tmp_path / "missing" / name).mkdir(parents=True)
        (tmp_path / "missing" / name / "__init__.py").write_text(f"raise ImportError('no {name} here')")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path / "missing"), *filter(None, [os.environ.get("PYTHONPATH")])])}


@pytest.mark.faults
def test_lookup_compares_every_path(tmp_path):
    printed, found = bench("lookup", tmp_path / "new" / "lookup.json")
    assert {line["path"] for line in found["lines"]} >= {
        "in process",
        "Engrid",
        "raw socket",
        "naive",
        "Engrid, 2 clients",
    }
    assert all(line["values"][0] > 0 and line["over"][0] > 0 for line in found["lines"])
    assert found["about"]["cpu"]
    assert found["about"]["cpu"] in printed


@pytest.mark.faults
def test_model_measures_every_way_to_the_rows(tmp_path):
    _, found = bench("model", tmp_path / "model.json")
    rates = [line for line in found["lines"] if line["unit"] == "tokens/s"]
    assert {line["path"] for line in rates} == {"in process", "gRPC, cache", "gRPC, no cache", "shared memory"}
    assert all(line["values"][0] > 0 for line in rates)


@pytest.mark.e2e
def test_marks_are_flat_and_complete_where_peers_are_missing(tmp_path, no_peers):
    printed, found = bench("marks", tmp_path / "marks.json", "--group", "data", env=no_peers)
    assert found.keys() >= DATA_MARKS
    assert not any(isinstance(value, dict | list) for value in found.values())
    missing = {name for name in DATA_MARKS if found[name] is None}
    assert missing == {"uncached_vs_redis", "uncached_vs_ray_call", "uncached_vs_mooncake"}
    assert "not measured: " in printed


@pytest.mark.e2e
def test_marks_of_training_are_flat_and_complete(tmp_path):
    _, found = bench("marks", tmp_path / "train.json", "--group", "train")
    assert all(found[name] > 0 for name in TRAIN_MARKS)
    assert not any(isinstance(value, dict | list) for value in found.values())


def test_peers_says_what_is_missing_and_why(tmp_path, no_peers):
    printed, found = bench("peers", tmp_path / "peers.json", env=no_peers)
    assert "no hiredis here" in printed
    assert "pip install" in printed
    assert {line["path"] for line in found["lines"] if not line["values"]} == {
        "Redis MGET",
        "Ray actor call",
        "Mooncake EngramStore",
    }


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["marks", "--group", "nothing"], "group 'nothing': give one of data"),
        (["marks", "--json", "/proc/marks.json"], "/proc/marks.json"),
        (["lookup", "--json", "/dev/null/lookup.json"], "/dev/null"),
    ],
)
def test_bad_input_is_named_in_one_line(arguments, match):
    refused = engrid("bench", *arguments)
    assert refused.returncode == 1
    assert match in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_a_package_without_the_benchmarks_says_what_it_needs(tmp_path, monkeypatch):
    from engrid.cli import bench as command

    monkeypatch.setattr(command, "ROOT", tmp_path)
    from typer.testing import CliRunner

    refused = CliRunner().invoke(command.app, ["lookup", "--quick"])
    assert refused.exit_code == 1
    assert "needs a source checkout" in refused.stderr
