"""A snapshot is the partition as it was when it began, whatever is pushed meanwhile, and pushes know nothing of it."""

import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engrid.rpc.errors import BadRequestError
from engrid.shard.rows.gradients import Gradients
from engrid.shard.rows.partitions import PartitionRows
from engrid.shard.rows.snapshot import ImageMemory, PartitionSnapshot, SnapshotBaseError, SnapshotGivenUpError
from engrid.tables import OptimizerSpec, RowTable, TableSpec

ROWS = 300
ROOMY = 1 << 24


def spec_of(kind: Any = "adam", row_format: Any = "float32", width: int = 4, rows: int = ROWS) -> TableSpec:
    optimizer = OptimizerSpec(kind=kind)
    return TableSpec(
        name="t",
        rows=rows,
        row_format=row_format,
        width=width,
        seed=1,
        layer=0,
        init_std=0.1,
        optimizer=optimizer,
    )


def partition(spec: TableSpec, start: int = 0, stop: int = ROWS) -> PartitionRows:
    return PartitionRows(start, stop, RowTable(spec, start, stop))


def push(part: PartitionRows, step: int, seed: int, share: float = 0.2) -> None:
    rng = np.random.default_rng(seed)
    ids = np.flatnonzero(rng.random(part.stop - part.start) < share) + part.start
    grads = rng.standard_normal((len(ids), part.rows.spec.width)).astype(np.float32)
    part.apply(step, 0.1, [Gradients.of(ids, grads)])


def copy_of(part: PartitionRows) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in part.rows.arrays().items()}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Bit for bit, NaN and -0 included."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes(), name


def sweep_all(snapshot: PartitionSnapshot) -> dict[str, np.ndarray]:
    chunks = []
    while found := next_chunk(snapshot):
        chunks += found
    return joined(chunks)


def joined(chunks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in (chunks[0] if chunks else {})}


operations = st.lists(
    st.one_of(st.tuples(st.just("push"), st.integers(0, 99)), st.tuples(st.just("sweep"), st.integers(0, 1))),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["sgd", "adagrad", "adam"]),
    row_format=st.sampled_from(["float32", "bfloat16"]),
    before=st.integers(0, 3),
    chunk_rows=st.integers(1, 60),
    incremental=st.booleans(),
    share=st.sampled_from([0.02, 0.3, 1.0]),
    plan=operations,
)
def test_a_snapshot_is_the_partition_when_it_began(
    kind: Any, row_format: Any, before: int, chunk_rows: int, incremental: bool, share: float, plan: list[Any]
) -> None:
    spec = spec_of(kind, row_format)
    parts = [partition(spec, 0, 130), partition(spec, 130, ROWS)]
    twins = [partition(spec, 0, 130), partition(spec, 130, ROWS)]
    for part in parts:
        part.restored("base")
    at_base = [copy_of(part) for part in parts]
    step = 0
    for step in range(1, before + 1):
        for part in (*parts, *twins):
            push(part, step, 1000 + step, share)
    expected = [copy_of(part) for part in parts]
    memory = ImageMemory(ROOMY)
    each = spec.row_bytes + spec.state_bytes_per_row
    base = "base" if incremental else ""
    snapshots = [part.begin_snapshot(memory, base, chunk_rows * each) for part in parts]
    chunks: list[list[dict[str, np.ndarray]]] = [[], []]
    for what, number in plan:
        if what == "push":
            step += 1
            for part in (*parts, *twins):
                push(part, step, number, share)
        else:
            chunks[number] += next_chunk(snapshots[number])
    for index, snapshot in enumerate(snapshots):
        while found := next_chunk(snapshot):
            chunks[index] += found
        assert all(len(chunk["rows"]) == chunk_rows for chunk in chunks[index][:-1])
        assert sum(len(chunk["rows"]) for chunk in chunks[index]) == snapshot.count()
        assert_equal(laid_over(at_base[index], chunks[index], parts[index].start), expected[index])
    for part, twin in zip(parts, twins, strict=True):
        assert_equal(copy_of(part), copy_of(twin))
    assert memory.used_bytes == 0
    assert memory.waits == 0


def next_chunk(snapshot: PartitionSnapshot) -> list[dict[str, np.ndarray]]:
    chunk = snapshot.advance()
    return [] if chunk is None else [{name: array.copy() for name, array in chunk.arrays.items()}]


def laid_over(base: dict[str, np.ndarray], chunks: list[dict[str, np.ndarray]], start: int) -> dict[str, np.ndarray]:
    """A full snapshot's arrays, or those of `base` with the rows of an incremental one in place."""
    found = joined(chunks)
    if chunks and "ids" not in found:
        return found
    ids = found.pop("ids", np.empty(0, np.int64)) - start
    assert (np.diff(ids) > 0).all()
    for name, array in found.items():
        base[name][ids] = array
    return base


def test_an_unpublished_snapshot_leaves_its_rows_touched() -> None:
    part = partition(spec_of())
    push(part, 1, 1)
    first = part.begin_snapshot(ImageMemory(ROOMY))
    sweep_all(first)
    part.settle_snapshot("first")
    at_first = copy_of(part)
    push(part, 2, 2)
    second = part.begin_snapshot(ImageMemory(ROOMY), "first")
    push(part, 3, 3)
    part.settle_snapshot()
    with pytest.raises(SnapshotGivenUpError, match=r"rows 0\.\.299 of table t was ended before it was published"):
        second.advance()
    third = part.begin_snapshot(ImageMemory(ROOMY), "first")
    assert_equal(laid_over(at_first, [sweep_all(third)], 0), copy_of(part))
    part.settle_snapshot("third")
    assert part.begin_snapshot(ImageMemory(ROOMY), "third").count() == 0


def test_an_increment_needs_the_base_that_changes_are_counted_from() -> None:
    part = partition(spec_of())
    with pytest.raises(SnapshotBaseError, match="knows what changed since no checkpoint, not since old"):
        part.begin_snapshot(ImageMemory(ROOMY), "old")
    part.restored("old")
    part.begin_snapshot(ImageMemory(ROOMY), "old")
    with pytest.raises(BadRequestError, match="a snapshot that is not settled"):
        part.begin_snapshot(ImageMemory(ROOMY))
    part.settle_snapshot()
    part.restored()
    with pytest.raises(SnapshotBaseError, match="take a full checkpoint"):
        part.begin_snapshot(ImageMemory(ROOMY), "old")


def test_a_bound_below_one_row_is_refused_and_leaves_no_snapshot() -> None:
    part = partition(spec_of())
    with pytest.raises(ValueError, match=r"do not hold one row of table t .48 bytes with its state."):
        part.begin_snapshot(ImageMemory(47))
    part.begin_snapshot(ImageMemory(48))


@pytest.mark.parametrize("images", [1, 7, 100])
def test_a_push_waits_for_room_and_the_snapshot_is_exact(images: int) -> None:
    part, twin = partition(spec_of()), partition(spec_of())
    expected = copy_of(part)
    memory = ImageMemory(48 * images, patience_s=60)
    snapshot = part.begin_snapshot(memory, chunk_bytes=48 * 10)

    def train() -> None:
        for step in range(1, 6):
            push(part, step, step, share=0.9)

    trainer = threading.Thread(target=train)
    trainer.start()
    while not memory.waits:
        time.sleep(0.001)
    found = sweep_all(snapshot)
    trainer.join(60)
    assert not trainer.is_alive()
    for step in range(1, 6):
        push(twin, step, step, share=0.9)
    assert_equal(found, expected)
    assert_equal(copy_of(part), copy_of(twin))
    assert memory.used_bytes == 0 < memory.peak_bytes <= 48 * images


def test_a_sweep_that_stands_still_is_given_up_and_the_push_goes_on() -> None:
    part, twin = partition(spec_of()), partition(spec_of())
    snapshot = part.begin_snapshot(ImageMemory(48 * 3, patience_s=0.05))
    for step in range(1, 4):
        push(part, step, step)
        push(twin, step, step)
    assert_equal(copy_of(part), copy_of(twin))
    with pytest.raises(SnapshotGivenUpError, match=r"before-images filled 144 bytes and no row was swept for 0.05 s"):
        snapshot.advance()
    assert snapshot.memory.waits == 1
    part.settle_snapshot()
    assert_equal(sweep_all(part.begin_snapshot(ImageMemory(ROOMY))), copy_of(twin))


def test_real_threads_push_read_and_sweep_at_once() -> None:
    spec = spec_of(row_format="bfloat16", width=8, rows=6000)
    part, twin = partition(spec, 0, 6000), partition(spec, 0, 6000)
    stop, between_steps = threading.Event(), threading.Lock()
    steps = [0]

    def train() -> None:
        while not stop.is_set():
            with between_steps:
                push(part, steps[0] + 1, steps[0])
                steps[0] += 1

    def read() -> None:
        ids, out = np.arange(6000), np.empty((6000, spec.row_bytes), np.uint8)
        while not stop.is_set():
            part.gather(ids, out)

    caught_up = 0
    threads = [threading.Thread(target=train), threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            memory = ImageMemory(1 << 18)
            with between_steps:
                snapshot, begun = part.begin_snapshot(memory, chunk_bytes=8192), steps[0]
            chunks = next_chunk(snapshot)
            while steps[0] == begun:
                time.sleep(0.0001)
            chunks.append(sweep_all(snapshot))
            found = joined(chunks)
            part.settle_snapshot()
            catch_up(twin, caught_up, begun)
            caught_up = begun
            assert_equal(found, copy_of(twin))
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    catch_up(twin, caught_up, steps[0])
    assert_equal(copy_of(part), copy_of(twin))


def catch_up(part: PartitionRows, first: int, last: int) -> None:
    for step in range(first, last):
        push(part, step + 1, step)
