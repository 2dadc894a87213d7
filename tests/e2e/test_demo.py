"""The main job: `engrid demo`, whole and cut off."""

import json

from tests.clusters import engrid, engrid_processes, succeeded
from tests.interrupted import interrupt_demo


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
    ):
        assert words in shown, words


def test_ctrl_c_in_training_leaves_no_process(tmp_path):
    interrupt_demo(tmp_path, lambda record: record is not None and record.ready)
