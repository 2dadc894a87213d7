"""What `engrid train` is asked for: options, any part of a file, and what is named when they are wrong. Without a cluster."""

import json

import pytest

from engrid.cli.train_config import read_config
from engrid.worker.config import TrainConfig
from engrid.worker.saved_model import open_checkpoint
from engrid.worker.train.run import Place, train
from tests.clusters import engrid, succeeded
from tests.worker.conftest import make_out, tiny_config


def file(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_what_is_printed_is_a_whole_configuration_and_is_taken_back(tmp_path):
    options = [
        "--out",
        tmp_path / "o",
        "--layers",
        2,
        "--width",
        64,
        "--heads",
        2,
        "--context",
        128,
        "--rows",
        "500,700",
    ]
    options += ["--engram-layers", "0,1", "--row-width", 8, "--text", tmp_path / "a.txt", "--text", tmp_path / "b"]
    printed = succeeded(engrid("train", "--print-config", *options))
    config = TrainConfig.from_json(json.loads(printed))
    model = config.model
    assert (model.layers, model.d_model, model.heads, model.context, config.length) == (2, 64, 2, 128, 128)
    assert (model.engram.layers, model.engram.vocab_size, model.engram.row_width) == ((0, 1), (500, 700), 8)
    assert config.text == (str(tmp_path / "a.txt"), str(tmp_path / "b"))
    again = succeeded(engrid("train", "--print-config", "--config", file(tmp_path, printed)))
    assert json.loads(again) == json.loads(printed)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"steps": 5}\r\n')
    assert read_config(path, out=tmp_path).steps == 5


def test_options_win_over_a_file_and_a_file_over_the_defaults(tmp_path):
    path = file(
        tmp_path, {"steps": 7, "batch": 3, "model": {"layers": 3, "engram": {"heads": 2}}, "out": str(tmp_path)}
    )
    config = read_config(path, steps=9, model={"heads": 2})
    assert (config.steps, config.batch, config.out) == (9, 3, str(tmp_path))
    assert (config.model.layers, config.model.heads, config.model.d_model) == (3, 2, 128)
    assert (config.model.engram.heads, config.model.engram.row_width) == (2, 32)
    assert read_config(path, run="mine").run == "mine"


@pytest.mark.parametrize(
    ("model", "engram", "expected"),
    [
        ({"layers": 1}, {}, {"layers": (0,)}),
        ({"layers": 2}, {}, {"layers": (1,)}),
        ({}, {"vocab_size": [900]}, {"vocab_size": (900, 900)}),
        ({}, {"max_ngram": 5}, {"vocab_size": (50_000, 150_000, 150_000, 150_000)}),
        ({}, {"max_ngram": 2}, {"vocab_size": (50_000,)}),
    ],
)
def test_what_was_not_said_is_made_to_fit_what_was(tmp_path, model, engram, expected):
    config = read_config(out=tmp_path, model=model, engram=engram)
    assert {name: getattr(config.model.engram, name) for name in expected} == expected
    small = read_config(out=tmp_path, model={"context": 64, "heads": 1, "experts": 1})
    assert (small.length, small.model.kv_heads, small.model.top_k) == (64, 1, 1)


def test_a_run_without_memory_has_no_engram(tmp_path):
    assert read_config(out=tmp_path, memory="off").model.engram is None
    with pytest.raises(ValueError, match="memory is 'off', but options of the Engram"):
        read_config(out=tmp_path, memory="off", engram={"heads": 2})


WRONG = [
    ('{"steps": 3,}', "is no JSON"),
    ('{"steps": 3, "steps": 4}', "'steps' is given twice"),
    ('{"model": ' + "[" * 100_000, "is no JSON"),
    ("[1]", "no JSON object"),
    ("3", "no JSON object"),
    ({"wings": 2}, "the configuration has unknown keys ['wings']"),
    ({"model": {"wings": 2}}, "model has unknown keys ['wings']"),
    ({"model": {"engram": {"wings": 2}}}, "model.engram has unknown keys ['wings']"),
    ({"model": 3}, "model is 3; give a JSON object"),
    ({"model": {"engram": [1]}}, "model.engram is [1]; give a JSON object"),
    ({"model": {"d_model": "wide"}}, "d_model is 'wide'"),
    ({"model": {"rope_theta": "x"}}, "rope_theta is 'x'"),
    ({"model": {"engram": {"layers": "12"}}}, "layers is '12'"),
    ({"model": {"engram": {"layers": [1.5]}}}, "layers[0] is 1.5"),
    ({"model": {"engram": {"heads": "4"}}}, "heads is '4'"),
    ({"model": {"engram": {"vocab_size": 7}}}, "vocab_size is 7"),
    ({"model": {"engram": {"row_format": "int3"}}}, "row_format is 'int3'"),
    ({"model": {"engram": None}}, "memory is 'remote', but the model has no engram"),
    ({"steps": "many"}, "steps is 'many'"),
    ({"steps": None}, "steps is None"),
    ({"save": "yes"}, "save is 'yes'"),
    ({"text": 3}, "text is 3"),
    ({"text": [3]}, "text is [3]"),
    ({"out": 3}, "out is 3"),
    ({"run": "a/b"}, "run 'a/b'"),
    ({"memory": ["off"]}, "memory ['off']"),
    ({"learning_rate": 1e300}, "learning_rate is 1e+300"),
]


@pytest.mark.parametrize(("content", "words"), WRONG, ids=[words for _, words in WRONG])
def test_what_is_wrong_in_a_file_is_named_with_the_file(tmp_path, content, words):
    path = file(tmp_path, content)
    with pytest.raises(ValueError, match=r"mine\.json") as refused:
        read_config(path, out=None if content == {"out": 3} else tmp_path)
    assert words in str(refused.value)


def test_wrong_files_and_options_end_in_one_line(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'{"run": "\xe9"}')
    for name, words in (("nowhere.json", "cannot be read"), ("latin.json", "is no JSON"), (".", "cannot be read")):
        refused = engrid("train", "--print-config", "--config", tmp_path / name)
        assert refused.returncode == 1
        assert words in refused.stderr
        assert "Traceback" not in refused.stderr
    assert "give whole numbers with commas" in engrid("train", "--rows", "many").stderr


def test_going_on_says_how_many_steps_are_needed(tmp_path):
    out = make_out(tmp_path / "out")
    list(train(tiny_config(out, memory="off", steps=3), Place(identity="demo-1"), pytest.fail, "cpu"))
    refused = engrid("train", "--resume", "--out", out)
    assert refused.returncode == 1
    assert "is at step 3 already, and 3 steps were asked for; give --steps with more than 3" in refused.stderr
    assert "no cluster is up" in engrid("train", "--resume", "--out", out, "--steps", 5, "--run-dir", tmp_path).stderr
    config = read_config(out=out, resume=True, steps=5)
    assert config.model == open_checkpoint(out / "checkpoint").model
    assert (config.resume, config.steps, config.batch, config.memory) == (True, 5, 4, "off")
    assert "holds no checkpoint" in engrid("train", "--resume", "--out", tmp_path / "none").stderr
