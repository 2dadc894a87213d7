"""Memory that runs out while a step is applied, and what fails in the middle: no run is stopped for ever, no row is wrong."""

import logging
import subprocess
import sys

import grpc
import numpy as np
import pytest

from engrid.client import MemoryClient, TrainingRun
from engrid.control.tables import create_tables
from engrid.rpc.errors import DeadlineExceededError, OutOfMemoryError, ShardUnavailableError
from engrid.rpc.server import check_health
from engrid.shard.ops import applying
from engrid.tables import row_table
from engrid.v1 import memory_pb2 as pb
from engrid.v1 import memory_pb2_grpc
from tests.shard.shells import SPEC, Call, Held, adopt, commit, look, placement, push, rows_of, shell, soon
from tests.shards import local_shards, table

OTHER = table("u", rows=12, width=2, init_std=0.0)


class Fails:
    """A method of an object raises `error` so many times, then does what it does."""

    def __init__(self, owner, name, error, times=1):
        self.left = times
        real = getattr(owner, name)

        def call(*arguments, **options):
            if self.left:
                self.left -= 1
                raise error
            return real(*arguments, **options)

        setattr(owner, name, call)


def test_a_step_for_which_there_was_no_memory_is_applied_once_when_it_is_sent_again():
    with shell() as service:
        Fails(rows_of(service).rows, "apply", MemoryError("Unable to allocate 300 MiB"))
        with pytest.raises(OutOfMemoryError, match=r"step 1 of t\[0\]: Unable to allocate"):
            push(service)
        assert (look(service)[6:] == -1).all(), "the other partition has it"
        assert push(service) == [False, False]
        assert (look(service, step=1) == -1).all()
        push(service, seq=2, step=2)
        assert (look(service) == -2).all()


def test_a_decision_is_not_lost_with_the_thread_that_asked_for_it(monkeypatch):
    with shell() as service:
        with monkeypatch.context() as patched:
            patched.setattr(
                service, "_finish", lambda *_, **__: (_ for _ in ()).throw(MemoryError("between two lines"))
            )
            with pytest.raises(MemoryError):
                push(service)
        assert push(service) == [False, False]
        assert (look(service, step=1) == -1).all()


def test_a_commit_sent_again_applies_what_found_no_memory():
    with shell() as service:
        push(service, hold=True)
        Fails(rows_of(service).rows, "apply", MemoryError())
        with pytest.raises(OutOfMemoryError):
            commit(service)
        commit(service)
        assert (look(service, step=1) == -1).all()


def test_whoever_needs_the_shard_at_rest_applies_what_found_no_memory(tmp_path):
    with shell(tmp_path) as service:
        Fails(rows_of(service).rows, "apply", MemoryError())
        with pytest.raises(OutOfMemoryError):
            push(service)
        assert service.begin_run("r", 2, 1, ["t"], deadline=soon()) == 1
        assert (look(service) == -1).all()


def test_other_runs_go_on_meanwhile_and_the_log_brings_all_of_it_back(tmp_path):
    with shell(tmp_path, SPEC, OTHER) as service:
        Fails(rows_of(service).rows, "apply", MemoryError(), times=100)
        for _ in range(2):
            with pytest.raises(OutOfMemoryError):
                push(service)
        push(service, name="u")
        assert (look(service, name="u") == -1).all()
    with shell(tmp_path, SPEC, OTHER) as service:
        assert (look(service, name="t") == -1).all(), "the step was in the log"


@pytest.mark.parametrize("log", [True, False])
def test_a_shard_that_gets_no_memory_for_long_ends_if_its_log_has_the_step(log, tmp_path, monkeypatch):
    monkeypatch.setattr(applying, "PATIENCE", 0.0)
    with shell(tmp_path if log else None) as service:
        Fails(rows_of(service).rows, "apply", MemoryError(), times=applying.TRIES)
        for _ in range(applying.TRIES - log):
            with pytest.raises(OutOfMemoryError):
                push(service)
        if log:
            with pytest.raises(ShardUnavailableError, match="cannot go on and ends: there was no memory for"):
                push(service)
        else:
            push(service)
            assert (look(service) == -1).all()


def test_a_snapshot_that_could_not_save_a_row_is_given_up_and_the_step_applied(tmp_path):
    """It has noted that the row is saved."""
    with shell(tmp_path) as service:
        part, memory = rows_of(service), None
        disk, create = service.journal.disk, service.journal.disk.create

        def pushed_to_while_it_is_written(path):
            nonlocal memory
            if memory is None:
                memory = part.snapshot.memory
                part.snapshot._live = {"rows": None}
                with pytest.raises(ShardUnavailableError):
                    push(service)
            return create(path)

        disk.create = pushed_to_while_it_is_written
        with pytest.raises(ShardUnavailableError):
            service._bases.make()
        assert "could not be saved" in memory.given_up


@pytest.mark.parametrize("error", [MemoryError("in the middle"), RuntimeError("a fault of ours")])
def test_a_step_that_breaks_off_in_the_middle_ends_the_shard_and_its_log_applies_it(error, tmp_path, monkeypatch):
    real, failed = row_table.update_rows, []

    def breaks_off(*arguments, **options):
        out = real(*arguments, **options)
        if len(failed) < 1:
            failed.append(1)
            raise error
        return out

    with shell(tmp_path, SPEC, OTHER, workers=2) as service:
        told = []
        service.gate.on_failure(lambda: told.append(service.gate.failure))
        push(service, worker=1)
        waiting = Call(lambda: look(service, step=1))
        monkeypatch.setattr(row_table, "update_rows", breaks_off)
        with pytest.raises(ShardUnavailableError, match="cannot go on and ends: applying step 1"):
            push(service)
        for call in (
            waiting.result,
            lambda: look(service),
            lambda: look(service, name="u"),
            lambda: push(service, name="u"),
        ):
            with pytest.raises(ShardUnavailableError, match="cannot go on and ends"):
                call()
        assert len(told) == 1
        assert repr(error) in told[0]
    with shell(tmp_path, SPEC, OTHER, workers=2) as service:
        assert (look(service) == -2).all()
        push(service, name="u")


def test_whoever_waits_is_told_when_the_shard_cannot_go_on():
    with shell() as service:
        held = Held(rows_of(service), "apply")
        pushed = Call(lambda: push(service))
        held.wait()
        waiting = [
            Call(lambda: push(service)),
            Call(lambda: look(service, step=1)),
            Call(lambda: service.begin_run("q", 1, 1, ["t"], deadline=soon())),
            Call(lambda: adopt(service, placement(2))),
        ]
        service.gate.fail("a test")
        for each in waiting:
            with pytest.raises(ShardUnavailableError, match="cannot go on and ends: a test"):
                each.result()
        held.go()
        with pytest.raises(ShardUnavailableError, match="a test"):
            pushed.result()


def test_what_broke_off_between_log_and_state_machine_ends_the_shard(tmp_path):
    with shell(tmp_path) as service:
        Fails(service.journal.core, "push", MemoryError("in the state machine"))
        with pytest.raises(ShardUnavailableError, match="a push taken broke off"):
            push(service)
    with shell(tmp_path) as service:
        assert (look(service) == -1).all(), "it was in the log"


def test_a_push_for_which_there_is_no_memory_takes_nothing():
    with shell() as service:
        Fails(service._rows, "check_gradients", MemoryError())
        with pytest.raises(OutOfMemoryError, match="Nothing was changed"):
            push(service)
        assert push(service) == [True, True]


# -- threads that die


def test_a_base_whose_thread_dies_gives_back_what_it_held_and_is_told(tmp_path, caplog):
    with shell(tmp_path, log_bytes=1) as service:
        service._bases.close()
        Fails(service.journal, "capture", RuntimeError("a fault of ours"))
        with caplog.at_level(logging.WARNING):
            push(service)
            service._bases.close()
        assert "a fault of ours" in caplog.text
        service._bases.make()
        assert service.journal.is_based
        assert not rows_of(service).snapshot


def test_pushes_behind_a_base_that_hangs_end_by_their_deadline(tmp_path):
    """Else a start would replay without bound."""
    with shell(tmp_path, log_bytes=1) as service:
        service._bases.close()
        held = Held(service.journal, "wait_durable")
        push(service)
        held.wait()
        end = service.journal.log.last
        with pytest.raises(DeadlineExceededError, match="takes no push before its log can be cut"):
            push(service, seq=2, step=2, deadline=soon(0.1))
        assert service.journal.log.last == end, "nothing was taken"
        held.go()
        push(service, seq=2, step=2)
        assert (look(service) == -2).all()


def test_what_waits_when_the_shard_is_stopped_is_told_at_once():
    """The process could not end before them."""
    with shell() as service:
        held = Held(rows_of(service), "apply")
        pushed = Call(lambda: push(service))
        held.wait()
        waiting = [Call(lambda: push(service)), Call(lambda: adopt(service, placement(2)))]
        assert not waiting[0].ends_within(0.05)
        service.close()
        for each in waiting:
            with pytest.raises(ShardUnavailableError, match="is being stopped"):
                each.result()
        held.go()
        with pytest.raises(ShardUnavailableError, match="is being stopped"):
            pushed.result()


# -- a process


def test_health_says_that_the_shard_cannot_go_on(tmp_path):
    with local_shards(tmp_path, 1) as (server,), grpc.insecure_channel(server.address) as channel:
        assert check_health(channel, timeout=5)
        server._service.gate.fail("a test")
        assert not check_health(channel, timeout=5)
        with pytest.raises(grpc.RpcError) as raised:
            memory_pb2_grpc.MemoryServiceStub(channel).Commit(pb.CommitRequest(run="r", attempt=1, step=1), timeout=5)
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE


def test_the_process_ends_with_an_error_and_is_back_with_what_it_had_acknowledged(tmp_path):
    code = """
import sys
from engrid.tables import row_table
real = row_table.update_rows
def update_rows(*arguments, step, **options):
    out = real(*arguments, step=step, **options)
    if step == 2:
        raise RuntimeError("a fault of ours")
    return out
row_table.update_rows = update_rows
from engrid.shard.__main__ import main
main()
"""
    options = ["--name", "s0", "--directory", f"file:{tmp_path}", "--state", str(tmp_path / "state")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        address = process.stdout.readline().split()[-1]
        with MemoryClient(f"file:{tmp_path}") as client, grpc.insecure_channel(address) as channel:
            create_tables(client, [table(rows=4, width=2, init_std=0.0)])
            run = TrainingRun(client, run="r", attempt=1, worker=0, workers=1, tables=["t"])
            ids, ones = np.arange(4), np.ones((4, 2), np.float32)
            run.push({"t": (ids, ones)}, step=1, learning_rate=1.0)
            part = pb.PartitionPush(table="t", partition=0, seq=2, row_ids=ids.tobytes(), gradients=ones.tobytes())
            message = pb.PushRequest(run="r", attempt=1, step=2, learning_rate=1.0, epoch=1, partitions=[part])
            with pytest.raises(grpc.RpcError, match="cannot go on and ends"):
                memory_pb2_grpc.MemoryServiceStub(channel).Push(message, timeout=5)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 1
        assert "error: shard s0 ended: applying step 2 to t[0] failed: RuntimeError('a fault of ours')" in errors
        with local_shards(tmp_path, 1, state=tmp_path / "state") as (server,):
            assert (look(server._service) == -2).all()
    finally:
        process.kill()
        process.wait()
