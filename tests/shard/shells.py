"""A ShardService without gRPC, and requests to it."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from engrid.directory import Placement
from engrid.directory.placement import Partition
from engrid.rpc.frames import ids_to_bytes
from engrid.rpc.wire import Request, TableRequest, decode_reply
from engrid.shard.config import ShardConfig
from engrid.shard.service import ShardService
from engrid.v1 import memory_pb2 as pb
from tests.shards import table

SPEC = table(rows=12, width=2, init_std=0.0)
SECONDS = 20.0


def soon(seconds=SECONDS):
    return time.monotonic() + seconds


def placement(epoch=1, *specs):
    """Of shard "a", each table in two partitions."""
    specs = specs or (SPEC,)
    halves = {
        spec.name: tuple(
            Partition(table=spec.name, index=index, start=start, stop=stop, shards=("a",))
            for index, (start, stop) in enumerate([(0, spec.rows // 2), (spec.rows // 2, spec.rows)])
        )
        for spec in specs
    }
    return Placement(epoch=epoch, shards={"a": "host:1"}, tables={spec.name: spec for spec in specs}, partitions=halves)


@contextmanager
def shell(state=None, *specs, workers=1, **config):
    """A service that has begun attempt 1 of run "r" on each table."""
    service = ShardService(ShardConfig(name="a", directory="file:unused", memory_bytes=1 << 24, state=state, **config))
    try:
        adopt(service, placement(1, *specs))
        for spec in specs or (SPEC,):
            service.begin_run("r", 1, workers, [spec.name], deadline=soon())
        yield service
    finally:
        service.close()


def adopt(service, wanted, **more):
    return service.adopt(wanted, check_only=False, deadline=soon(), **more)


def remade(spec=SPEC):
    """A table of the same name that is another."""
    return replace(spec, seed=spec.seed + 1)


def push(
    service,
    *,
    value=1.0,
    seq=1,
    step=1,
    worker=0,
    rate=1.0,
    hold=False,
    durable=False,
    run="r",
    deadline=None,
    ids=None,
    name="t",
    attempt=1,
    epoch=1,
):
    """The same gradient for rows `ids` of both partitions, by default all."""
    half = service.journal.core.placement.tables[name].rows // 2
    parts = []
    for index in (0, 1):
        rows = np.arange(half) if ids is None else np.array(ids, np.int64)
        gradients = np.full((len(rows), 2), value, "<f4")
        parts.append(
            pb.PartitionPush(
                table=name,
                partition=index,
                seq=seq,
                row_ids=ids_to_bytes(rows + index * half),
                gradients=gradients.tobytes(),
            )
        )
    request = pb.PushRequest(
        run=run,
        attempt=attempt,
        worker=worker,
        step=step,
        learning_rate=rate,
        hold=hold,
        epoch=epoch,
        durable=durable,
        partitions=parts,
    )
    return service.push(request, deadline=deadline or soon())


def commit(service, *, step=1, worker=0, durable=False, run="r", deadline=None):
    request = pb.CommitRequest(run=run, attempt=1, worker=worker, step=step, durable=durable, epoch=1)
    service.commit(request, deadline=deadline or soon())


def look(service, *, step=0, run="", epoch=1, name="t", seconds=SECONDS, rows=None):
    """float32 [rows, 2] of the whole table."""
    ids = np.arange(service.journal.core.placement.tables[name].rows if rows is None else rows)
    request = Request(
        number=1, epoch=epoch, step=step, run=run, tables=[TableRequest(name, memoryview(ids_to_bytes(ids)))]
    )
    reply = service.lookup(request, soon(seconds), lambda: False)
    return np.frombuffer(bytes(decode_reply(reply).rows[0]), "<f4").reshape(-1, 2)


def load(service, value, *, index=0, step=9, run="B", attempt=1, deadline=None, name="t"):
    half = service.journal.core.placement.tables[name].rows // 2
    rows = np.full((half, 2), value, "<f4").tobytes()
    chunks = [pb.LoadChunk(table=name, partition=index, step=step, run=run, attempt=attempt, rows=rows)]
    return service.load(iter(chunks), deadline=deadline or soon())


class Call:
    """Something called in a thread; `result` waits for it and raises what it raised."""

    def __init__(self, call):
        self._call, self.error, self.value = call, None, None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        try:
            self.value = self._call()
        except BaseException as error:  # noqa: BLE001 - raised by `result`
            self.error = error

    def ends_within(self, seconds):
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self):
        assert self.ends_within(SECONDS), "it waits for ever"
        if self.error is not None:
            raise self.error
        return self.value


class Held:
    """Stops the first call of a method of an object until `go`."""

    def __init__(self, owner, name):
        self.reached, self._go = threading.Event(), threading.Event()
        real = getattr(owner, name)

        def held(*arguments, **options):
            if not self.reached.is_set():
                self.reached.set()
                assert self._go.wait(SECONDS)
            return real(*arguments, **options)

        setattr(owner, name, held)

    def wait(self):
        assert self.reached.wait(SECONDS)

    def go(self):
        self._go.set()


def rows_of(service, index=0, name="t"):
    return service.journal.rows.live((name, index))
