"""A push whose step would leave NaN or infinity is refused before it is taken, whoever pushes last, and on all shards alike."""

import numpy as np
import pytest

from engrid.client import MemoryClient, TrainingRun
from engrid.control.tables import create_tables
from engrid.rpc.errors import BadRequestError, NotFiniteError
from engrid.tables import RowTable
from tests.shard.shells import Call, Held, commit, load, look, push, rows_of, shell
from tests.shards import local_shards, table

ADAM = table(rows=12, width=2, init_std=0.0, optimizer="adam")
SGD = table(rows=12, width=2, init_std=0.0)


def log_end(service):
    return service.journal.log.last


def test_adam_refuses_a_square_that_overflows_and_nothing_is_logged(tmp_path):
    with shell(tmp_path, ADAM) as service:
        push(service)
        before, end = look(service), log_end(service)
        with pytest.raises(
            NotFiniteError, match=r"table t: step 2 would leave NaN or infinity in row 0 .*nothing was applied"
        ):
            push(service, seq=2, step=2, value=1e20)
        assert log_end(service) == end
        assert np.array_equal(look(service), before)
        push(service, seq=2, step=2)


@pytest.mark.parametrize("hold", [True, False])
def test_sums_over_workers_are_looked_at_when_the_step_is_complete(hold, tmp_path):
    """Each alone is fine."""
    with shell(tmp_path, SGD, workers=3) as service:
        push(service, worker=2, value=2e38, hold=hold)
        push(service, worker=0, value=1.0, hold=hold)
        end = log_end(service)
        with pytest.raises(NotFiniteError, match="row 0"):
            push(service, worker=1, value=2e38, hold=hold)
        assert log_end(service) == end
        push(service, worker=1, value=-1e38, hold=hold)
        if hold:
            for worker in range(3):
                commit(service, worker=worker)
        assert (look(service, step=1) == -np.float32(1e38)).all()


def test_a_push_that_takes_the_place_of_an_older_one_is_looked_at_again():
    with shell(None, SGD, workers=2) as service:
        push(service, value=2e38, hold=True)
        push(service, worker=1, value=1e38, hold=True)
        with pytest.raises(NotFiniteError):
            push(service, worker=1, seq=2, value=2e38, hold=True)
        with pytest.raises(NotFiniteError):
            push(service, seq=2, value=1.5e38, rate=2.0, hold=True)
        push(service, worker=1, seq=2, value=-2e38, hold=True)
        commit(service)
        commit(service, worker=1)
        assert (look(service, step=1) == 0).all()


def test_the_worker_whose_own_gradients_are_too_large_is_the_one_refused():
    with shell(None, ADAM, workers=2) as service:
        with pytest.raises(NotFiniteError):
            push(service, value=1e20, hold=True)
        push(service, worker=1, hold=True)
        push(service, hold=True)


def test_weights_that_grow_are_looked_at_as_they_are():
    with shell(None, SGD) as service:
        for step in (1, 2, 3):
            push(service, seq=step, step=step, value=-1e38)
        with pytest.raises(NotFiniteError):
            push(service, seq=4, step=4, value=-1e38)
        push(service, seq=4, step=4, value=3e38)
        assert (look(service) < 1e30).all()


def test_a_held_step_is_looked_at_again_if_another_was_taken_meanwhile():
    """Found fine together with one push of the other worker, and then that was another."""
    with shell(None, SGD, workers=2) as service:
        push(service, value=1e38, hold=True)
        held = Held(rows_of(service), "refuse_not_finite")
        pushing = Call(lambda: push(service, worker=1, value=1.5e38, hold=True))
        held.wait()
        push(service, seq=2, value=2e38, hold=True)
        held.go()
        with pytest.raises(NotFiniteError):
            pushing.result()


def test_rows_loaded_as_nan_are_served_and_a_push_to_them_is_refused_by_name(tmp_path):
    """A shard takes what it is given to serve, bit for bit."""
    with shell(tmp_path, SGD) as service:
        load(service, np.nan, run="r", step=0)
        load(service, 1.0, index=1, run="r", step=0)
        service.begin_run("r", 2, 1, ["t"], deadline=float("inf"))
        assert np.isnan(look(service)[:6]).all()
        with pytest.raises(NotFiniteError, match="row 3 "):
            push(service, attempt=2, ids=[3])


@pytest.mark.parametrize("based", [True, False])
def test_what_was_taken_is_applied_alike_after_a_start_and_what_is_too_large_refused_alike(based, tmp_path):
    with shell(tmp_path, ADAM) as service:
        push(service, value=3e18)
        if based:
            service._bases.make()
        push(service, seq=2, step=2, value=-1e18)
        before = look(service)
    with shell(tmp_path, ADAM) as service:
        assert np.array_equal(look(service), before)
        with pytest.raises(NotFiniteError):
            push(service, seq=3, step=3, value=1e20)
        push(service, seq=3, step=3)


@pytest.mark.parametrize("based", [True, False])
def test_a_start_knows_how_large_the_weights_are(based, tmp_path):
    """Each push is small enough for weights that are zero."""
    with shell(tmp_path, SGD) as service:
        for step in range(1, 6):
            push(service, seq=step, step=step, value=-6e37, ids=[0])
        if based:
            service._bases.make()
    with shell(tmp_path, SGD) as service, pytest.raises(NotFiniteError):
        push(service, seq=6, step=6, value=-6e37, ids=[0])


def test_ordinary_pushes_are_not_computed_twice(monkeypatch):
    monkeypatch.setattr(RowTable, "try_update", None)
    with shell(None, ADAM, workers=2) as service:
        for step in range(1, 30):
            for worker in (0, 1):
                push(service, worker=worker, seq=step, step=step, value=1000.0 * step)
        assert np.isfinite(look(service)).all()


@pytest.fixture
def store(tmp_path):
    with local_shards(tmp_path, 2), MemoryClient(f"file:{tmp_path}") as client:
        yield client


def test_a_step_that_one_shard_refuses_is_applied_on_none(store):
    create_tables(store, [table(init_std=0.0)])
    run = TrainingRun(store, run="r", attempt=1, worker=0, workers=1, tables=["t"])
    ids = np.array([3, 900])
    run.push({"t": (ids, np.full((2, 8), -3e38, np.float32))}, step=1, learning_rate=1.0)
    large = np.array([[1.0] * 8, [-3e38] * 8], np.float32)
    with pytest.raises(NotFiniteError, match="step 2 would leave NaN or infinity in row 900"):
        run.push({"t": (ids, large)}, step=2, learning_rate=1.0)
    run.push({"t": (ids, np.full((2, 8), 3e38, np.float32))}, step=2, learning_rate=1.0)
    assert not np.ascontiguousarray(store.lookup("t", ids, step=2)).view(np.float32).any()


@pytest.mark.parametrize("rate", [np.nan, np.inf, -0.1, 1e39, 1e300, "0.1"])
def test_a_learning_rate_that_is_no_rate_is_refused_before_anything_leaves(store, rate):
    create_tables(store, [table()])
    run = TrainingRun(store, run="r", attempt=1, worker=0, workers=1, tables=["t"])
    with pytest.raises(BadRequestError, match=r"learning rate is .*nothing was sent"):
        run.push({}, step=1, learning_rate=rate)
    run.push({}, step=1, learning_rate=0.0)
