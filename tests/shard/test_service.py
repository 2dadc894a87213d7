"""The shell around the state machine: what is answered when, what is looked at again after a wait, and what it refuses."""

import json

import numpy as np
import pytest

from engrid.rpc.errors import (
    BadRequestError,
    DeadlineExceededError,
    DiskFullError,
    ExpectedError,
    PinnedError,
    RunMismatchError,
    ShardUnavailableError,
    StepNotReachedError,
    UnknownTableError,
    WrongEpochError,
)
from engrid.rpc.frames import ids_to_bytes
from engrid.shard import service as service_module
from engrid.shard.ops import loading
from engrid.storage.checkpoint import Checkpoints
from engrid.storage.disk import LocalDisk
from engrid.storage.errors import CheckpointError
from engrid.storage.manifest import Manifest
from engrid.storage.partition import SavedPartition
from engrid.v1 import memory_pb2 as pb
from tests.shard.shells import (
    SECONDS,
    SPEC,
    Call,
    Held,
    adopt,
    commit,
    load,
    look,
    placement,
    push,
    remade,
    rows_of,
    shell,
    soon,
)
from tests.shards import table

# -- on disk before it is answered


def is_durable(service):
    log = service.journal.log
    return log.durable == log.last


def test_a_placement_and_a_run_are_on_disk_before_they_are_answered(tmp_path):
    with shell(tmp_path) as service:
        assert is_durable(service), "the run begun is the last record"
        adopt(service, placement(2, SPEC, table("u", rows=4, width=2)))
        assert is_durable(service)


def test_what_shall_be_durable_is_on_disk_before_it_is_answered(tmp_path):
    with shell(tmp_path) as service:
        push(service)
        assert not is_durable(service), "nobody asked for it"
        push(service, seq=2, step=2, durable=True)
        assert is_durable(service)
        push(service, seq=3, step=3, hold=True)
        commit(service, step=3, durable=True)
        assert is_durable(service)


def test_a_duplicate_is_as_durable_as_what_it_repeats(tmp_path):
    with shell(tmp_path) as service:
        push(service)
        assert push(service, durable=True) == [False, False]
        assert is_durable(service)


def test_a_base_has_its_name_only_when_the_log_up_to_it_is_on_disk(tmp_path):
    """Else a power failure could take records that the base already holds, and their numbers be given again."""
    with shell(tmp_path) as service:
        push(service)
        disk, seen = service.journal.disk, []
        rename = disk.rename

        def watched(source, target):
            seen.append((target, is_durable(service)))
            rename(source, target)

        disk.rename = watched
        service._bases.make()
        assert seen == [(service.journal.base.folder, True)]


# -- a step being applied


def test_a_retry_is_answered_no_sooner_than_what_it_repeats():
    with shell() as service:
        held = Held(rows_of(service, 1), "apply")
        first = Call(lambda: push(service))
        held.wait()
        again = Call(lambda: push(service))
        assert not again.ends_within(0.2)
        held.go()
        assert (first.result(), again.result()) == ([True, True], [False, False])


def test_a_load_waits_for_steps_being_applied():
    """Else the step would be applied to the rows that came."""
    with shell() as service:
        held = Held(rows_of(service), "apply")
        pushed = Call(lambda: push(service))
        held.wait()
        loaded = Call(lambda: load(service, 66))
        assert not loaded.ends_within(0.2)
        held.go()
        pushed.result()
        loaded.result()
        assert (look(service)[:6] == 66).all()


# -- looked at again after a wait


def test_a_lookup_routed_before_the_table_was_made_is_refused():
    with shell() as service:
        adopt(service, placement(2, remade()))
        with pytest.raises(WrongEpochError, match="made at epoch 2"):
            look(service, epoch=1)
        look(service, epoch=2)


def test_rows_of_another_run_do_not_answer_a_lookup_that_waited_for_its_own():
    with shell() as service:
        waiting = Call(lambda: look(service, step=1, run="r"))
        assert not waiting.ends_within(0.1)
        load(service, 66, run="B")
        with pytest.raises(RunMismatchError, match="run B"):
            waiting.result()


@pytest.mark.parametrize("change", ["dropped", "made anew"])
def test_a_lookup_that_waits_for_a_table_that_goes_is_told_at_once(change):
    with shell() as service:
        waiting = Call(lambda: look(service, step=1))
        assert not waiting.ends_within(0.1)
        adopt(service, placement(2, remade() if change == "made anew" else table("u", rows=4, width=2)))
        with pytest.raises(WrongEpochError if change == "made anew" else UnknownTableError):
            waiting.result()


@pytest.mark.parametrize("run", ["r", ""])
def test_rows_that_are_replaced_while_they_are_gathered_are_not_served_by_halves(run):
    """The first partition is gathered before the load of both, the second after."""
    with shell() as service:
        push(service)
        held = Held(rows_of(service, 1), "gather")
        looking = Call(lambda: look(service, run=run))
        held.wait()
        load(service, 66, index=0)
        load(service, 66, index=1)
        held.go()
        if run:
            with pytest.raises(RunMismatchError, match="run B"):
                looking.result()
        else:
            assert (looking.result() == 66).all()


def test_a_run_that_begins_while_rows_are_gathered_does_not_answer_for_another():
    """Its rows are the same ones, changed by its step."""
    with shell() as service:
        push(service)
        held = Held(rows_of(service, 1), "gather")
        looking = Call(lambda: look(service, run="r"))
        held.wait()
        service.begin_run("q", 1, 1, ["t"], deadline=soon())
        push(service, run="q", step=2)
        held.go()
        with pytest.raises(RunMismatchError, match="run q"):
            looking.result()


def test_rows_that_are_just_being_loaded_are_neither_served_nor_pushed_to(monkeypatch):
    monkeypatch.setattr(loading, "put", loading.put)
    with shell() as service:
        push(service, hold=True)
        held = Held(loading, "put")
        loaded = Call(lambda: load(service, 66, run="r"))
        held.wait()
        with pytest.raises(ShardUnavailableError, match="load"):
            look(service, run="r")
        with pytest.raises(ShardUnavailableError, match="no rows"):
            push(service, seq=2)
        with pytest.raises(ExpectedError, match="lacks"):
            commit(service)
        held.go()
        loaded.result()
        assert (look(service)[:6] == 66).all()


def test_a_load_into_a_table_that_was_made_anew_meanwhile_is_refused():
    with shell() as service:
        rows = np.full((6, 2), 66, "<f4").tobytes()

        def chunks():
            yield pb.LoadChunk(table="t", partition=0, step=1, rows=rows[:8])
            adopt(service, placement(2, remade()))
            yield pb.LoadChunk(rows=rows[8:])

        with pytest.raises(WrongEpochError, match="made anew"):
            service.transfers.load(chunks(), deadline=soon())
        assert (look(service, epoch=2) == 0).all()


def test_a_sealed_load_into_a_table_that_was_made_anew_meanwhile_does_not_count_for_it():
    sealed = table("s@1", rows=12, width=2, optimizer=None)
    with shell() as service:
        adopt(service, placement(2, SPEC, sealed))
        rows = np.full((6, 2), 66, "<f4").tobytes()

        def chunks():
            yield pb.LoadChunk(table="s@1", partition=0, step=1, rows=rows[:8])
            adopt(service, placement(3, SPEC))
            adopt(service, placement(4, SPEC, sealed))
            yield pb.LoadChunk(rows=rows[8:])

        with pytest.raises(WrongEpochError, match="made anew"):
            service.transfers.load(chunks(), deadline=soon())
        assert service.journal.core.empty("s@1")


def test_an_export_of_rows_that_are_replaced_meanwhile_is_ended():
    with shell() as service:
        chunks = service.transfers.export(pb.ExportRequest(table="t", partition=0, rows_per_chunk=2))
        next(chunks)
        load(service, 66)
        with pytest.raises(WrongEpochError, match="other rows"):
            next(chunks)


def test_a_reader_that_comes_while_a_table_is_about_to_be_dropped_keeps_it():
    sealed = table("s@1", rows=12, width=2, optimizer=None)
    with shell() as service:
        adopt(service, placement(2, SPEC, sealed))
        held = Held(service._rows, "allocate")
        dropping = Call(lambda: adopt(service, placement(3, SPEC, table("u", rows=4, width=2))))
        held.wait()
        service.pin(pb.PinRequest(reader="me", tables=["s@1"], seconds=60))
        held.go()
        with pytest.raises(PinnedError):
            dropping.result()
        assert service.journal.core.epoch == 2


def test_a_step_that_is_not_reached_is_named():
    with shell() as service:
        push(service)
        with pytest.raises(StepNotReachedError, match="at step 1, the lookup needs 2"):
            look(service, step=2, seconds=0.05)


def checkpoint(service, folder, step):
    (folder / "p" / "tables").mkdir(parents=True, exist_ok=True)
    request = pb.CheckpointRequest(
        run="r", attempt=1, step=step, tables=["t"], folder=str(folder), partial="p", wait=SECONDS
    )
    return service.checkpointing.save(request, lambda end: True)


def test_a_checkpoint_that_waits_for_a_step_of_rows_that_go_is_told_at_once(tmp_path):
    with shell(None, checkpoints=(tmp_path,)) as service:
        waiting = Call(lambda: next(checkpoint(service, tmp_path, 1)))
        assert not waiting.ends_within(0.1)
        service.journal.core.loading(("t", 0))
        service.gate.wake()
        with pytest.raises(ShardUnavailableError, match="load a checkpoint"):
            waiting.result()


def test_a_restore_that_waited_is_not_carried_out_into_another_table(tmp_path):
    """It would take out the rows, and then find that the checkpoint is of others."""
    with shell(None, checkpoints=(tmp_path,)) as service:
        push(service)
        messages = checkpoint(service, tmp_path, 1)
        next(messages)
        saved = [SavedPartition.from_json(json.loads(each)) for each in next(messages).partitions]
        messages.close()
        manifest = Manifest(
            run="r", attempt=1, step=1, base="", tables={"t": SPEC}, partitions=saved, files={}, about={}
        )
        Checkpoints(LocalDisk(tmp_path)).publish("p", manifest)
        request = pb.RestoreRequest(folder=str(tmp_path), name=manifest.name, tables=["t"], attempt=2, wait=SECONDS)
        with service.loading:
            waiting = Call(lambda: service.checkpointing.restore(request, deadline=soon()))
            assert not waiting.ends_within(0.1)
            adopt(service, placement(2, remade()))
        with pytest.raises(CheckpointError, match="specs differ"):
            waiting.result()
        assert (look(service, epoch=2) == 0).all(), "its rows are there still"


def test_a_load_for_whose_base_there_is_no_room_changes_nothing(tmp_path):
    with shell(tmp_path) as service:
        service.journal.disk.free_bytes = lambda: 0
        with pytest.raises(DiskFullError, match="make room"):
            load(service, 66)
        assert (look(service, run="r") == 0).all()


# -- the caller's time


def test_a_free_lock_is_not_given_to_a_caller_that_has_given_up():
    with shell() as service:
        with (
            pytest.raises(DeadlineExceededError, match="waited for a test"),
            service.gate.hold(service.saving, soon(-1), "a test"),
        ):
            pytest.fail("it was carried out")
        assert not service.saving.locked()


def test_what_a_caller_has_given_up_is_not_carried_out():
    over = soon(-1)
    with shell() as service:
        push(service, hold=True)
        for call in (
            lambda: push(service, seq=2, deadline=over),
            lambda: commit(service, deadline=over),
            lambda: service.begin_run("q", 2, 1, ["t"], deadline=over),
            lambda: load(service, 66, deadline=over),
            lambda: service.adopt(placement(2, remade()), check_only=False, deadline=over),
        ):
            with pytest.raises(DeadlineExceededError, match="time was over"):
                call()
        commit(service)
        assert service.journal.core.epoch == 1
        assert (look(service, run="r") == -1).all()


@pytest.mark.parametrize("lock", ["loading", "saving", "adopting"])
def test_a_lock_is_not_waited_for_longer_than_the_caller_waits(lock, tmp_path):
    with shell(tmp_path) as service:
        calls = {
            "loading": [
                lambda: service.begin_run("q", 2, 1, ["t"], deadline=soon(0.1)),
                lambda: load(service, 6, deadline=soon(0.1)),
            ],
            "saving": [lambda: load(service, 66, deadline=soon(0.1))],
            "adopting": [lambda: service.adopt(placement(2), check_only=False, deadline=soon(0.1))],
        }
        with getattr(service, lock):
            for call in calls[lock]:
                with pytest.raises(DeadlineExceededError, match="time was over while it waited"):
                    call()
        push(service)
        assert (look(service, run="r") == -1).all(), "nothing was changed"


def test_a_step_that_hangs_ends_the_waits_for_it_by_their_deadlines():
    with shell(None, SPEC, table("u", rows=12, width=2, init_std=0.0)) as service:
        held = Held(rows_of(service), "apply")
        pushed = Call(lambda: push(service))
        held.wait()
        for call in (
            lambda: push(service, deadline=soon(0.1)),
            lambda: service.begin_run("q", 1, 1, ["u"], deadline=soon(0.1)),
            lambda: service.adopt(placement(2), check_only=False, deadline=soon(0.1)),
        ):
            with pytest.raises(DeadlineExceededError, match="waited for"):
                call()
        assert push(service, name="u") == [True, True], "another run's pushes go on"
        held.go()
        pushed.result()


def test_the_lock_itself_is_not_waited_for_longer_than_the_caller_waits(monkeypatch):
    """A write to a disk that hangs keeps it."""
    monkeypatch.setattr(service_module, "CONTROL_SECONDS", 0.05)
    with shell() as service:
        held = Held(service.journal, "push")
        hanging = Call(lambda: push(service))
        held.wait()
        for call in (
            lambda: push(service, deadline=soon(0.05)),
            lambda: commit(service, deadline=soon(0.05)),
            lambda: look(service, step=1, seconds=0.05),
            lambda: service.begin_run("q", 1, 1, ["t"], deadline=soon(0.05)),
            lambda: load(service, 66, deadline=soon(0.05)),
            lambda: service.adopt(placement(2), check_only=True, deadline=soon(0.05)),
            service.describe,
            lambda: service.pin(pb.PinRequest(reader="me", seconds=1)),
        ):
            with pytest.raises(DeadlineExceededError, match="held up, as by a disk that hangs"):
                call()
        assert (look(service) == 0).all(), "what needs no lock is answered"
        held.go()
        hanging.result()


# -- a request against itself


def test_a_push_that_contradicts_itself_is_refused():
    ids, gradients = ids_to_bytes(np.array([0])), np.ones((1, 2), "<f4").tobytes()
    one = pb.PartitionPush(table="t", partition=0, seq=1, row_ids=ids, gradients=gradients)
    never = pb.PartitionPush(table="t", partition=0, seq=0, row_ids=ids, gradients=gradients)
    far = np.array([2**63 - 1, -(2**63)])  # their difference overflows to 1
    outside = pb.PartitionPush(
        table="t", partition=0, seq=1, row_ids=ids_to_bytes(far), gradients=np.ones((2, 2), "<f4").tobytes()
    )
    fine = {"run": "r", "attempt": 1, "step": 1, "learning_rate": 1.0, "epoch": 1}
    with shell() as service:
        for parts, more, message in [
            ([one, one], {}, r"names t\[0\] twice"),
            ([], {}, "names no partition"),
            ([never], {}, "seq of t"),
            ([outside], {}, "rise strictly"),
            ([one], {"step": 0}, "step is 0"),
            ([one], {"step": 2**64 - 1}, "step is"),
            *[([one], {"learning_rate": rate}, "learning rate is") for rate in (np.nan, np.inf, -1.0, 1e39, 1e300)],
        ]:
            request = pb.PushRequest(**(fine | more), partitions=parts)
            with pytest.raises(BadRequestError, match=message):
                service.push(request, deadline=soon())
        assert push(service) == [True, True], "nothing was taken"
        assert (look(service) == -1).all()


def test_numbers_that_nobody_could_count_up_from_are_refused():
    with shell() as service:
        for attempt, workers in [(0, 1), (2**64 - 1, 1), (2, 2**32 - 1)]:
            with pytest.raises(BadRequestError):
                service.begin_run("r", attempt, workers, ["t"], deadline=soon())
        with pytest.raises(BadRequestError, match="step is"):
            load(service, 66, step=2**64 - 1)
        with pytest.raises(BadRequestError, match="attempt is"):
            load(service, 66, attempt=2**64 - 1)
        with pytest.raises(BadRequestError, match="step is"):
            commit(service, step=2**64 - 1)
        push(service)


def test_a_request_that_names_no_table_is_refused(tmp_path):
    with shell(None, checkpoints=(tmp_path,)) as service:
        for call in (
            lambda: service.begin_run("r", 2, 1, [], deadline=soon()),
            lambda: next(service.checkpointing.save(pb.CheckpointRequest(folder=str(tmp_path)), lambda end: True)),
            lambda: service.checkpointing.restore(pb.RestoreRequest(folder=str(tmp_path), attempt=1), deadline=soon()),
        ):
            with pytest.raises(BadRequestError, match="names 0 tables"):
                call()


def test_a_load_whose_chunks_name_other_partitions_is_refused():
    rows = np.full((3, 2), 66, "<f4").tobytes()
    with shell() as service:
        other = [
            pb.LoadChunk(table="t", partition=0, step=1, rows=rows),
            pb.LoadChunk(table="t", partition=1, rows=rows),
        ]
        with pytest.raises(BadRequestError, match=r"a later chunk names t\[1\]"):
            service.transfers.load(iter(other), deadline=soon())
        assert (look(service) == 0).all()


@pytest.mark.parametrize("wait", [np.nan, -1.0])
def test_a_wait_that_is_no_time_is_refused(wait, tmp_path):
    with shell() as service:
        with pytest.raises(BadRequestError, match="wait is"):
            next(service.checkpointing.save(pb.CheckpointRequest(wait=wait), lambda end: True))
        with pytest.raises(BadRequestError, match="wait is"):
            service.checkpointing.restore(pb.RestoreRequest(wait=wait), deadline=soon())


def test_workers_of_one_step_have_one_learning_rate():
    with shell(workers=2) as service:
        push(service, hold=True, rate=0.5)
        push(service, worker=1, hold=True, rate=1.0)
        commit(service)
        with pytest.raises(BadRequestError, match=r"worker 1 pushes step 1 with learning rate 1, worker 0 with 0\.5"):
            commit(service, worker=1)
        with pytest.raises(BadRequestError, match="give all the same"):
            push(service, worker=1, seq=2, hold=True, rate=1.0)
        push(service, worker=1, seq=2, hold=True, rate=0.5)
        commit(service, worker=1)
        assert (look(service) == -1).all()
