"""Whatever is wrong with a checkpoint is found before anything is loaded, and the file is named."""

import hashlib
import json
import re

import pytest

from engrid.storage import manifest as storage_manifest
from engrid.storage.errors import CheckpointError
from engrid.worker.saved_model import open_checkpoint
from engrid.worker.serve.engine import Engine
from tests.worker.conftest import copy_of

NAME = "step-00000090"
FILES = [
    "model.safetensors",
    "tokenizer.json",
    *(f"tables/demo.engram.{layer}-0000{index}.rows.safetensors" for layer in range(2) for index in range(2)),
]


@pytest.fixture
def checkpoint(trained, tmp_path):
    return copy_of(trained.checkpoint, tmp_path / "checkpoint" / NAME)


def load(checkpoint, client):
    Engine(open_checkpoint(checkpoint), client, "cpu")


def assert_refused(checkpoint, client, name):
    with pytest.raises(CheckpointError, match=re.escape(f"{NAME}/{name}") + "|" + re.escape(f"holds no {name}")):
        load(checkpoint, client)
    client.connections.refresh()
    assert not client.connections.epoch, "no table was made"


def test_the_files_are_those_damaged_here(checkpoint):
    found = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert found >= {*FILES, "manifest.json", "optimizer.safetensors"}
    assert open_checkpoint(checkpoint).manifest.sha256s().keys() == found - {"manifest.json"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_damaged_byte_is_found_and_the_file_named(checkpoint, store, name, where):
    contents = bytearray((checkpoint / name).read_bytes())
    at = {"first": 0, "middle": len(contents) // 2, "last": len(contents) - 1}[where]
    contents[at] ^= 1
    (checkpoint / name).write_bytes(contents)
    assert_refused(checkpoint, store, name)


@pytest.mark.parametrize("name", FILES)
def test_file_that_is_short_or_missing_is_named(checkpoint, store, name):
    contents = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(contents[:-1])
    assert_refused(checkpoint, store, name)
    (checkpoint / name).unlink()
    assert_refused(checkpoint, store, name)
    (checkpoint / name).write_bytes(contents)
    load(checkpoint, store)


MANIFEST_BYTES = [
    (r'("step": 9)0', r"\g<1>1"),
    (r'("run": "dem)o', r"\1n"),
    (r'("attempt": )1', r"\g<1>2"),
    (r'("rope_theta": 1000)0', r"\g<1>1"),
    (r'("engram": {.*?"seed": )0', r"\g<1>1"),
    (r'("engram": {.*?"pad_token_id": )0', r"\g<1>1"),
]


@pytest.mark.parametrize(("before", "after"), MANIFEST_BYTES, ids=["step", "run", "attempt", "rope", "seed", "pad"])
def test_one_damaged_byte_of_the_manifest_is_found(checkpoint, store, before, after):
    """No other file tells: another seed of the hash, say, reads rows that mean nothing."""
    path = checkpoint / "manifest.json"
    contents = path.read_text(encoding="utf-8")
    damaged = re.sub(before, after, contents, count=1, flags=re.DOTALL)
    assert sum(ours != theirs for ours, theirs in zip(contents, damaged, strict=True)) == 1
    path.write_text(damaged, encoding="utf-8")
    assert_refused(checkpoint, store, "manifest.json")


def change(checkpoint, **changes):
    """Another manifest with a digest that is right: what a bug would write, and no accident."""
    path = checkpoint / "manifest.json"
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    del values["digest"]
    path.write_text(json.dumps(values | {"digest": storage_manifest._digest(values)}), encoding="utf-8")


def test_folder_without_a_manifest_is_no_checkpoint(checkpoint, store, tmp_path):
    (checkpoint / "manifest.json").unlink()
    for folder in (checkpoint, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=f"{folder} holds no checkpoint"):
            load(folder, store)


def test_folder_of_another_name_is_refused(checkpoint, store, tmp_path):
    with pytest.raises(CheckpointError, match=f"holds checkpoint {NAME}; give the folder that name"):
        load(checkpoint.rename(tmp_path / "renamed"), store)


def test_format_of_another_version_is_refused_with_its_number(checkpoint, store):
    change(checkpoint, format=7)
    with pytest.raises(CheckpointError, match=r"manifest.json has format 7; this version reads \d"):
        load(checkpoint, store)


@pytest.mark.parametrize(
    "contents", ["", "{", "[]", "null", "7", '"text"', "{}", '{"format": 1}', b"\xff\xfe", '{"format": 1, "run": "r"}']
)
def test_file_that_is_no_manifest_is_refused(checkpoint, store, contents):
    (checkpoint / "manifest.json").write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    assert_refused(checkpoint, store, "manifest.json")


def change_model(checkpoint, **changes):
    about = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["about"]
    change(checkpoint, about={**about, "model": {**about["model"], **changes}})


def test_weights_of_another_model_are_refused_naming_them(checkpoint, store):
    change_model(checkpoint, layers=3)
    with pytest.raises(CheckpointError, match=r"model.safetensors.*blocks\.2\.attention"):
        load(checkpoint, store)


def test_weights_of_another_shape_are_refused_naming_them(checkpoint, store):
    change_model(checkpoint, vocab_size=301)
    with pytest.raises(CheckpointError, match=r"model.safetensors.*embedding"):
        load(checkpoint, store)


def test_manifest_whose_partitions_leave_rows_out_is_refused(checkpoint, store):
    partitions = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["partitions"]
    change(
        checkpoint, partitions=[part for part in partitions if (part["table"], part["index"]) != ("demo.engram.1", 0)]
    )
    with pytest.raises(CheckpointError, match=r"demo\.engram\.1"):
        load(checkpoint, store)


def rewrite(checkpoint, name, content):
    """Another file with sums that are right: what somebody else's program would write."""
    (checkpoint / name).write_bytes(content)
    files = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"]
    change(checkpoint, files={**files, name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", b"no tensors", "model.safetensors is no safetensors file"),
        ("tokenizer.json", b"{}", "tokenizer.json is not a tokenizer.json"),
        ("tokenizer.json", b"\xff", "tokenizer.json is no UTF-8"),
    ],
)
def test_a_file_of_another_kind_is_named_though_its_sums_are_right(checkpoint, store, name, content, words):
    rewrite(checkpoint, name, content)
    with pytest.raises(CheckpointError, match=words):
        load(checkpoint, store)


def test_a_tokenizer_of_another_size_is_refused(checkpoint, store):
    values = json.loads((checkpoint / "tokenizer.json").read_bytes())
    last = max(values["model"]["vocab"], key=values["model"]["vocab"].get)
    del values["model"]["vocab"][last]
    values["model"]["merges"] = values["model"]["merges"][:-1]
    rewrite(checkpoint, "tokenizer.json", json.dumps(values).encode())
    with pytest.raises(CheckpointError, match=r"tokenizer.json has 299 ids, the model of its checkpoint 300"):
        load(checkpoint, store)


def test_tables_that_the_model_does_not_address_are_refused(checkpoint, store):
    about = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["about"]
    sizes = about["model"]["engram"]["vocab_size"]
    change_model(checkpoint, engram={**about["model"]["engram"], "vocab_size": [sizes[0] + 40, *sizes[1:]]})
    with pytest.raises(CheckpointError, match=r"holds tables .*, its model reads"):
        load(checkpoint, store)


def test_the_folder_of_a_run_stands_for_its_checkpoints(trained, tmp_path):
    assert open_checkpoint(trained.out).path == open_checkpoint(trained.out / "checkpoint").path
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
