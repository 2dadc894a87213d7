"""Pushes through real shards: bit-equal to the same optimizer in process, whole or absent, refused in full."""

import threading
import time

import grpc
import numpy as np
import pytest
import torch

from engrid.client import MemoryClient, RowLookup, TrainingRun
from engrid.control.tables import create_tables, export_partition, load_partition
from engrid.rpc.errors import (
    BadRequestError,
    CancelledError,
    ExpectedError,
    FencedError,
    NotFiniteError,
    ReadOnlyTableError,
    RequestTooLargeError,
    RowOutOfRangeError,
    RowWidthMismatchError,
    StepNotReachedError,
    WrongEpochError,
    from_rpc,
)
from engrid.tables import RowTable, decode_rows, sum_duplicates
from engrid.v1 import memory_pb2 as pb
from tests.shards import local_shards, shard_process, table


@pytest.fixture
def store(tmp_path):
    with local_shards(tmp_path, 2), MemoryClient(f"file:{tmp_path}") as client:
        yield client


def begin(client, tables=("t",), *, run="r", attempt=1, worker=0, workers=1):
    return TrainingRun(client, run=run, attempt=attempt, worker=worker, workers=workers, tables=list(tables))


def all_rows(client, spec, step=0):
    raw = client.lookup(spec.name, np.arange(spec.rows), step=step)
    return decode_rows(np.ascontiguousarray(raw), spec.row_format, spec.width)


def some_gradients(rng, spec, count=400):
    ids = rng.integers(-1, spec.rows, count)
    return ids, rng.standard_normal((count, spec.width), np.float32)


@pytest.mark.parametrize("row_format", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_bit_equal_to_the_same_optimizer_in_process(store, optimizer, row_format):
    spec = table(optimizer=optimizer, row_format=row_format)
    create_tables(store, [spec], partitions_per_shard=3)
    local, rng = RowTable(spec), np.random.default_rng(0)
    run = begin(store)
    for step in range(1, 11):
        ids, values = some_gradients(rng, spec)
        run.push({"t": (ids, values)}, step=step, learning_rate=0.01)
        local.apply(*sum_duplicates(ids, values), step, 0.01)
    raw = np.empty((spec.rows, spec.row_bytes), np.uint8)
    local.gather(np.arange(spec.rows), raw)
    assert np.array_equal(store.lookup("t", np.arange(spec.rows), step=10), raw)


@pytest.mark.parametrize("workers", [1, 2])
def test_within_1e_5_of_torch_sparse_adam(store, workers):
    spec = table(optimizer="adam", rows=300)
    create_tables(store, [spec])
    weight = torch.nn.Parameter(torch.from_numpy(all_rows(store, spec).copy()))
    reference = torch.optim.SparseAdam([weight], lr=0.02)
    runs = [begin(store, worker=rank, workers=workers) for rank in range(workers)]
    rng = np.random.default_rng(1)
    for step in range(1, 51):
        parts = [some_gradients(rng, spec, 60) for _ in runs]
        for run, part in zip(runs, parts, strict=True):
            run.push({"t": part}, step=step, learning_rate=0.02)
        ids = np.concatenate([part[0] for part in parts])
        values = np.concatenate([part[1] for part in parts])[ids >= 0]
        weight.grad = torch.sparse_coo_tensor(
            torch.from_numpy(ids[ids >= 0])[None], torch.from_numpy(values), weight.shape, check_invariants=True
        )
        reference.step()
    assert np.abs(all_rows(store, spec, step=50) - weight.detach().numpy()).max() < 1e-5


def test_lookup_waits_for_the_step_it_names(store):
    create_tables(store, [table()])
    first, second = begin(store, worker=0, workers=2), begin(store, worker=1, workers=2)
    first.push({}, step=1, learning_rate=0.1)
    waiting = store.prefetch([RowLookup("t", np.arange(10)[:, None])], step=1, timeout=10)
    done = threading.Event()
    reader = threading.Thread(target=lambda: (waiting.rows("t"), done.set()))
    reader.start()
    assert not done.wait(0.3), "the second worker has not pushed yet"
    second.push({}, step=1, learning_rate=0.1)
    assert done.wait(5)
    reader.join()


def test_step_that_never_comes_is_an_error_by_the_deadline(store):
    create_tables(store, [table()])
    begin(store)
    with pytest.raises(StepNotReachedError, match="is at step 0, the lookup needs 3"):
        store.lookup("t", np.arange(10), step=3, timeout=0.3)


def test_waiting_lookup_can_be_cancelled_and_the_stream_goes_on(store):
    create_tables(store, [table()])
    begin(store)
    waiting = store.prefetch([RowLookup("t", np.arange(1000)[:, None])], step=1, timeout=60)
    after = store.prefetch([RowLookup("t", np.arange(1000)[:, None])], timeout=60)
    waiting.cancel()
    started = time.monotonic()
    assert len(after.rows("t")) == 1000, "requests behind the cancelled one are answered"
    assert time.monotonic() - started < 10
    with pytest.raises(CancelledError):
        waiting.rows("t")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_leaves_nothing_behind(store, bad):
    spec = table()
    create_tables(store, [spec])
    run, before = begin(store), all_rows(store, spec)
    values = np.ones((3, 8), np.float32)
    values[1, 5] = bad
    with pytest.raises(NotFiniteError, match="row 7"):
        run.push({"t": (np.array([1, 7, 900]), values)}, step=1, learning_rate=1.0)
    assert np.array_equal(all_rows(store, spec), before)
    run.push({"t": (np.array([1]), np.ones((1, 8), np.float32))}, step=1, learning_rate=1.0)
    assert not np.array_equal(all_rows(store, spec, step=1), before), "the run goes on with another batch"


@pytest.fixture
def store_of_processes(tmp_path):
    with (
        shard_process(tmp_path, "s0"),
        shard_process(tmp_path, "s1"),
        MemoryClient(f"file:{tmp_path}") as client,
    ):
        yield client


def test_shard_that_sees_a_nan_refuses_and_no_shard_applies_the_step(store_of_processes, monkeypatch):
    """The client's own check is taken away: what another client might send."""
    store, spec = store_of_processes, table()
    create_tables(store, [spec])
    run, before = begin(store), all_rows(store, spec)
    monkeypatch.setattr("engrid.client.training.np.isfinite", lambda values: np.ones(values.shape, bool))
    values = np.ones((2, 8), np.float32)
    values[1] = np.nan
    ids = np.array([1, 999])
    placed = store.placement.partitions["t"]
    assert placed[0].primary != placed[-1].primary, "the two rows lie on different shards"
    with pytest.raises(NotFiniteError, match="row 999"):
        run.push({"t": (ids, values)}, step=1, learning_rate=1.0)
    monkeypatch.undo()
    assert np.array_equal(all_rows(store, spec), before)
    run.push({"t": (ids, np.full((2, 8), 4, np.float32))}, step=1, learning_rate=1.0)
    changed = before - all_rows(store, spec, step=1)
    assert np.flatnonzero(changed.any(axis=1)).tolist() == [1, 999], "the step was pushed anew, once"
    assert np.allclose(changed[[1, 999]], 4), "and nothing of the first try is left, on no shard"


@pytest.mark.parametrize(
    ("ids", "values", "error"),
    [
        (np.arange(2, dtype=np.float32), np.zeros((2, 8), np.float32), BadRequestError),
        ([True, False], np.zeros((2, 8), np.float32), BadRequestError),
        ([1, 2**63], np.zeros((2, 8), np.float32), RowOutOfRangeError),
        (np.arange(4).reshape(2, 2), np.zeros((2, 8), np.float32), BadRequestError),
        (np.arange(2), np.zeros((2, 8)), BadRequestError),
        (np.arange(3), np.zeros((2, 8), np.float32), BadRequestError),
        (np.arange(2), np.zeros((2, 7), np.float32), RowWidthMismatchError),
        (np.array([0, 1000]), np.zeros((2, 8), np.float32), RowOutOfRangeError),
        (np.array([-2, 0]), np.zeros((2, 8), np.float32), RowOutOfRangeError),
    ],
)
def test_bad_arrays_are_refused_before_anything_leaves(store, ids, values, error):
    create_tables(store, [table()])
    run = begin(store)
    with pytest.raises(error, match="table t"):
        run.push({"t": (ids, values)}, step=1, learning_rate=0.1)
    run.push({}, step=1, learning_rate=0.1)


def test_read_only_table_refuses_pushes(store):
    create_tables(store, [table("fp8", width=256, optimizer=None, row_format="fp8_e4m3_ue8m0")])
    run = begin(store, ["fp8"])
    with pytest.raises(ReadOnlyTableError, match="fp8"):
        run.push({"fp8": (np.arange(1), np.zeros((1, 256), np.float32))}, step=1, learning_rate=0.1)


def test_push_over_the_message_limit_is_refused_before_it_leaves(store, monkeypatch):
    create_tables(store, [table()])
    monkeypatch.setattr("engrid.client.training.MAX_MESSAGE_BYTES", 8192)
    with pytest.raises(RequestTooLargeError, match="limit of 8192"):
        begin(store).push({"t": (np.arange(1000), np.zeros((1000, 8), np.float32))}, step=1, learning_rate=0.1)


def test_older_attempt_is_fenced(store):
    create_tables(store, [table()])
    old = begin(store, attempt=1)
    begin(store, attempt=2)
    with pytest.raises(FencedError) as refused:
        old.push({}, step=1, learning_rate=0.1)
    assert refused.value.attempt == 2
    with pytest.raises(FencedError):
        begin(store, attempt=1)


def test_skipped_step_is_refused(store):
    create_tables(store, [table()])
    with pytest.raises(ExpectedError, match="at step 0"):
        begin(store).push({}, step=2, learning_rate=0.1)


def raw_push(client, part, **more):
    """A push as another client might send it, straight to the shard that holds the partition."""
    transport = client.connections.transport(client.placement.partitions["t"][0].primary)
    more = {"epoch": client.placement.epoch, **more}
    request = pb.PushRequest(run="r", attempt=1, worker=0, step=1, learning_rate=0.1, partitions=[part], **more)
    try:
        return transport.stub.Push(request, timeout=5)
    except grpc.RpcError as error:
        raise from_rpc(error, transport.peer) from error


def part(ids, values, seq=1):
    return pb.PartitionPush(
        table="t", partition=0, seq=seq, row_ids=np.array(ids, "<i8").tobytes(), gradients=values.tobytes()
    )


def test_shard_checks_what_it_is_sent(store):
    create_tables(store, [table()])
    begin(store)
    row = np.ones((1, 8), np.float32)
    for bad, error in [
        (part([600], row), RowOutOfRangeError),
        (part([-1], row), RowOutOfRangeError),
        (part([2, 2], np.ones((2, 8), np.float32)), BadRequestError),
        (part([2], np.ones((1, 7), np.float32)), RowWidthMismatchError),
        (part([2], row * np.nan), NotFiniteError),
        (part([2], row, seq=5), ExpectedError),
        (pb.PartitionPush(table="t", partition=0, seq=1, row_ids=b"1234567"), BadRequestError),
    ]:
        with pytest.raises(error):
            raw_push(store, bad)
    before = store.lookup("t", np.arange(10))
    assert raw_push(store, part([2], row)).outcomes == [pb.ACCEPTED]
    assert raw_push(store, part([2], row)).outcomes == [pb.DUPLICATE]
    after = decode_rows(store.lookup("t", np.arange(10)), "float32", 8)
    moved = decode_rows(before, "float32", 8) - after
    assert np.allclose(moved[2], 0.1)
    assert np.flatnonzero(moved.any(axis=1)).tolist() == [2]


def test_push_routed_before_the_table_was_made_is_refused(store):
    create_tables(store, [table()])
    begin(store)
    with pytest.raises(WrongEpochError, match="made at epoch 1, after epoch 0"):
        raw_push(store, part([2], np.ones((1, 8), np.float32)), epoch=0)


def test_push_is_whole_or_absent_to_any_lookup(store):
    """Every row of a partition gets the same gradient each step; a reader must never see two values."""
    spec = table(rows=4000, width=16, init_std=0.0)
    create_tables(store, [spec])
    run, stop, torn = begin(store), threading.Event(), []
    bounds = [(part.start, part.stop) for part in store.placement.partitions["t"]]

    def read():
        while not stop.is_set():
            rows = all_rows(store, spec)
            torn.extend(bounds for low, high in bounds if len(np.unique(rows[low:high])) > 1)

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(1, 60):
        run.push({"t": (np.arange(4000), np.ones((4000, 16), np.float32))}, step=step, learning_rate=1.0)
    stop.set()
    reader.join()
    assert not torn
    assert (all_rows(store, spec, step=59) == -59.0).all()


def test_export_and_load_move_rows_between_partitions(store):
    spec = table(row_format="bfloat16", optimizer="adam")
    create_tables(store, [spec], partitions_per_shard=2)
    run = begin(store)
    run.push({"t": (np.arange(1000), np.ones((1000, 8), np.float32))}, step=1, learning_rate=0.5)
    kept = {part.index: list(export_partition(store, "t", part.index)) for part in store.placement.partitions["t"]}
    assert {step for chunks in kept.values() for step, _ in chunks} == {1}
    trained = all_rows(store, spec)
    create_tables(store, [spec], partitions_per_shard=2, replace=True)
    assert not np.array_equal(all_rows(store, spec), trained)
    for index, chunks in kept.items():
        whole = b"".join(rows for _, rows in chunks)
        odd = [whole[start : start + 37] for start in range(0, len(whole), 37)]
        load_partition(store, "t", index, odd, step=1)
    assert np.array_equal(all_rows(store, spec, step=1), trained)
    with pytest.raises(WrongEpochError, match="made at epoch 3"):
        run.push({}, step=2, learning_rate=0.1)


@pytest.mark.parametrize("extra", [-1, 1])
def test_load_of_too_few_or_too_many_bytes_changes_nothing(store, extra):
    spec = table()
    create_tables(store, [spec])
    before = all_rows(store, spec)
    size = len(store.placement.partitions["t"][0]) * spec.row_bytes
    with pytest.raises(RowWidthMismatchError, match="Nothing was changed"):
        load_partition(store, "t", 0, [b"\0" * (size + extra)], step=1)
    assert np.array_equal(all_rows(store, spec), before)


def broken_off():
    yield bytes(16)
    raise ZeroDivisionError("in the caller's own file")


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"chunks": broken_off()}, ZeroDivisionError),
        ({"chunks": None}, TypeError),
        ({"chunks": ["x"]}, BadRequestError),
        ({"chunks": [np.zeros(8, np.uint8)]}, BadRequestError),
        ({"step": -1}, BadRequestError),
        ({"step": 2**64}, BadRequestError),
        ({"step": True}, BadRequestError),
        ({"step": 1.0}, BadRequestError),
        ({"attempt": "1"}, BadRequestError),
        ({"run": "\ud800"}, BadRequestError),
        ({"run": "x" * (1 << 20)}, BadRequestError),
        ({"index": True}, BadRequestError),
        ({"index": "0"}, BadRequestError),
    ],
)
def test_what_stops_a_load_here_is_no_failure_of_the_shard(store, given, error):
    """gRPC said "Exception iterating requests!", and it arrived as an InternalError of the shard."""
    create_tables(store, [table()])
    before = store.lookup("t", np.arange(10))
    with pytest.raises(error):
        load_partition(store, "t", **{"index": 0, "chunks": [b""], "step": 1, **given})
    assert np.array_equal(store.lookup("t", np.arange(10)), before)
