"""A run that was killed and goes on from its newest checkpoint is the run that nobody killed, bit for bit."""

import json
import random
import shutil
import time
from contextlib import ExitStack

import grpc
import pytest

from engrid.client import Attempt, ClientConfig, MemoryClient
from engrid.client.training import TrainingRun
from engrid.control.checkpoints import CheckpointSave, live_states
from engrid.rpc.errors import BadRequestError, EngridError, FencedError
from engrid.shard.rows.snapshot import PartitionSnapshot
from engrid.storage.disk import LocalDisk
from engrid.storage.errors import CheckpointDamagedError, CheckpointMissingError
from engrid.worker.saved_model import open_checkpoint
from engrid.worker.train.run import Place, train
from tests.shards import local_shards, shard_process
from tests.worker.conftest import (
    LINE,
    everything,
    finish,
    make_out,
    table_bytes,
    tiny_config,
    train_request,
    worker_process,
    worker_stub,
)

pytestmark = pytest.mark.e2e

STEPS = 16


def config_of(out, **changes):
    return tiny_config(out, **{"steps": STEPS, "checkpoint_every": 3, "full_every": 2, "keep": 0, **changes})


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The same run, nobody killing it: its losses, and what it ended with."""
    out = make_out(tmp_path_factory.mktemp("unbroken") / "out")
    result = finish(config_of(out, memory="in_process"))
    return result["losses"], everything(out)


def stop_at(step, config, folder):
    """Trains until the step is done, as if the process ended then: what was being saved is whole or not there."""
    progress = train(config, Place(identity="demo-1"), lambda: MemoryClient(f"file:{folder}"), "cpu")
    for each in progress:
        if each.step is not None and each.step.step == step:
            break
    progress.close()


@pytest.mark.parametrize("memory", ["remote", "in_process", "off"])
def test_a_resumed_run_is_the_unbroken_one(folder, out, unbroken, memory):
    losses, ended_with = unbroken
    if memory == "off":
        whole = make_out(out.parent / "whole")
        losses, ended_with = finish(config_of(whole, memory="off"))["losses"], everything(whole)
    with local_shards(folder, 2):
        stop_at(11, config_of(out, memory=memory), folder)
        result = finish(config_of(out, memory=memory, resume=True), Place(identity="ignored"), folder)
    assert result["losses"] == losses[9:]
    assert result["steps"] == STEPS
    assert everything(out) == ended_with
    saved = open_checkpoint(out / "checkpoint")
    assert (saved.manifest.run, saved.manifest.attempt) == ("demo-1", 2)


@pytest.mark.parametrize("shards", [1, 3])
def test_it_may_go_on_over_another_number_of_shards(tmp_path, out, unbroken, shards):
    losses, ended_with = unbroken
    with local_shards(tmp_path / "two", 2):
        stop_at(8, config_of(out), tmp_path / "two")
    with local_shards(tmp_path / "now", shards):
        assert finish(config_of(out, resume=True), folder=tmp_path / "now")["losses"] == losses[6:]
    assert everything(out) == ended_with


def test_who_still_trains_the_older_attempt_is_fenced(store, folder, out, unbroken):
    stop_at(8, config_of(out), folder)
    tables = ["demo.engram.0", "demo.engram.1"]
    store.connections.refresh()
    zombie = TrainingRun(store, run="demo-1", attempt=Attempt("demo-1", 1, "demo-1"), tables=tables)
    late = CheckpointSave(store, out / "checkpoint", run="demo-1", attempt=1, step=8, tables=tables)
    progress = train(config_of(out, resume=True), Place(identity="x"), lambda: MemoryClient(f"file:{folder}"), "cpu")
    assert next(each for each in progress if each.step).step.step == 7
    with pytest.raises(FencedError, match="attempt 1 of run demo-1 is fenced: attempt 2 has begun"):
        zombie.push({}, step=8, learning_rate=0.1)
    with pytest.raises(EngridError):
        late.finish({}, {})
    assert [each.result for each in progress][-1]["losses"] == unbroken[0][6:]
    assert everything(out) == unbroken[1]
    assert not (out / "checkpoint" / "step-00000008").exists()
    assert not list((out / "checkpoint").glob(".step-*"))


def test_a_checkpoint_that_fails_is_told_and_training_goes_on(store, folder, out, unbroken, monkeypatch):
    real = LocalDisk.create

    def create(self, path):
        if ".step-00000006" in path:
            raise OSError(28, "No space left on device", path)
        return real(self, path)

    monkeypatch.setattr(LocalDisk, "create", create)
    progress = list(train(config_of(out), Place(identity="d"), lambda: MemoryClient(f"file:{folder}"), "cpu"))
    assert any("was not saved" in each.notice and "No space left" in each.notice for each in progress)
    assert everything(out) == unbroken[1]
    saved = sorted(path.name for path in (out / "checkpoint").glob("step-*"))
    assert "step-00000006" not in saved
    assert "step-00000003" in saved


def test_what_computes_something_else_is_refused_naming_it(store, folder, out):
    stop_at(4, config_of(out), folder)
    for change, word in ({"batch": 2}, "batch"), ({"seed": 1}, "seed"), ({"learning_rate": 0.5}, "learning_rate"):
        with pytest.raises(ValueError, match=f"was made with another {word}"):
            finish(config_of(out, resume=True, **change), folder=folder)
    with pytest.raises(
        ValueError, match="is at step 3 already, and 3 steps were asked for; give --steps with more than 3"
    ):
        finish(config_of(out, resume=True, steps=3), folder=folder)
    with pytest.raises(CheckpointMissingError, match="holds no checkpoint"):
        finish(config_of(make_out(out.parent / "empty"), resume=True), folder=folder)


def test_a_foreign_file_in_an_old_checkpoint_costs_no_checkpoint_and_not_the_run(store, folder, out):
    """Somebody's notes lie in a folder that is to go, and a folder has the name of what it would be called meanwhile."""
    config = config_of(out, checkpoint_every=2, full_every=1, keep=2)
    saved, notices = [], []
    for each in train(config, Place(identity="demo-1"), lambda: MemoryClient(f"file:{folder}"), "cpu"):
        notices.append(each.notice)
        for path in (out / "checkpoint").glob("step-*"):
            if path.name not in saved:
                saved.append(path.name)
                (path / "notes").mkdir()
                (path / "notes" / "mine.txt").write_text("keep me", encoding="utf-8")
                (out / "checkpoint" / f".{path.name}.removed" / "other").mkdir(parents=True)
    assert saved == [f"step-{step:08d}" for step in range(2, STEPS + 1, 2)]
    assert sorted(path.name for path in (out / "checkpoint").glob("step-*")) == saved[-2:]
    kept = sorted((out / "checkpoint").glob(".step-*.removed/notes/mine.txt"))
    assert len(kept) == len(saved) - 2, "what is not ours is left"
    assert not list((out / "checkpoint").glob(".step-*.removed/model.safetensors")), "what is ours is gone"
    assert [each for each in notices if "checkpoint" in each] == []


def test_an_old_checkpoint_that_cannot_go_is_told_and_training_goes_on(store, folder, out, monkeypatch):
    def rename(self, old, new):
        if old == "step-00000002":
            raise PermissionError(13, "Permission denied", old)
        return real(self, old, new)

    real = LocalDisk.rename
    monkeypatch.setattr(LocalDisk, "rename", rename)
    config = config_of(out, checkpoint_every=2, full_every=1, keep=2)
    progress = list(train(config, Place(identity="demo-1"), lambda: MemoryClient(f"file:{folder}"), "cpu"))
    assert any("old checkpoints stay" in each.notice and "step-00000002" in each.notice for each in progress)
    assert open_checkpoint(out / "checkpoint").step == STEPS
    assert not any("was not saved" in each.notice for each in progress)


CHANGED_TEXT = {
    "changed": (lambda text: (text / "f3.py").write_text("# other\n" + LINE * 6, encoding="utf-8"), "1 changed: f3.py"),
    "added": (lambda text: (text / "new.txt").write_text(LINE * 7, encoding="utf-8"), "1 added: new.txt"),
    "gone": (lambda text: (text / "f3.py").unlink(), "1 gone: f3.py"),
}


@pytest.mark.parametrize("how", CHANGED_TEXT)
def test_a_run_does_not_go_on_with_another_text(out, how):
    change, words = CHANGED_TEXT[how]
    stop_at(4, config_of(out, memory="off"), None)
    change(out / "text")
    with pytest.raises(
        ValueError, match=f"step-00000003 was trained on another text .corpus.: {words}. Put the files back"
    ):
        finish(config_of(out, memory="off", resume=True))
    shutil.rmtree(next(out.glob("corpus-*")))
    for kept in out.glob("corpus-*"):
        shutil.rmtree(kept)
    with pytest.raises(ValueError, match=r"was trained on another text .corpus.: 30 files with"):
        finish(config_of(out, memory="off", resume=True))


def test_a_run_does_not_take_the_live_tables_of_another_without_a_word(store, folder, out):
    """Neither a new one nor one that goes on from an older checkpoint: what is not saved would be lost."""
    other = make_out(out.parent / "other")
    finish(config_of(other, steps=4), Place(identity="demo-1"), folder)
    spec = open_checkpoint(other / "checkpoint").tables[0]
    before = table_bytes(store, spec, step=4).copy()
    refused = r"hold rows of run demo-1 \(step 4\).*--run.*--replace"
    with pytest.raises(BadRequestError, match=refused):
        finish(config_of(out, replace=False), Place(identity="demo-2"), folder)
    assert (table_bytes(store, spec, step=4) == before).all()
    with local_shards(out.parent / "elsewhere", 1):
        finish(config_of(out, steps=4), Place(identity="demo-2"), out.parent / "elsewhere")
    with pytest.raises(BadRequestError, match=refused):
        finish(config_of(out, replace=False, resume=True), folder=folder)
    assert (table_bytes(store, spec, step=4) == before).all()
    finish(config_of(other, replace=False, resume=True, steps=5), folder=folder)  # its own


def test_damage_is_named_when_a_run_would_go_on_from_it(store, folder, out):
    stop_at(4, config_of(out), folder)
    for name in ("optimizer.safetensors", "tables/demo.engram.0-00000.exp_avg.safetensors"):
        path = out / "checkpoint" / "step-00000003" / name
        contents = path.read_bytes()
        path.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
        with pytest.raises((CheckpointDamagedError, EngridError), match=f"step-00000003/{name}"):
            finish(config_of(out, resume=True), folder=folder)
        path.write_bytes(contents)


def train_until(stub, config, step, identity):
    """Reads a Train call until the step; returns it, still running."""
    call = stub.Train(train_request(config, identity=identity), timeout=120)
    for each in call:
        if each.step >= step:
            return call
    raise AssertionError("the run ended")


def resume_in(stub, config):
    return json.loads(list(stub.Train(train_request(config, identity="x"), timeout=120))[-1].result)


def test_a_worker_killed_at_any_time_leaves_a_run_that_goes_on(folder, out, unbroken):
    """kill -9 of a real process, while it trains and saves."""
    with ExitStack() as stack:
        for name in ("s0", "s1"):
            stack.enter_context(shard_process(folder, name))
        with worker_process(folder, "w0") as (process, address), worker_stub(address()) as stub:
            call = train_until(stub, config_of(out, checkpoint_every=2), 9, "demo-1")
            process.kill()
            with pytest.raises(grpc.RpcError):
                list(call)
        begun = open_checkpoint(out / "checkpoint").step
        with worker_process(folder, "w1") as (_, address), worker_stub(address()) as stub:
            result = resume_in(stub, config_of(out, checkpoint_every=2, resume=True))
    assert result["losses"] == unbroken[0][begun:]
    assert everything(out) == unbroken[1]


def test_a_shard_killed_with_its_rows_is_replaced_and_the_run_goes_on(folder, out, unbroken):
    """kill -9 of a shard that keeps no log: rows and state come back from the checkpoint, the run from its step."""
    with ExitStack() as stack:
        stack.enter_context(shard_process(folder, "s0"))
        with shard_process(folder, "s1") as (process, _):
            quick = ClientConfig(push_timeout=1.0, timeout=1.0)
            progress = train(
                config_of(out), Place(identity="demo-1"), lambda: MemoryClient(f"file:{folder}", quick), "cpu"
            )
            for each in progress:
                if each.step is not None and each.step.step == 7:
                    process.kill()
                    break
            with pytest.raises(EngridError):
                list(progress)
        stack.enter_context(shard_process(folder, "s1"))
        newest = open_checkpoint(out / "checkpoint").step  # the shard may have died while it saved that of step 6
        result = finish(config_of(out, resume=True), folder=folder)
        with MemoryClient(f"file:{folder}") as client:
            assert {(each.attempt, each.step) for each in live_states(client)} == {(2, STEPS)}
    assert result["losses"] == unbroken[0][newest:]
    assert everything(out) == unbroken[1]


def test_pushes_and_lookups_go_on_while_a_checkpoint_is_written(store, folder, out, unbroken, monkeypatch):
    """Sweeping is made slow: the steps that end meanwhile show that nobody waited for it."""
    real, during = PartitionSnapshot.advance, []

    def slow(self):
        time.sleep(0.2)
        return real(self)

    monkeypatch.setattr(PartitionSnapshot, "advance", slow)
    for each in train(
        config_of(out, checkpoint_every=4), Place(identity="d"), lambda: MemoryClient(f"file:{folder}"), "cpu"
    ):
        if each.step is not None and any((out / "checkpoint").glob(".step-00000004.*.partial")):
            during.append(each.step.step)
    assert len(during) >= 2
    assert everything(out) == unbroken[1]


@pytest.mark.faults
def test_killed_at_random_times_the_newest_checkpoint_is_whole_each_time(folder, out, unbroken):
    """Ten lives of a worker that saves after every step, each ended by kill -9 at a random time."""
    rng, torn = random.Random(4), 0
    saves = {"checkpoint_every": 1, "full_every": 3}
    with ExitStack() as stack:
        for name in ("s0", "s1"):
            stack.enter_context(shard_process(folder, name))
        for life in range(10):
            with worker_process(folder, f"w{life}") as (process, address), worker_stub(address()) as stub:
                config = config_of(out, resume=life > 0, steps=10_000, **saves)
                call = train_until(stub, config, 3, "demo-1")  # the saves of steps 1 and 2 are whole then
                time.sleep(rng.random() * 0.5)
                process.kill()
                with pytest.raises(grpc.RpcError):
                    list(call)
            saved = open_checkpoint(out / "checkpoint")
            assert saved.checkpoints.verify(saved.manifest.name) == []
            torn += len(list((out / "checkpoint").glob(".step-*.partial")))
    assert torn, "some life ended while it saved"
