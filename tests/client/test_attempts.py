"""An attempt is its beginner's alone, and no push is lost to another's count."""

import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict

import grpc
import numpy as np
import pytest

from engrid.client import Attempt, MemoryClient, TrainingRun, claim_attempt
from engrid.control.checkpoints import CheckpointSave, restore_tables
from engrid.control.tables import create_tables
from engrid.rpc.errors import (
    BadRequestError,
    DeadlineExceededError,
    ExpectedError,
    FencedError,
    RunMismatchError,
    UnknownTableError,
    from_rpc,
)
from engrid.v1 import memory_pb2 as pb
from tests.shards import local_shards, shard_process, table

SPEC = table(rows=40, init_std=0.0)
PART = (np.arange(3), np.ones((3, 8), np.float32))


@pytest.fixture
def store(tmp_path):
    with local_shards(tmp_path, 2), MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [SPEC])
        yield client


@pytest.fixture
def other(tmp_path, store):
    with MemoryClient(f"file:{tmp_path}") as client:
        yield client


def first_value(client, step=0):
    return float(client.lookup("t", [0], step=step, dtype=np.float32)[0, 0])


def test_a_process_that_goes_on_with_a_run_takes_the_next_attempt(store, other):
    for client, number in ((store, 1), (other, 2), (store, 3)):
        run = TrainingRun(client, run="r", tables=["t"])
        assert run.attempt.number == number
        for _ in range(2):
            run.push({"t": PART}, step=run.step + 1, learning_rate=1.0)
        assert run.step == 2 * number
    assert first_value(store, step=6) == -6


def test_an_attempt_that_another_began_is_refused_and_the_error_says_what_to_do(store, other):
    mine = TrainingRun(store, run="r", tables=["t"], attempt=1)
    mine.push({"t": PART}, step=1, learning_rate=1.0)
    with pytest.raises(
        FencedError, match=r"another process began attempt 1 of run r .*leave out `attempt`.*claim_attempt"
    ):
        TrainingRun(other, run="r", tables=["t"], attempt=1)
    mine.push({"t": PART}, step=2, learning_rate=1.0)
    assert first_value(store, step=2) == -2, "and the beginner goes on"


@pytest.mark.parametrize("log_bytes", [1 << 20, 1])
def test_whose_an_attempt_is_survives_a_restart_from_log_and_from_base(tmp_path, log_bytes):
    options = ["--state", str(tmp_path / "state"), "--log-bytes", str(log_bytes)]
    with ExitStack() as stack:
        client, other = (stack.enter_context(MemoryClient(f"file:{tmp_path}")) for _ in range(2))
        with shard_process(tmp_path, "s0", *options):
            create_tables(client, [SPEC])
            attempt = claim_attempt(client, "r", ["t"])
            TrainingRun(client, run="r", tables=["t"], attempt=attempt).push({"t": PART}, step=1, learning_rate=1.0)
        with shard_process(tmp_path, "s0", *options):
            with pytest.raises(FencedError, match="another process began attempt 1"):
                TrainingRun(other, run="r", tables=["t"], attempt=1)
            assert TrainingRun(client, run="r", tables=["t"], attempt=attempt).step == 1
            assert TrainingRun(other, run="r", tables=["t"]).attempt.number == 2


def test_workers_share_a_claimed_attempt_as_plain_data(store, other):
    claimed = claim_attempt(store, "r", ["t"])
    assert pickle.loads(pickle.dumps(claimed)) == Attempt(**json.loads(json.dumps(asdict(claimed)))) == claimed
    clients = [store, other]
    with ThreadPoolExecutor(2) as pool:
        runs = [
            TrainingRun(client, run="r", tables=["t"], attempt=claimed, worker=rank, workers=2)
            for rank, client in enumerate(clients)
        ]
        list(pool.map(lambda run: run.push({"t": PART}, step=1, learning_rate=1.0), runs))
    assert first_value(store, step=1) == -2


def test_those_who_claim_at_once_get_different_attempts(tmp_path, store):
    with ExitStack() as stack:
        clients = [stack.enter_context(MemoryClient(f"file:{tmp_path}")) for _ in range(6)]
        pool = stack.enter_context(ThreadPoolExecutor(6))
        begun = list(pool.map(lambda client: TrainingRun(client, run="r", tables=["t"]), clients))
        claimed = list(pool.map(lambda client: claim_attempt(client, "r", ["t"]), clients))
    numbers = [run.attempt.number for run in begun] + [attempt.number for attempt in claimed]
    assert len(set(numbers)) == 12
    assert len({run.attempt.token for run in begun}) == 6


def test_a_claim_fences_older_attempts_and_lets_nobody_push_before_it_is_begun(store, other):
    old = TrainingRun(store, run="r", tables=["t"])
    claimed = claim_attempt(other, "r", ["t"])
    with pytest.raises(FencedError, match="attempt 1 of run r is fenced: attempt 2 has begun"):
        old.push({"t": PART}, step=1, learning_rate=1.0)
    with pytest.raises(FencedError, match="is older"):
        TrainingRun(store, run="r", tables=["t"], attempt=old.attempt)
    run = TrainingRun(store, run="r", tables=["t"], attempt=claimed)
    assert claim_again(other, claimed) == 0, "a claim that comes late changes nothing"
    run.push({"t": PART}, step=1, learning_rate=1.0)
    assert first_value(store, step=1) == -1


def claim_again(client, attempt):
    transport = client.connections.transport("s0")
    request = pb.BeginRunRequest(run=attempt.run, attempt=attempt.number, tables=["t"], token=attempt.token)
    return transport.stub.BeginRun(request, timeout=5).step


@pytest.mark.parametrize("shards", [1, 2])
def test_a_push_never_sent_that_the_shards_have_seen_is_an_error(tmp_path, shards):
    """Two that push as the same worker of one attempt: what one sends would pass for what the other sent before."""
    with local_shards(tmp_path, shards), MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [SPEC])
        claimed = claim_attempt(client, "r", ["t"])
        first, second = (TrainingRun(client, run="r", tables=["t"], attempt=claimed) for _ in range(2))
        first.push({"t": PART}, step=1, learning_rate=1.0)
        again = TrainingRun(client, run="r", tables=["t"], attempt=claimed)
        for late in (second, again, second):
            with pytest.raises(FencedError, match=r"has seen push 1 of worker 0 to t\[\d\] in attempt 1 .* never sent"):
                late.push({"t": PART}, step=2, learning_rate=1.0)
        assert second.step == 0
        first.push({"t": PART}, step=2, learning_rate=1.0)
        assert first_value(client, step=2) == -2


def test_workers_of_one_attempt_agree_on_their_number(store):
    claimed = claim_attempt(store, "r", ["t"])
    TrainingRun(store, run="r", tables=["t"], attempt=claimed, worker=0, workers=2)
    with pytest.raises(BadRequestError, match="attempt 1 of run r was begun with 2 workers, not 3"):
        TrainingRun(store, run="r", tables=["t"], attempt=claimed, worker=1, workers=3)


def test_an_attempt_restored_by_one_is_not_begun_by_another(tmp_path, store, other):
    run = TrainingRun(store, run="r", tables=["t"])
    run.push({"t": PART}, step=1, learning_rate=1.0)
    (tmp_path / "saved").mkdir()
    manifest = CheckpointSave(store, tmp_path / "saved", run="r", attempt=run.attempt, step=1, tables=["t"]).finish(
        {}, {}
    )
    claimed = claim_attempt(store, "r", ["t"])
    restore_tables(store, tmp_path / "saved", manifest, attempt=claimed)
    with pytest.raises(FencedError, match="another process began attempt 2"):
        restore_tables(other, tmp_path / "saved", manifest, attempt=Attempt("r", 2, "another's"))
    with pytest.raises(FencedError, match="another process began attempt 2"):
        TrainingRun(other, run="r", tables=["t"], attempt=2)
    again = TrainingRun(store, run="r", tables=["t"], attempt=claimed)
    again.push({"t": PART}, step=2, learning_rate=1.0)
    assert first_value(store, step=2) == -2


def test_a_run_on_a_table_made_anew_since_does_not_go_on_in_it(store, other):
    """The same run and attempt begin on the new table: whoever pushed to the old one must not pass for them."""
    old = TrainingRun(store, run="r", tables=["t"])
    create_tables(other, [SPEC], replace=True)
    new = TrainingRun(other, run="r", tables=["t"])
    assert new.attempt.number == old.attempt.number
    store.connections.refresh()
    with pytest.raises(Exception, match="was made at epoch 3"):
        old.push({"t": PART}, step=1, learning_rate=1.0)
    new.push({"t": PART}, step=1, learning_rate=1.0)
    assert first_value(other, step=1) == -1


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"tables": []}, BadRequestError, "needs tables"),
        ({"tables": "t"}, BadRequestError, "a list of names"),
        ({"tables": ["t", "t"]}, BadRequestError, "table t is named twice"),
        ({"tables": ["t", "u"]}, UnknownTableError, "'u'"),
        ({"worker": 3, "workers": 2}, BadRequestError, "worker 3 of 2"),
        ({"worker": -1}, BadRequestError, "worker -1 of 1"),
        ({"workers": 0}, BadRequestError, "worker 0 of 0"),
        ({"worker": True}, BadRequestError, "worker is True"),
        ({"workers": 2}, BadRequestError, "need one attempt: get it by claim_attempt"),
        ({"attempt": 0}, BadRequestError, "attempt 0 of run r"),
        ({"attempt": 1.5}, BadRequestError, "attempt 1.5 of run r"),
        ({"attempt": Attempt("other", 1, "x")}, BadRequestError, "is of run other, not of run r"),
        ({"run": ""}, BadRequestError, "give the name of the run"),
    ],
)
def test_what_no_run_can_be_begun_with_is_refused_before_any_shard_hears_of_it(store, wrong, error, match):
    with pytest.raises(error, match=match):
        TrainingRun(store, **{"run": "r", "tables": ["t"], **wrong})
    state = store.connections.transport("s0").stub.Describe(pb.DescribeRequest(), timeout=5).partitions[0]
    assert (state.run, state.attempt) == ("", 0)


@pytest.mark.parametrize("token", ["", "x" * 5000])
def test_a_run_is_begun_with_a_token(store, token):
    transport = store.connections.transport("s0")
    with pytest.raises(grpc.RpcError) as refused:
        transport.stub.BeginRun(pb.BeginRunRequest(run="r", attempt=1, workers=1, tables=["t"], token=token), timeout=5)
    assert "token" in str(from_rpc(refused.value, "s0"))


@pytest.mark.parametrize(
    ("push", "error", "match"),
    [
        (({"u": PART}, 1, 1.0), UnknownTableError, "push to 'u', which run r does not train; its tables are t"),
        (({"t": PART, "T": PART}, 1, 1.0), UnknownTableError, "'T'"),
        (({}, 0, 1.0), BadRequestError, "step 0"),
        (({}, True, 1.0), BadRequestError, "step True"),
        (({}, 1, float("nan")), BadRequestError, "learning rate is nan"),
        (({}, 1, float("inf")), BadRequestError, "learning rate is inf"),
        (({}, 1, -0.1), BadRequestError, "learning rate is -0.1"),
        (({}, 1, 1e39), BadRequestError, r"learning rate is 1e\+39"),
    ],
)
def test_a_push_that_names_what_is_not_there_is_refused_whole(store, push, error, match):
    run = TrainingRun(store, run="r", tables=["t"])
    gradients, step, rate = push
    with pytest.raises(error, match=match):
        run.push(gradients, step=step, learning_rate=rate)
    assert run.step == 0
    run.push({"t": PART}, step=1, learning_rate=1.0)
    assert first_value(store, step=1) == -1


README = """
import sys
import numpy as np
from engrid.client import MemoryClient, TrainingRun
from engrid.control import create_tables
from engrid.tables import OptimizerSpec, TableSpec

spec = TableSpec(name="t", rows=1000, width=32, init_std=0.0, optimizer=OptimizerSpec(kind="sgd"))
with MemoryClient(sys.argv[1]) as memory:
    create_tables(memory, [spec], exist_ok=True)
    run = TrainingRun(memory, run="first", tables=["t"])
    run.push({"t": (np.arange(3), np.ones((3, 32), np.float32))}, step=run.step + 1, learning_rate=0.5)
    print(run.step, memory.lookup("t", [0], step=run.step, dtype=np.float32)[0, 0])
"""


def test_a_program_run_again_goes_on_where_it_was_also_after_the_shard_came_back_elsewhere(tmp_path):
    def run():
        done = subprocess.run(
            [sys.executable, "-c", README, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout.split() or done.stderr

    state = ["--state", str(tmp_path / "state")]
    with shard_process(tmp_path, "s0", *state) as (_, first):
        assert run() == ["1", "-0.5"]
        assert run() == ["2", "-1.0"]
    with shard_process(tmp_path, "s0", *state) as (_, second):
        assert first != second
        assert run() == ["3", "-1.5"]


def test_a_run_that_another_run_took_over_is_told_so(store, other):
    old = TrainingRun(store, run="a", tables=["t"])
    TrainingRun(other, run="b", tables=["t"])
    with pytest.raises(RunMismatchError, match="takes pushes of attempt 1 of run b"):
        old.push({"t": PART}, step=1, learning_rate=1.0)


def test_threads_that_share_a_run_push_one_after_the_other_and_lose_nothing(store):
    """A push of the one used to pass for a retry of the other's: acknowledged, and in no row."""
    run = TrainingRun(store, run="r", tables=["t"])

    def push(_):
        try:
            return run.push({"t": PART}, step=run.step + 1, learning_rate=1.0) > 0
        except ExpectedError:  # both took the same step for the next
            return False

    with ThreadPoolExecutor(4) as pool:
        taken = sum(pool.map(push, range(60)))
    assert run.step == taken
    assert first_value(store) == -taken


@pytest.mark.parametrize("step", [1, 2])
def test_gradients_that_were_never_taken_are_not_acknowledged_as_a_retry_of_others(tmp_path, step):
    """The answer to the first push is lost; what is pushed then is other gradients, of the same step or of the next."""
    with local_shards(tmp_path, 1) as (shard,), MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [SPEC])
        run = TrainingRun(client, run="r", tables=["t"])
        lose_answer(shard, "push")
        with pytest.raises(DeadlineExceededError):
            run.push({"t": PART}, step=1, learning_rate=1.0)
        others = {"t": (PART[0], 10 * PART[1])}
        if step == 1:
            with pytest.raises(ExpectedError, match="is at step 1"):
                run.push(others, step=1, learning_rate=1.0)
            assert first_value(client) == -1
        run.push(others, step=2, learning_rate=1.0)
        assert first_value(client, step=2) == -11


def test_a_step_being_committed_takes_no_other_gradients(tmp_path):
    with local_shards(tmp_path, 2) as shards, MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [SPEC])
        run = TrainingRun(client, run="r", tables=["t"])
        lose_answer(shards[1], "commit")
        with pytest.raises(DeadlineExceededError):
            run.push({"t": PART}, step=1, learning_rate=1.0)
        for others, rate in (({"t": (PART[0], 10 * PART[1])}, 1.0), ({}, 1.0), ({"t": PART}, 0.5)):
            with pytest.raises(ExpectedError, match="being committed with other gradients"):
                run.push(others, step=1, learning_rate=rate)
        run.push({"t": PART}, step=1, learning_rate=1.0)
        assert first_value(client, step=1) == -1


def lose_answer(shard, method):
    """The next call of a method of the shard's does what it was asked, and its answer is lost."""
    service = shard._service
    real = getattr(service, method)

    def call(*arguments, **options):
        setattr(service, method, real)
        real(*arguments, **options)
        raise DeadlineExceededError("the answer was lost")

    setattr(service, method, call)


def test_integers_of_numpy_are_integers(store):
    run = TrainingRun(store, run="r", tables=["t"], attempt=np.int64(2), worker=np.int32(0), workers=np.uint8(1))
    run.push({"t": PART}, step=np.int64(1), learning_rate=np.float32(1.0))
    assert (run.attempt.number, run.step, first_value(store, step=np.int64(1))) == (2, 1, -1.0)


@pytest.mark.parametrize("given", [None, "t", [("t", PART)], {"t": (PART[0],)}, {"t": (*PART, 3)}, {"t": 5}])
def test_what_are_no_pairs_by_table_is_refused_whole(store, given):
    run = TrainingRun(store, run="r", tables=["t"])
    with pytest.raises(BadRequestError, match="give"):
        run.push(given, step=1, learning_rate=1.0)
    run.push({"t": PART}, step=1, learning_rate=1.0)


@pytest.mark.parametrize("run", ["", "\ud800", "r" * 513, None, 5])
def test_a_run_has_a_name_that_travels(store, run):
    with pytest.raises(BadRequestError, match="run"):
        TrainingRun(store, run=run, tables=["t"])
