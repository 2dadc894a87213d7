"""The main job: `engrid demo`, whole and cut off."""

import json
import re
import shlex

import pytest

from engrid.worker.saved_model import open_checkpoint
from tests.clusters import engrid, engrid_processes, succeeded
from tests.interrupted import interrupt_demo

pytestmark = pytest.mark.e2e


def test_demo_from_start_to_end(tmp_path):
    before = engrid_processes()
    shown = succeeded(engrid("demo", "--steps", 2, "--out", tmp_path, timeout=220))
    assert engrid_processes() - before == set()
    result = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    for model in ("engram", "plain"):
        assert len(result[model]["losses"]) == 2
        assert 4 < result[model]["validation_loss"] < 9, "of a model that has seen two batches, 8.3 being chance"
    assert result["engram"]["rows_per_token"] > 1
    assert result["engram"]["bytes_per_token"] == 128 * result["engram"]["rows_per_token"]
    assert result["engram"]["exposed_wait"] > 0
    assert result["remote_over_in_process"] > 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert result["engram"]["checkpoint"] == str(tmp_path / "checkpoint" / "step-00000002")
    assert open_checkpoint(tmp_path / "checkpoint").step == 2
    assert not (tmp_path / "unfinished").exists()
    for words in (
        "validation loss, with Engram",
        "same model without",
        "exposed wait",
        "remote memory / in-process tables",
        "2-grams of the text, distinct",
        "share all K rows with one other",
        "'Harry'",
        "tokens/s, one sequence",
        "next, on the checkpoint of this run:",
    ):
        assert words in shown, words
    _type_what_it_says(shown, tmp_path)


def _type_what_it_says(shown, folder):
    """Each command it ends with, but for the training of 300 steps."""
    commands = re.findall(r"^  (engrid .*?)  # ", shown, re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["up", "generate", "ids", "train", "down"]
    for command in commands:
        words = shlex.split(command)[1:]
        if words[0] != "train":
            succeeded(engrid(*words, env={"XDG_STATE_HOME": str(folder / "state")}))


def test_ctrl_c_in_training_leaves_no_process_and_what_an_earlier_demo_left(tmp_path):
    earlier = {
        "demo.json": "{}",
        "curves.png": "picture",
        "result.json": "{}",
        "checkpoint/step-00000250/manifest.json": "x",
    }
    for name, content in earlier.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    interrupt_demo(tmp_path, lambda record: record is not None and record.ready)
    assert {name: (tmp_path / name).read_text(encoding="utf-8") for name in earlier} == earlier
    assert not (tmp_path / "unfinished").exists()
