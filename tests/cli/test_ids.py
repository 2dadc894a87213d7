"""`engrid ids`: the integers other implementations are checked against."""

import itertools
import json
from pathlib import Path

import pytest

from tests.clusters import engrid, succeeded

TEXT = "Harry Potter dropped his wand"
VECTORS = json.loads((Path(__file__).parents[1] / "golden" / "engram_vectors.json").read_text())


@pytest.mark.parametrize("case", [case for case in VECTORS["cases"] if case["config"] == "demo"][::3])
def test_the_golden_vectors_come_out_of_the_command(case):
    done = engrid("ids", case["text"], "--preset", "paper", "--layer", case["layer"], "--json")
    found = json.loads(succeeded(done))
    sizes = itertools.chain(*VECTORS["primes"]["demo"][str(case["layer"])])
    offsets = list(itertools.accumulate(sizes, initial=0))[:-1]
    rows = [
        [row + offset for row, offset in zip(rows, offsets, strict=True)] for rows in case["rows_without_bucket_offset"]
    ]
    assert found == {"token_ids": case["token_ids"], "canonical_ids": case["canonical_ids"], "row_ids": rows}


def test_the_table_shows_every_token():
    shown = succeeded(engrid("ids", TEXT, "--layer", 1))
    assert "Harry" in shown
    assert "16 rows each" in shown


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--layer", "3"], "layer 3: preset paper has Engram layers 1, 15"),
        (
            ["--layer", "1", "--preset", "demo"],
            "preset 'demo': give one of paper, v41, or for a model that was trained here",
        ),
        (["--layer", "1", "--checkpoint", "/nowhere"], "/nowhere holds no checkpoint"),
        (["--layer", "1", "--checkpoint", "/nowhere", "--preset", "paper"], "give --checkpoint alone"),
        (["--layer", "1", "--tokenizer", "/nowhere.json"], "tokenizer /nowhere.json: no such file"),
        (["--layer", "1", "--tokenizer", __file__], "not a tokenizer.json"),
    ],
)
def test_bad_input_is_named_in_one_line(arguments, match):
    refused = engrid("ids", TEXT, *arguments)
    assert refused.returncode == 1
    assert match in refused.stderr
    assert "Traceback" not in refused.stderr


def test_empty_text_has_no_rows():
    found = json.loads(succeeded(engrid("ids", "", "--layer", 1, "--json")))
    assert found == {"token_ids": [], "canonical_ids": [], "row_ids": []}
