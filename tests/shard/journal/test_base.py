"""What a base brings back beside rows, and what waits until a step is applied: a base, another placement."""

import threading
import time

import numpy as np
import pytest

from engrid.client import MemoryClient, TrainingRun
from engrid.control.tables import create_tables
from engrid.directory.placement import Partition, Placement
from engrid.rpc.errors import DiskFullError
from engrid.shard.config import ShardConfig
from engrid.shard.core.messages import PartitionPush, Push
from engrid.shard.journal.base import begin_snapshots
from engrid.shard.journal.journal import Journal
from engrid.shard.journal.records import PushPart
from engrid.shard.rows.gradients import Gradients
from engrid.shard.rows.snapshot import ImageMemory
from engrid.shard.service import ShardService
from engrid.tables import OptimizerSpec, TableSpec
from engrid.v1 import memory_pb2 as pb
from tests.shards import local_shards, table
from tests.simulated_disk import SimulatedDisk
from tests.waiting import until


def placement(epoch=1, seed=0):
    spec = TableSpec(
        name="t",
        rows=4,
        row_format="float32",
        width=2,
        seed=seed,
        layer=0,
        init_std=0.0,
        optimizer=OptimizerSpec(kind="sgd"),
    )
    return Placement(
        epoch=epoch,
        shards={"a": "host:1"},
        tables={"t": spec},
        partitions={"t": (Partition(table="t", index=0, start=0, stop=4, shards=("a",)),)},
    )


def journal(disk):
    made = Journal("a", disk)
    adoption = made.core.plan_adoption(placement())
    if adoption is not None:
        made.adopt(adoption, made.rows.allocate(placement(), adoption.added))
        made.begin_run("r", 1, 2, ["t"])
    return made


def push(made, worker, ids):
    ids = np.array(ids, np.int64)
    values = np.ones((len(ids), 2), np.float32)
    message = Push(
        run="r",
        attempt=1,
        worker=worker,
        step=1,
        learning_rate=1.0,
        hold=False,
        epoch=1,
        parts=[PartitionPush(key=("t", 0), seq=1, gradients=Gradients.of(ids, values))],
    )
    part = PushPart(table="t", partition=0, seq=1, row_ids=ids.tobytes(), gradients=values.tobytes())
    made.carry_out(made.push(message, made.logged(message, [part])).applies)


def make_base(made):
    base, live = made.capture()
    begin_snapshots(live, ImageMemory(1 << 20))
    made.wait_durable(base.record)
    written = base.write(made.needed_disk(), live)
    for _, part in live:
        part.settle_snapshot()
    made.rebased(written)


def test_empty_push_held_by_a_base_adds_up_with_one_that_has_rows():
    disk = SimulatedDisk()
    made = journal(disk)
    push(made, 0, [])
    make_base(made)
    push(made, 1, [2])
    for _ in range(2):
        made = Journal("a", disk)
        assert made.rows.live(("t", 0)).rows.arrays()["rows"].view(np.float32).sum() == -2
        assert made.core.reached("t") == 1


def test_journal_knows_that_a_second_base_would_be_the_first():
    disk = SimulatedDisk()
    made = journal(disk)
    assert not made.is_based
    make_base(made)
    assert made.is_based
    assert Journal("a", disk).is_based
    push(made, 0, [])
    assert not made.is_based


def test_table_is_not_replaced_while_a_step_is_being_applied():
    """The step would be applied to the rows of the new table."""
    service = ShardService(ShardConfig(name="a", directory="file:unused", memory_bytes=1 << 20))
    soon = time.monotonic() + 10
    service.adopt(placement(), check_only=False, deadline=soon)
    service.begin_run("r", 1, 1, ["t"], deadline=soon)
    core, rows = service.journal.core, service.journal.rows.live(("t", 0))
    carry_out, decided, go_on = rows.apply, threading.Event(), threading.Event()

    def slowly(*arguments):
        decided.set()
        assert go_on.wait(10)
        return carry_out(*arguments)

    rows.apply = slowly
    part = pb.PartitionPush(table="t", partition=0, seq=1, row_ids=bytes(8), gradients=np.ones(2, "<f4").tobytes())
    request = pb.PushRequest(run="r", attempt=1, worker=0, step=1, learning_rate=1.0, epoch=1, partitions=[part])
    pusher = threading.Thread(target=service.push, args=(request,), kwargs={"deadline": soon})
    pusher.start()
    assert decided.wait(10)
    once_more = {"check_only": False, "deadline": soon}
    adopter = threading.Thread(target=service.adopt, args=(placement(2, seed=1),), kwargs=once_more)
    adopter.start()
    adopter.join(0.2)
    assert core.epoch == 1
    go_on.set()
    pusher.join()
    adopter.join()
    assert core.epoch == 2
    assert core.reached("t") == 0
    service.close()


def test_room_for_a_base_is_asked_for_what_it_holds_and_sealed_rows_are_in_none(tmp_path, monkeypatch):
    """Else a disk smaller than the sealed rows took no base ever, and the log grew until it was full."""
    with local_shards(tmp_path, 1, state=tmp_path / "state") as (shard,), MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [table("t", 1000), table("m@1", 100_000, optimizer=None)])
        service = shard._service
        monkeypatch.setattr(service.journal.log._disk, "free_bytes", lambda: 1000 * 32)
        service._bases.make()
        assert service.journal.is_based
        monkeypatch.setattr(service.journal.log._disk, "free_bytes", lambda: 1000 * 32 - 1)
        with pytest.raises(DiskFullError, match="needs 32000 bytes"):
            service._bases.make()


def test_the_log_on_disk_stays_near_the_bound_that_bases_are_made_by(tmp_path):
    """A segment of 64 MiB stayed active through all bases, whatever the bound."""
    state = tmp_path / "state"
    with local_shards(tmp_path, 1, state=state, log_bytes=1 << 17), MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [table("t", 1000)])
        run, rows = TrainingRun(client, run="r", tables=["t"]), (np.arange(1000), np.ones((1000, 8), np.float32))
        for step in range(1, 31):
            run.push({"t": rows}, step=step, learning_rate=1.0)
        until(lambda: sum(path.stat().st_size for path in (state / "log").iterdir()) <= 5 << 17)
