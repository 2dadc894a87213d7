"""The main job: `engrid demo`, whole and cut off."""

import json
import re
import shlex

from tests.clusters import engrid, engrid_processes, succeeded
from tests.interrupted import interrupt_demo


def test_demo_from_start_to_end(tmp_path):
    before = engrid_processes()
    shown = succeeded(engrid("demo", "--steps", 2, "--out", tmp_path, timeout=220))
    assert engrid_processes() - before == set()
    result = json.loads((tmp_path / "demo.json").read_text())
    for model in ("engram", "plain"):
        assert len(result[model]["losses"]) == 2
        assert 4 < result[model]["validation_loss"] < 9, "of a model that has seen two batches, 8.3 being chance"
    assert result["engram"]["rows_per_token"] > 1
    assert result["engram"]["bytes_per_token"] == 128 * result["engram"]["rows_per_token"]
    assert result["engram"]["exposed_wait"] > 0
    assert 0.2 < result["remote_over_in_process"] < 2
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
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


def test_ctrl_c_in_training_leaves_no_process(tmp_path):
    interrupt_demo(tmp_path, lambda record: record is not None and record.ready)
