"""The state machine of a shard: each step of a partition applies once, from every worker, whatever is retried."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engrid.directory.placement import Partition, Placement
from engrid.rpc.errors import (
    BadRequestError,
    ExpectedError,
    FencedError,
    RunMismatchError,
    UnknownTableError,
    WrongEpochError,
)
from engrid.shard.core.machine import ShardCore
from engrid.shard.core.messages import PartitionPush, Push
from engrid.tables import OptimizerSpec, TableSpec


def spec(name="t", rows=100):
    return TableSpec(
        name=name,
        rows=rows,
        row_format="float32",
        width=2,
        seed=0,
        layer=0,
        init_std=0.0,
        optimizer=OptimizerSpec(kind="sgd"),
    )


def placement(epoch=1, *, name="t", rows=100, cut=50, shard="a"):
    parts = [
        Partition(table=name, index=i, start=lo, stop=hi, shards=(shard,))
        for i, (lo, hi) in enumerate([(0, cut), (cut, rows)])
    ]
    return Placement(
        epoch=epoch,
        shards={"a": "localhost:1", "b": "localhost:2"},
        tables={name: spec(name, rows)},
        partitions={name: tuple(parts)},
    )


def core(workers=1):
    machine = ShardCore("a")
    machine.adopt(machine.plan_adoption(placement()))
    machine.begin_run("r", 1, workers, ["t"])
    return machine


def push(
    seq=1, *, worker=0, step=None, attempt=1, run="r", hold=False, epoch=1, keys=(("t", 0), ("t", 1)), payload=None
):
    parts = [PartitionPush(key=key, seq=seq, gradients=payload or (worker, seq)) for key in keys]
    return Push(
        run=run,
        attempt=attempt,
        worker=worker,
        step=step or seq,
        learning_rate=0.1,
        hold=hold,
        epoch=epoch,
        parts=parts,
    )


def carry_out(machine, applies):
    for apply in applies:
        machine.applied(apply.key, apply.step)
    return applies


def test_push_applies_once_and_a_retry_is_a_duplicate():
    machine = core()
    new, applies = machine.push(push())
    assert new == [True, True]
    assert [(apply.key, apply.step) for apply in carry_out(machine, applies)] == [(("t", 0), 1), (("t", 1), 1)]
    assert machine.push(push()) == ([False, False], [])
    assert machine.reached("t") == 1


def test_step_waits_for_every_worker_and_keeps_rank_order():
    machine = core(workers=2)
    assert machine.push(push(worker=1))[1] == []
    assert machine.reached("t") == 0
    _, applies = machine.push(push(worker=0))
    assert [gradient[0] for gradient in applies[0].gradients] == [0, 1]


def test_gap_is_refused_and_changes_nothing():
    machine = core()
    with pytest.raises(ExpectedError) as refused:
        machine.push(push(3))
    assert refused.value.expected == 1
    assert machine.push(push(1))[0] == [True, True]


def test_one_bad_part_refuses_the_whole_push():
    machine = core()
    mixed = [
        PartitionPush(key=("t", 0), seq=1, gradients=None),
        PartitionPush(key=("t", 1), seq=2, gradients=None),
    ]
    whole = Push(run="r", attempt=1, worker=0, step=1, learning_rate=0.1, hold=False, epoch=1, parts=mixed)
    with pytest.raises(ExpectedError):
        machine.push(whole)
    new, applies = machine.push(push(1))
    assert new == [True, True]
    assert len(applies) == 2


def test_held_push_applies_only_at_commit():
    machine = core()
    assert machine.push(push(hold=True))[1] == []
    applies = carry_out(machine, machine.commit("r", 1, 0, 1, 1))
    assert len(applies) == 2
    assert machine.commit("r", 1, 0, 1, 1) == [], "a retried commit changes nothing"


def test_uncommitted_push_of_a_step_may_be_replaced():
    machine = core()
    machine.push(push(1, hold=True, payload="first"))
    assert machine.push(push(2, step=1, hold=True, payload="second"))[0] == [True, True]
    assert machine.commit("r", 1, 0, 1, 1)[0].gradients == ["second"]


def test_commit_without_the_push_is_refused_and_commits_nothing():
    machine = core()
    machine.push(push(hold=True, keys=[("t", 0)]))
    with pytest.raises(ExpectedError):
        machine.commit("r", 1, 0, 1, 1)
    assert not machine.partitions["t", 0].held[0].committed


def test_commit_of_a_later_step_is_not_taken_for_the_one_being_applied():
    machine = core()
    machine.push(push(hold=True))
    applies = machine.commit("r", 1, 0, 1, 1)
    assert applies
    with pytest.raises(ExpectedError):
        machine.commit("r", 1, 0, 2, 1)
    assert machine.commit("r", 1, 0, 1, 1) == [], "a retry of the one that is"
    carry_out(machine, applies)
    assert machine.reached("t") == 1


def test_push_ahead_of_the_step_is_refused():
    machine = core()
    with pytest.raises(ExpectedError):
        machine.push(push(1, step=2))


def test_older_attempt_is_fenced_and_its_held_pushes_are_dropped():
    machine = core()
    machine.push(push(hold=True))
    machine.begin_run("r", 2, 1, ["t"])
    with pytest.raises(FencedError) as refused:
        machine.push(push(2))
    assert refused.value.attempt == 2
    with pytest.raises(FencedError):
        machine.commit("r", 1, 0, 1, 1)
    with pytest.raises(FencedError):
        machine.begin_run("r", 1, 1, ["t"])
    _, applies = machine.push(push(1, attempt=2))
    assert applies[0].gradients == [(0, 1)]


def test_begin_run_again_keeps_what_was_pushed():
    machine = core()
    machine.push(push(hold=True))
    assert machine.begin_run("r", 1, 1, ["t"]) == 0
    assert len(machine.commit("r", 1, 0, 1, 1)) == 2


@pytest.mark.parametrize("wrong", [{"run": "other"}, {"attempt": 9}])
def test_push_of_a_run_that_was_not_begun_is_refused(wrong):
    with pytest.raises(RunMismatchError):
        core().push(push(**wrong))


def test_worker_beyond_the_run_is_refused():
    with pytest.raises(BadRequestError, match="1 workers"):
        core().push(push(worker=1))


def test_unowned_partition_answers_with_our_epoch():
    with pytest.raises(WrongEpochError) as refused:
        core().push(push(keys=[("t", 7)]))
    assert refused.value.epoch == 1


def test_unknown_table_cannot_be_begun():
    with pytest.raises(UnknownTableError):
        core().begin_run("r", 2, 1, ["u"])


def test_older_placement_is_refused_and_the_same_one_is_a_retry():
    machine = core()
    assert machine.plan_adoption(placement()) is None
    with pytest.raises(WrongEpochError):
        machine.plan_adoption(placement(epoch=1, cut=40))


def test_request_routed_before_the_table_was_made_is_refused():
    machine = core()
    machine.adopt(machine.plan_adoption(replace(placement(2), tables={}, partitions={})))
    machine.adopt(machine.plan_adoption(placement(3)))
    machine.begin_run("r", 1, 1, ["t"])
    for stale in (1, 2):
        with pytest.raises(WrongEpochError, match="made at epoch 3"):
            machine.check_epoch("t", stale)
        with pytest.raises(WrongEpochError, match="made at epoch 3"):
            machine.push(push(epoch=stale))
    machine.push(push(epoch=3, hold=True))
    with pytest.raises(WrongEpochError, match="made at epoch 3"):
        machine.commit("r", 1, 0, 1, 1)
    machine.loaded(("t", 0), 7)
    with pytest.raises(WrongEpochError):
        machine.check_epoch("t", 2)
    machine.check_epoch("t", 3)


def test_rows_of_another_run_are_not_taken_for_this_ones():
    machine = core()
    machine.check_made_by("t", "r")
    with pytest.raises(RunMismatchError, match="holds rows of run r, not of run other"):
        machine.check_made_by("t", "other")
    machine.loaded(("t", 1), 5, "other", 1)
    for run in ("r", "other"):
        with pytest.raises(RunMismatchError):
            machine.check_made_by("t", run)


def test_loaded_rows_fence_the_older_attempts_of_their_run():
    machine = core()
    for key in (("t", 0), ("t", 1)):
        machine.loaded(key, 5, "r", 3)
    with pytest.raises(FencedError):
        machine.push(push(attempt=2))
    with pytest.raises(FencedError):
        machine.begin_run("r", 2, 1, ["t"])
    assert machine.begin_run("r", 4, 1, ["t"]) == 5
    assert machine.push(push(attempt=4, step=6))[0] == [True, True]


def test_moving_live_rows_is_refused():
    with pytest.raises(BadRequestError, match="moves rows"):
        core().plan_adoption(placement(epoch=2, cut=40))


def test_new_epoch_keeps_unchanged_partitions_and_their_state():
    machine = core()
    carry_out(machine, machine.push(push())[1])
    machine.adopt(machine.plan_adoption(placement(epoch=2)))
    assert machine.epoch == 2
    assert machine.reached("t") == 1


def test_restarted_shard_knows_its_epoch_and_that_its_rows_are_lost():
    machine = ShardCore("a", recovered=placement(epoch=5))
    assert machine.epoch == 5
    assert machine.empty("t")
    machine.loaded(("t", 0), 3)
    assert machine.empty("t"), "one partition is still lost"
    machine.loaded(("t", 1), 3)
    assert not machine.empty("t")
    assert machine.reached("t") == 3


@settings(max_examples=200, deadline=None)
@given(data=st.data(), workers=st.integers(1, 3))
def test_any_order_of_retries_applies_each_step_once_from_each_worker(data, workers):
    """Workers push, repeat and commit in any interleaving; a duplicate or early message must change nothing."""
    machine = core(workers=workers)
    seq = [1] * workers
    applied = []
    for _ in range(data.draw(st.integers(1, 60))):
        worker = data.draw(st.integers(0, workers - 1))
        action = data.draw(st.sampled_from(["push", "repeat", "commit", "commit-early"]))
        step = machine.reached("t") + 1
        held = machine.partitions["t", 0].held.get(worker)
        if action == "push" and held is None:
            machine.push(push(seq[worker], worker=worker, step=step, hold=True, payload=(worker, step)))
            seq[worker] += 1
        elif action == "repeat" and seq[worker] > 1:
            assert machine.push(push(seq[worker] - 1, worker=worker, step=step, hold=True)) == ([False, False], [])
        elif action == "commit" and held is not None:
            applied += carry_out(machine, machine.commit("r", 1, worker, held.step, 1))
        elif action == "commit-early" and held is None:
            with pytest.raises(ExpectedError):
                machine.commit("r", 1, worker, step, 1)
    steps = machine.reached("t")
    for key in (("t", 0), ("t", 1)):
        mine = [apply for apply in applied if apply.key == key]
        assert [apply.step for apply in mine] == list(range(1, steps + 1))
        for apply in mine:
            assert list(apply.gradients) == [(worker, apply.step) for worker in range(workers)]
