"""Checkpoints written by real snapshots: what is restored is what was saved, or the damage is named."""

import errno
import random
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from engrid.shard.rows.gradients import Gradients
from engrid.shard.rows.partitions import PartitionRows
from engrid.shard.rows.saving import save_snapshot
from engrid.shard.rows.snapshot import ImageMemory
from engrid.storage.checkpoint import Checkpoints
from engrid.storage.disk import Disk, LocalDisk
from engrid.storage.errors import CheckpointDamagedError, CheckpointError, CheckpointMissingError
from engrid.storage.manifest import Manifest, checkpoint_name
from engrid.tables import OptimizerSpec, RowTable, TableSpec
from tests.simulated_disk import CrashedError, SimulatedDisk

ROWS = 500


def spec_of(kind: Any = "adam", row_format: Any = "float32") -> TableSpec:
    return TableSpec(
        name="t",
        rows=ROWS,
        row_format=row_format,
        width=4,
        seed=1,
        layer=0,
        init_std=0.1,
        optimizer=OptimizerSpec(kind=kind) if kind else None,
    )


class Store:
    """A table cut into partitions, trained and saved as shards do it."""

    def __init__(self, spec: TableSpec, disk: Disk, cuts: list[int], chunk_bytes: int = 1000) -> None:
        self.spec, self.checkpoints, self.chunk_bytes = spec, Checkpoints(disk), chunk_bytes
        self.step, self.attempt = 0, 1
        bounds = [0, *cuts, spec.rows]
        self.parts = [PartitionRows(start, stop, RowTable(spec, start, stop)) for start, stop in pairwise(bounds)]

    def train(self, share: float = 0.1) -> None:
        self.step += 1
        rng = np.random.default_rng((self.step, self.attempt))
        ids = np.flatnonzero(rng.random(self.spec.rows) < share)
        grads = rng.standard_normal((len(ids), self.spec.width)).astype(np.float32)
        for part in self.parts:
            mine = (ids >= part.start) & (ids < part.stop)
            part.apply(self.step, 0.1, [Gradients.of(ids[mine], grads[mine])])

    def save(self, base: str = "", token: str = "a", meanwhile: int = 0) -> str:
        """meanwhile: steps trained between the begin of the snapshots and the sweep."""
        memory, name = ImageMemory(1 << 20), checkpoint_name(self.step, self.attempt)
        for part in self.parts:
            part.begin_snapshot(memory, base, self.chunk_bytes)
        at, published = self.step, ""
        try:
            for _ in range(meanwhile):
                self.train()
            folder = self.checkpoints.begin(name, token)
            saved = [
                save_snapshot(
                    part,
                    self.checkpoints.disk,
                    folder,
                    ("t", index),
                    step=at,
                    attempt=self.attempt,
                    watermarks={0: at, 1: at + 7},
                )
                for index, part in enumerate(self.parts)
            ]
            dense = self.checkpoints.write_file(folder, "model.safetensors", bytes(range(100)))
            self.checkpoints.publish(
                folder,
                Manifest(
                    run="r",
                    attempt=self.attempt,
                    step=at,
                    base=base,
                    tables={"t": self.spec},
                    partitions=saved,
                    files={"model.safetensors": dense},
                    about={"position": at},
                ),
            )
            published = name
        finally:
            for part in self.parts:
                part.settle_snapshot(published)
        return name

    def restore(self, chain: list[Manifest]) -> None:
        self.step = chain[-1].step
        for part in self.parts:
            self.checkpoints.restore(chain, part.rows)
            part.restored(chain[-1].name)

    def content(self) -> dict[str, bytes]:
        names = self.parts[0].rows.arrays()
        return {name: b"".join(part.rows.arrays()[name].tobytes() for part in self.parts) for name in names}


cuts = st.lists(st.integers(1, ROWS - 1), max_size=3, unique=True).map(sorted)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([None, "sgd", "adagrad", "adam"]),
    row_format=st.sampled_from(["float32", "bfloat16"]),
    placements=st.lists(cuts, min_size=2, max_size=4),
    steps=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    share=st.sampled_from([0.01, 0.3]),
)
def test_any_chain_restores_onto_any_partitions_bit_for_bit(
    kind: Any, row_format: Any, placements: list[list[int]], steps: list[int], share: float
) -> None:
    spec, disk = spec_of(kind, row_format), SimulatedDisk()
    store = Store(spec, disk, placements[0], chunk_bytes=700)
    base = ""
    for placed, count in zip(placements, steps, strict=False):
        for _ in range(count + 1):
            store.step += kind is None
            if kind:
                store.train(share)
        expected = store.content()
        base = store.save(base, meanwhile=2 if kind else 0)
        chain = store.checkpoints.latest()
        assert chain[-1].name == base
        assert chain[-1].partitions[0].watermarks == {0: chain[-1].step, 1: chain[-1].step + 7}
        store = Store(spec, disk, placed, chunk_bytes=1500)
        store.restore(chain)
        assert store.content() == expected
    assert len(chain) == len(placements[: len(steps)])
    assert store.checkpoints.verify(base) == []


def test_two_then_three_then_one_partitions_train_on_as_if_never_saved(tmp_path: Path) -> None:
    unbroken, store = Store(spec_of(), LocalDisk(tmp_path), []), Store(spec_of(), LocalDisk(tmp_path), [200])
    base = ""
    for cut in ([100, 400], [], [250]):
        for _ in range(3):
            store.train()
            unbroken.train()
        base = store.save(base, meanwhile=2)
        store = Store(spec_of(), LocalDisk(tmp_path), cut)
        store.restore(store.checkpoints.latest())
        assert store.content() == unbroken.content()
    assert [manifest.base for manifest in store.checkpoints.chain(base)] == ["", "step-00000003", "step-00000006"]


def test_the_files_are_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    store = Store(spec_of(row_format="bfloat16"), LocalDisk(tmp_path), [])
    store.train()
    store.save()
    for name, array in store.parts[0].rows.arrays().items():
        found = load_file(tmp_path / "step-00000001" / "tables" / f"t-00000.{name}.safetensors")
        np.testing.assert_array_equal(found[name], array)
    store.train()
    store.save("step-00000001")
    ids = load_file(tmp_path / "step-00000002" / "tables" / "t-00000.ids.safetensors")["ids"]
    rows = load_file(tmp_path / "step-00000002" / "tables" / "t-00000.rows.safetensors")["rows"]
    assert 0 < len(ids) < 100
    np.testing.assert_array_equal(rows, store.parts[0].rows.raw(0, ROWS)[ids])


def test_rows_alone_of_any_range_can_be_read(tmp_path: Path) -> None:
    store = Store(spec_of(), LocalDisk(tmp_path), [123])
    store.train(0.5)
    first = store.save()
    store.train(0.5)
    second = store.save(first)
    whole = np.frombuffer(store.content()["rows"], np.uint8).reshape(ROWS, 16)
    rng = random.Random(0)
    for _ in range(50):
        start, stop = sorted(rng.sample(range(ROWS + 1), 2))
        rows = np.empty((stop - start, 16), np.uint8)
        store.checkpoints.restore_arrays(store.checkpoints.chain(second), "t", start, stop, {"rows": rows})
        np.testing.assert_array_equal(rows, whole[start:stop])


def test_restored_rows_are_measured_so_that_ordinary_updates_are_not_computed_twice(tmp_path: Path) -> None:
    store = Store(spec_of("adam"), LocalDisk(tmp_path), [100])
    store.train()
    chain = store.checkpoints.chain(store.save())
    table = RowTable(store.spec, filled=False)
    assert not table.stays_finite(1.0, 2, 0.1), "nothing is known of it"
    store.checkpoints.restore(chain, table)
    assert table.stays_finite(1.0, 2, 0.1)


def test_a_later_attempt_is_newer_although_its_step_is_lower(tmp_path: Path) -> None:
    store = Store(spec_of(), LocalDisk(tmp_path), [])
    for _ in range(3):
        store.train()
        store.save()
    store.restore(store.checkpoints.chain("step-00000001"))
    store.attempt = 2
    store.train()
    assert store.save("step-00000001") == "step-00000002.attempt-2"
    assert [manifest.name for manifest in store.checkpoints.latest()] == ["step-00000001", "step-00000002.attempt-2"]
    assert store.checkpoints.names() == ["step-00000001", "step-00000002", "step-00000003", "step-00000002.attempt-2"]


def test_every_flipped_bit_is_found_and_its_file_named() -> None:
    disk = SimulatedDisk()
    store = Store(spec_of("adagrad"), disk, [200])
    store.train()
    first = store.save()
    store.train()
    last = store.save(first)
    paths = [
        f"{name}/{path}"
        for name in (first, last)
        for path in [*store.checkpoints.read(name).sha256s(), "manifest.json"]
    ]
    assert len(paths) == 14
    rng = random.Random(1)
    for path in paths:
        size = disk.size(path)
        for byte in {0, 9, size - 1, *(rng.randrange(size) for _ in range(20))}:
            bit = rng.randrange(8)
            disk.flip(path, byte, bit)
            assert [problem for problem in store.checkpoints.verify(last) if path in problem], (path, byte, bit)
            if path.endswith("model.safetensors"):
                with pytest.raises(CheckpointDamagedError, match=path):
                    store.checkpoints.read_file(store.checkpoints.read(path.split("/")[0]), "model.safetensors")
            else:
                with pytest.raises(CheckpointDamagedError, match=path):
                    store.restore(store.checkpoints.chain(last))
            disk.flip(path, byte, bit)
    assert store.checkpoints.verify(last) == []
    store.restore(store.checkpoints.chain(last))


def test_missing_and_short_files_are_named() -> None:
    disk = SimulatedDisk()
    store = Store(spec_of(), disk, [])
    store.train()
    name = store.save()
    short = disk.open(f"{name}/tables/t-00000.exp_avg.safetensors")
    short.truncate(short.size - 1)
    disk.remove(f"{name}/tables/t-00000.rows.safetensors")
    problems = store.checkpoints.verify(name)
    assert len(problems) == 2
    assert "exp_avg.safetensors has 8" in problems[0]
    assert "rows.safetensors is missing" in problems[1]
    with pytest.raises(CheckpointDamagedError, match=r"t-00000\.rows\.safetensors is missing") as caught:
        store.restore(store.checkpoints.chain(name))
    assert caught.value.paths == (f"{name}/tables/t-00000.rows.safetensors",)


def saving_run(disk: SimulatedDisk) -> list[tuple[str, dict[str, bytes]]]:
    """Full, incremental, full, with old ones removed; what `disk` raises ends it. Returns what was published."""
    done: list[tuple[str, dict[str, bytes]]] = []
    disk.published = done  # type: ignore[attr-defined]
    store = Store(spec_of("adagrad"), disk, [300], chunk_bytes=4000)
    base = ""
    for number in range(4):
        store.train()
        content = store.content()
        disk.attempted = (checkpoint_name(store.step, 1), content)  # type: ignore[attr-defined]
        base = store.save(base if number % 2 else "")
        done.append((base, content))
        store.checkpoints.keep(1)
    return done


def crash_before(operation: int, seed: int = 0, ignore: frozenset[str] = frozenset()) -> str:
    """Runs until that operation, crashes the disk, and says what is wrong with what is found then: "" for nothing."""
    disk = SimulatedDisk(1000 * seed + operation)
    disk.ignore = set(ignore)

    def stop(_what: str, _path: str) -> None:
        if disk.operations >= operation:
            raise CrashedError

    disk.before = stop
    with suppress(CrashedError):
        saving_run(disk)
    published = disk.published  # type: ignore[attr-defined]
    after = disk.crash()
    checkpoints = Checkpoints(after)
    checkpoints.clean()
    possible = dict([*published[-1:], disk.attempted])  # type: ignore[attr-defined]
    chain = checkpoints.latest()
    if not chain:
        return f"lost {published[-1][0]}" if published else ""
    damaged = [problem for name in checkpoints.names() for problem in checkpoints.verify(name)]
    if damaged:
        return damaged[0]
    if chain[-1].name not in possible:
        return f"{chain[-1].name} is the latest, not one of {list(possible)}"
    found = Store(spec_of("adagrad"), after, [100])
    found.restore(chain)
    return "" if found.content() == possible[chain[-1].name] else "other rows"


def test_a_crash_at_any_operation_leaves_the_newest_complete_checkpoint() -> None:
    whole = SimulatedDisk()
    saving_run(whole)
    assert whole.operations > 200
    for seed in range(3):
        for operation in range(3, whole.operations + 1):
            assert crash_before(operation, seed) == "", f"crash_before({operation}, {seed})"


def test_every_sync_is_needed() -> None:
    whole = SimulatedDisk()
    saving_run(whole)
    sites = [site for site in whole.sites if "storage" in site or "checkpoint" in site or "partition" in site]
    assert len(sites) == 6, whole.sites
    for site in sites:
        assert any(
            crash_before(operation, seed, frozenset({site}))
            for seed in range(10)
            for operation in range(whole.operations, 2, -1)
        ), f"without {site} no crash loses anything"


def test_a_full_disk_leaves_the_checkpoint_before_and_its_base() -> None:
    disk = SimulatedDisk()
    store = Store(spec_of(), disk, [300])
    store.train()
    first = store.save()
    disk.capacity = disk.used() + 5000
    store.train()
    expected = store.content()
    with pytest.raises(OSError, match="No space") as caught:
        store.save(token="b")
    assert caught.value.errno == errno.ENOSPC
    disk.capacity = None
    store.checkpoints.clean()
    assert store.checkpoints.names() == [first]
    second = store.save(first)
    other = Store(spec_of(), disk, [])
    other.restore(store.checkpoints.chain(second))
    assert other.content() == expected


def test_old_checkpoints_go_and_the_bases_of_kept_ones_stay(tmp_path: Path) -> None:
    store, names = Store(spec_of(), LocalDisk(tmp_path), []), [""]
    for number in range(6):
        store.train()
        names.append(store.save("" if number in (0, 3) else names[-1]))
    assert store.checkpoints.keep(4) == []
    assert store.checkpoints.keep(2) == names[3:0:-1]
    assert store.checkpoints.names() == names[4:]
    assert sorted(path.name for path in tmp_path.iterdir()) == names[4:]
    with pytest.raises(CheckpointMissingError, match="no checkpoint step-00000002; there are: step-00000004"):
        store.checkpoints.chain(names[2])


def test_a_checkpoint_that_is_held_stays_with_its_bases_until_it_is_released(tmp_path: Path) -> None:
    store, names = Store(spec_of(), LocalDisk(tmp_path), []), [""]
    for number in range(6):
        store.train()
        names.append(store.save("" if number in (0, 3) else names[-1]))
    store.checkpoints.hold(names[2])
    store.checkpoints.hold(names[2])
    assert store.checkpoints.keep(1) == [names[3]]
    assert store.checkpoints.names() == [*names[1:3], *names[4:]]
    assert store.checkpoints.verify(names[2]) == []
    store.checkpoints.release(names[2])
    store.checkpoints.release(names[2])
    assert store.checkpoints.keep(1) == names[2:0:-1]


def test_what_is_not_ours_in_an_old_checkpoint_stops_no_removal(tmp_path: Path) -> None:
    store, names = Store(spec_of(), LocalDisk(tmp_path), []), []
    for _ in range(4):
        store.train()
        names.append(store.save())
    (tmp_path / names[0] / "notes").mkdir()
    (tmp_path / names[0] / "notes" / "mine").write_bytes(b"keep me")
    (tmp_path / f".{names[1]}.removed" / "in the way").mkdir(parents=True)
    (tmp_path / "step-00000077").write_bytes(b"no folder")
    (tmp_path / "step-00000078" / "manifest.json").mkdir(parents=True)
    assert store.checkpoints.keep(1) == names[2::-1]
    store.checkpoints.clean()
    assert store.checkpoints.latest()[-1].name == names[3]
    assert (tmp_path / f".{names[0]}.removed" / "notes" / "mine").read_bytes() == b"keep me"
    assert not (tmp_path / f".{names[0]}.removed" / "manifest.json").exists()
    assert not (tmp_path / f".{names[1]}.1.removed").exists()


def test_what_does_not_make_a_whole_is_refused() -> None:
    store = Store(spec_of(), SimulatedDisk(), [300])
    store.train()
    first = store.checkpoints.read(store.save())
    fields = {name: getattr(first, name) for name in first.__dataclass_fields__}
    for change, message in [
        ({"partitions": first.partitions[:1]}, "rows from 300 on of table t, of 500, are not saved"),
        ({"partitions": [*first.partitions, first.partitions[1]]}, "around 300 are not saved once each"),
        ({"step": 9}, "is at step 1, the checkpoint at step 9"),
        ({"tables": {}}, "has no table t"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            Manifest(**{**fields, **change})
    with pytest.raises(CheckpointError, match="step-00000001 exists already"):
        store.save(token="b")
    other = RowTable(spec_of("adagrad"))
    with pytest.raises(CheckpointError, match="holds nothing as sum of table t; the table needs float32"):
        store.checkpoints.restore([first], other)
