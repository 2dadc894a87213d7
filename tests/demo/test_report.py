"""The demo's tables on a terminal of 80 columns, and what it says at its end."""

import io
import shlex

import pytest
from rich.console import Console
from typer.testing import CliRunner

from engrid.cli.app import app
from engrid.demo.report import next_commands, result_table, trace_table, whole_lines
from engrid.demo.run import as_typed
from engrid.v1 import compute_pb2 as pb

RUN = {
    "steps": 250,
    "validation_loss": 14.6965,
    "parameters": 12_630_000,
    "table_values": 151_200_000,
    "tokens_per_second": 13828.0,
    "rows_per_token": 10.68,
    "bytes_per_token": 11367.0,
    "exposed_wait": 0.12587,
    "exposed_wait_share": 0.211,
    "push_seconds": 0.12717,
    "collisions": [
        {"order": order, "ngrams": 12_769_212, "one_head": 0.994, "all_heads": 0.9764, "same_in_all": 0.000001}
        for order in (2, 3)
    ],
}
RESULT = {
    "engram": RUN,
    "plain": RUN,
    "seconds": 1380.4,
    "prefill_tokens_per_second": 14901.0,
    "decode_tokens_per_second": 1175.52,
    "remote_over_in_process": 0.925,
}
UNITS = ["nats per token", "million; 12.63 without", "tokens/s, one sequence", "rows per token, deduped",
         "ms per step, 21.1%", "of training's tokens/s", "of them: cannot be told", "of them, mean of heads"]  # fmt: skip


def shown(table):
    out = io.StringIO()
    Console(file=out, width=80).print(table)
    return out.getvalue()


def test_the_table_fits_80_columns_and_breaks_no_unit():
    text = shown(result_table(RESULT))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for unit in UNITS:
        assert unit in text, unit
    for value in ("14.6965", "151.2", "13,828", "14,901", "1,175.5", "125.87", "12,769,212", "0.0001%"):
        assert value in text, value


def test_the_traced_rows_fit_80_columns_unbroken():
    ids = list(range(399_997, 400_001))
    ngrams = [pb.NgramTrace(text=text, row_ids=ids) for text in (" Potter dropped", " Harry Potter dropped")]
    traces = [pb.TokenTrace(token=" dropped [x]", layer=layer, ngrams=ngrams, gates=[0.5]) for layer in (1, 2)]
    text = shown(trace_table("Harry Potter dropped his wand", traces))
    assert max(map(len, text.splitlines())) <= 80
    assert text.count(" ".join(map(str, ids))) == 4
    assert text.count("0.500") == 2


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("def f():\n    return 1\n    x = ", "def f():\n    return 1"),
        ("def f():\n    ret", "def f():\n    ret"),
        ("one", "one"),
        ("a\nb\n\n  \n", "a\nb"),
    ],
)
def test_a_line_that_generation_broke_off_in_is_not_shown(text, whole):
    assert whole_lines(text) == whole


def test_what_to_type_next_is_understood_by_the_command_line():
    for command, what in next_commands("engrid", "a folder"):
        words = shlex.split(command)
        assert words[0] == "engrid"
        assert what
        done = CliRunner().invoke(app, [*words[1:], "--help"])
        assert done.exit_code == 0, command
        options = [word for word in words if word.startswith("--")]
        assert [option for option in options if option not in done.output] == []
    assert "'a folder/checkpoint'" in next_commands("engrid", "a folder")[1][0]


def test_a_path_is_shown_as_it_is_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert as_typed(tmp_path / "demo") == "demo"
    assert as_typed(tmp_path.parent / "x") == str(tmp_path.parent / "x")
