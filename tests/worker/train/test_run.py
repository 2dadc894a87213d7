"""ComputeService.Train: runs begun, reported, refused and cancelled."""

import dataclasses
import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from engrid.client import MemoryClient
from engrid.v1 import compute_pb2 as pb
from engrid.worker.saved_model import open_checkpoint
from engrid.worker.train.run import Place, train
from engrid.worker.train.stopping import Stopping
from tests.shards import local_shards, made_by, shard_process
from tests.worker.conftest import (
    ask,
    describe,
    finish,
    load,
    local_worker,
    make_out,
    refused,
    table_bytes,
    tiny_config,
    train_request,
    within,
)

pytestmark = pytest.mark.e2e


def result_of(call):
    return json.loads(list(call)[-1].result)


def test_training_reports_every_step_and_the_model_can_be_loaded(worker, store, out):
    config = tiny_config(out)
    progress = list(worker.Train(train_request(config), timeout=60))
    steps = [each for each in progress if each.step and not each.result]
    assert [each.step for each in steps] == list(range(1, 9))
    assert {each.steps for each in progress} == {8}
    assert all(each.loss > 0 and each.tokens_per_second > 0 and each.exposed_wait > 0 for each in steps)
    assert any("checkpoint" in each.phase for each in progress)
    result = json.loads(progress[-1].result)
    assert [each.loss for each in steps] == result["losses"]
    assert json.loads((out / "result.json").read_text(encoding="utf-8"))["losses"] == result["losses"]
    assert not any(each.result for each in progress[:-1])
    assert load(worker, result["checkpoint"]).step == 8
    assert ask(worker)[-1].totals.new_tokens == 3


def test_second_training_is_aborted_while_one_runs(worker, out):
    call = worker.Train(train_request(tiny_config(out, steps=100_000)), timeout=60)
    until_step(call, 2)
    assert describe(worker).training
    with refused(grpc.StatusCode.ABORTED, "w0 is training already"):
        list(worker.Train(train_request(tiny_config(out, run="second")), timeout=30))
    until_step(call, 4)
    call.cancel()


def until_step(call, step):
    for each in call:
        if each.step >= step:
            return


def test_cancelling_training_stops_it_and_the_worker_takes_the_next_run(worker, store, out):
    config = tiny_config(out, steps=100_000)
    call = worker.Train(train_request(config), timeout=60)
    until_step(call, 3)
    call.cancel()
    assert within(20, lambda: not describe(worker).training)
    store.connections.refresh()
    spec, _ = store.connections.table("demo.engram.0")
    before = table_bytes(store, spec).copy()
    assert (table_bytes(store, spec) == before).all(), "nobody pushes any more"
    short = dataclasses.replace(config, steps=4)
    result = result_of(worker.Train(train_request(short, identity="demo-3"), timeout=60))
    alone = make_out(out.parent / "alone")
    reference = finish(tiny_config(alone, steps=4, memory="in_process", save=False))
    assert result["losses"] == reference["losses"]
    assert made_by(store, "demo.engram.0") == {("demo-3", 4)}


@pytest.mark.parametrize("moment", ["pushing", "saving"])
def test_cancelling_reaches_what_training_waits_for(folder, out, moment):
    """A shard stands still: the push would wait a minute for it, the checkpoint longer."""
    every = {"pushing": 0, "saving": 1}[moment]
    with (
        shard_process(folder, "s0"),
        shard_process(folder, "s1") as (process, _),
        local_worker(folder, push_timeout=60.0) as worker,
    ):
        call = worker.Train(train_request(tiny_config(out, steps=100_000, checkpoint_every=every)), timeout=60)
        until_step(call, 3)
        process.send_signal(signal.SIGSTOP)
        with ThreadPoolExecutor(1) as thread:
            rest = thread.submit(list, call)
            with pytest.raises(TimeoutError):
                rest.result(timeout=0.5)
            assert describe(worker).training
            call.cancel()
            assert within(5, lambda: not describe(worker).training)
            with pytest.raises(grpc.RpcError):
                rest.result(timeout=5)
        assert not [each.name for each in threading.enumerate() if each.name == "engrid checkpoint"]


def test_a_shard_that_is_away_does_not_hold_up_cancelling(folder, out):
    with (
        shard_process(folder, "s0"),
        shard_process(folder, "s1") as (process, _),
        local_worker(folder, push_timeout=60.0) as worker,
    ):
        call = worker.Train(train_request(tiny_config(out, steps=100_000)), timeout=60)
        until_step(call, 3)
        process.kill()
        with ThreadPoolExecutor(1) as thread:
            rest = thread.submit(list, call)
            call.cancel()
            assert within(5, lambda: not describe(worker).training)
            rest.exception(timeout=5)


def test_a_run_that_is_asked_to_stop_saves_the_step_under_way_and_goes_on_from_it(worker, store, out):
    config = tiny_config(out, steps=200)
    call = worker.Train(train_request(config), timeout=60)
    until_step(call, 3)
    assert not worker.StopTraining(pb.StopTrainingRequest(identity="another"), timeout=5).stopping
    assert worker.StopTraining(pb.StopTrainingRequest(identity="demo-2"), timeout=5).stopping
    result = result_of(call)
    assert result["stopped"]
    assert 3 <= result["steps"] < 200
    saved = open_checkpoint(out / "checkpoint")
    assert saved.step == result["steps"]
    assert result["checkpoint"] == str(saved.path)
    assert not (out / "result.json").exists(), "that of a finished run"
    more = dataclasses.replace(config, resume=True, steps=200, save=False, evaluations=0)
    again = worker.Train(train_request(more), timeout=60)
    assert next(each.step for each in again if each.step) == saved.step + 1
    again.cancel()


def test_a_run_asked_to_stop_right_after_a_checkpoint_saves_no_other(folder, out):
    with local_shards(folder, 2):
        stopping = Stopping()
        progress = train(
            tiny_config(out, steps=200, checkpoint_every=2),
            Place(identity="demo-1"),
            lambda: MemoryClient(f"file:{folder}"),
            "cpu",
            stopping,
        )
        for each in progress:
            if each.step is not None and each.step.step == 3:
                stopping.finish()
            last = each
        assert last.result["steps"] == 4
        assert last.result["checkpoint"].endswith("step-00000004")


def test_training_and_generating_at_once_do_not_disturb_each_other(worker, trained, out):
    load(worker, trained.checkpoint)
    before = [reply.text for reply in ask(worker, tokens=20)]
    config = tiny_config(out, run="other", steps=30)
    call = worker.Train(train_request(config), timeout=60)
    until_step(call, 1)
    assert [reply.text for reply in ask(worker, tokens=20)] == before
    result = result_of(call)
    alone = dataclasses.replace(config, out=str(make_out(out.parent / "alone")), memory="in_process", save=False)
    assert finish(alone)["losses"] == result["losses"]


BAD_FIELDS = {
    "steps": 0,
    "batch": -1,
    "length": 513,
    "memory": "cloud",
    "run": "a/b",
    "warmup": -1,
    "learning_rate": 0,
    "seed": -1,
    "wings": 2,
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_wrong_field_of_a_run_is_an_invalid_argument_that_names_it(worker, store, out, field):
    values = {**tiny_config(out).to_json(), field: BAD_FIELDS[field]}
    with refused(grpc.StatusCode.INVALID_ARGUMENT, field):
        list(worker.Train(train_request(values), timeout=30))
    assert not store.connections.epoch, "nothing was made"
    assert not describe(worker).training


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (pb.TrainRequest(config="{", identity="x"), "Expecting"),
        (pb.TrainRequest(config="[]", identity="x"), "TrainConfig"),
        (pb.TrainRequest(config="", identity="x"), "Expecting"),
    ],
)
def test_configuration_that_is_no_json_object_is_an_invalid_argument(worker, request_, word):
    with refused(grpc.StatusCode.INVALID_ARGUMENT, word):
        list(worker.Train(request_, timeout=30))


@pytest.mark.parametrize(
    ("more", "word"), [({"identity": ""}, "identity"), ({"rank": 1, "workers": 1}, "rank 1 of 1 workers")]
)
def test_unfit_place_in_a_run_is_an_invalid_argument(worker, out, more, word):
    with refused(grpc.StatusCode.INVALID_ARGUMENT, word):
        list(worker.Train(train_request(tiny_config(out), **more), timeout=30))


def test_pad_beyond_the_vocabulary_is_an_invalid_argument_that_names_it(worker, out):
    values = tiny_config(out).to_json()
    values["model"]["engram"]["pad_token_id"] = 300
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "pad_token_id"):
        list(worker.Train(train_request(values), timeout=30))


def test_training_without_shards_says_so_and_frees_the_worker(tmp_path, out):
    with local_worker(tmp_path / "empty") as worker:
        with refused(grpc.StatusCode.UNAVAILABLE, "no shard is registered"):
            list(worker.Train(train_request(tiny_config(out)), timeout=30))
        assert result_of(worker.Train(train_request(tiny_config(out, memory="off")), timeout=60))["steps"] == 8


def test_loaded_model_is_not_disturbed_by_another_run_of_its_name(worker, trained, out):
    """The dense weights of one run over the rows of another would be text that nobody trained."""
    load(worker, trained.checkpoint)
    before = [reply.text for reply in ask(worker, tokens=20)]
    assert result_of(worker.Train(train_request(tiny_config(out)), timeout=60))["steps"] == 8
    assert [reply.text for reply in ask(worker, tokens=20)] == before
