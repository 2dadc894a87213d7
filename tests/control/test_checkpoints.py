"""Checkpoints over real shards: what comes back is what was there after the step, on any number of shards, or an error."""

import errno
import os
import threading

import numpy as np
import pytest

from engrid.client import ClientConfig, MemoryClient, TrainingRun
from engrid.client.attempts import newest_attempt
from engrid.control.checkpoints import CheckpointSave, check_folder, live_states, restore_tables
from engrid.control.tables import create_tables, spread_placement
from engrid.rpc.errors import (
    BadRequestError,
    EngridError,
    ExpectedError,
    FencedError,
    RunMismatchError,
    ShardUnavailableError,
    StepNotReachedError,
)
from engrid.shard.ops import folders
from engrid.storage.checkpoint import Checkpoints
from engrid.storage.disk import LocalDisk
from engrid.storage.errors import CheckpointDamagedError
from tests.shards import local_shards, shard_process, table

SPECS = {
    "adam": table("adam", optimizer="adam"),
    "half": table("half", 700, optimizer="adam", row_format="bfloat16"),
    "adagrad": table("adagrad", 333, optimizer="adagrad"),
}
TABLES = list(SPECS)


@pytest.fixture
def folder(tmp_path):
    """Of the directory that shards register in."""
    return tmp_path / "run"


@pytest.fixture
def saved(tmp_path):
    """The folder of checkpoints."""
    return tmp_path / "saved"


def checkpoints(saved):
    return Checkpoints(LocalDisk(saved))


@pytest.fixture
def store(folder):
    """Two shards with tables of each optimizer, and a client."""
    config = ClientConfig(push_timeout=2.0)  # so long is a shard waited for that lost its rows
    with local_shards(folder, 2), MemoryClient(f"file:{folder}", config) as client:
        create_tables(client, list(SPECS.values()), partitions_per_shard=2)
        yield client


def begin(client, attempt=1, worker=0, workers=1):
    return TrainingRun(client, run="r", attempt=attempt, worker=worker, workers=workers, tables=TABLES)


def push(run, step, share=0.2, worker=0):
    rng = np.random.default_rng((step, worker))
    gradients = {}
    for name, spec in SPECS.items():
        ids = np.flatnonzero(rng.random(spec.rows) < share)
        gradients[name] = (ids, rng.standard_normal((len(ids), spec.width)).astype(np.float32))
    run.push(gradients, step=step, learning_rate=0.1)


def save(client, saved, step, attempt=1, base=""):
    return CheckpointSave(client, saved, run="r", attempt=attempt, step=step, tables=TABLES, base=base)


def save_whole(client, saved, step, attempt=1, base=""):
    return save(client, saved, step, attempt, base).finish({}, {})


def arrays(saved, name):
    """Rows and optimizer state of all tables, as the checkpoint holds them."""
    store = checkpoints(saved)
    chain = store.chain(name)
    found = {}
    for table_name, spec in SPECS.items():
        like = next(part for part in chain[0].partitions if part.table == table_name).arrays
        types = {"U8": np.uint8, "F32": np.float32}
        into = {each: np.empty((spec.rows, *of.shape[1:]), types[of.dtype]) for each, of in like.items()}
        store.restore_arrays(chain, table_name, 0, spec.rows, into)
        found |= {(table_name, each): array.tobytes() for each, array in into.items()}
    return found


def rows(client):
    return {name: client.lookup(name, np.arange(spec.rows)).tobytes() for name, spec in SPECS.items()}


def test_a_checkpoint_is_one_step_of_all_shards_though_training_goes_on(store, saved, tmp_path):
    run = begin(store)
    for step in (1, 2):
        push(run, step)
    before = rows(store)
    under_way = save(store, saved, 2)
    for step in (3, 4, 5):
        push(run, step, share=0.9)
    manifest = under_way.finish({}, {"note": 1})
    assert (manifest.step, manifest.run, manifest.about) == (2, "r", {"note": 1})
    found = arrays(saved, manifest.name)
    assert {name: found[name, "rows"] for name in TABLES} == before
    assert len({part.index for part in manifest.partitions if part.table == "adam"}) == 4
    assert checkpoints(saved).verify(manifest.name) == []


def test_restored_over_three_shards_and_one_rows_and_state_are_bit_equal(store, folder, saved, tmp_path):
    run = begin(store)
    for step in (1, 2, 3):
        push(run, step)
    first = save_whole(store, saved, 3)
    push(run, 4, share=0.05)
    manifest = save_whole(store, saved, 4, base=first.name)
    assert all(part.base == first.name for part in manifest.partitions)
    expected, attempt = arrays(saved, manifest.name), 1
    for count in (3, 1):
        attempt += 1
        there = tmp_path / f"shards-{count}"
        with local_shards(there, count), MemoryClient(f"file:{there}") as client:
            restore_tables(client, saved, checkpoints(saved).read(manifest.name), attempt=attempt)
            assert {part.primary for part in client.placement.partitions["adam"]} == {f"s{n}" for n in range(count)}
            again = begin(client, attempt)
            assert again.step == 4
            manifest = save_whole(client, saved, 4, attempt)
        assert arrays(saved, manifest.name) == expected
    # What the run would have become, and what becomes of it after all the moves.
    push(run, 5)
    there = tmp_path / "last"
    with local_shards(there, 2), MemoryClient(f"file:{there}") as client:
        restore_tables(client, saved, manifest, attempt=9)
        push(begin(client, 9), 5)
        assert rows(client) == rows(store)


def test_live_tables_are_overwritten_in_place_and_older_attempts_fenced(store, saved):
    old = begin(store)
    push(old, 1)
    before = rows(store)
    manifest = save_whole(store, saved, 1)
    push(old, 2)
    epoch = store.connections.epoch
    restore_tables(store, saved, manifest, attempt=2)
    assert rows(store) == before
    assert store.connections.epoch == epoch, "the tables stayed"
    with pytest.raises(FencedError, match="attempt 1 of run r is fenced"):
        push(old, 3)
    with pytest.raises(FencedError, match="attempt 1 of run r is older than attempt 2"):
        restore_tables(store, saved, manifest, attempt=1)
    assert rows(store) == before
    assert newest_attempt(store, "r") == 2
    new = begin(store, 2)
    push(new, 2)
    incremental = save_whole(store, saved, 2, attempt=2, base=manifest.name)
    assert all(part.base for part in incremental.partitions), "touched rows are counted from what was restored"


def test_the_step_is_waited_for_and_one_gone_by_is_refused(store, saved):
    both = [begin(store, worker=worker, workers=2) for worker in range(2)]
    push(both[0], 1)
    late = threading.Timer(0.3, lambda: push(both[1], 1, worker=1))
    late.start()
    under_way = save(store, saved, 1)
    late.join()
    under_way.abandon()
    with pytest.raises(ExpectedError, match="beyond step 0"):
        save(store, saved, 0)
    with pytest.raises(RunMismatchError):
        save(store, saved, 1, attempt=2)
    assert checkpoints(saved).names() == []


def test_a_step_that_does_not_come_ends_the_wait(folder, saved, store):
    begin(store)
    quick = ClientConfig(begin_timeout=0.2)
    with MemoryClient(f"file:{folder}", quick) as client, pytest.raises(StepNotReachedError, match="is of 7"):
        save(client, saved, 7)


def test_a_save_given_up_leaves_its_rows_to_the_next(store, saved):
    run = begin(store)
    push(run, 1)
    first = save_whole(store, saved, 1)
    push(run, 2, share=0.05)
    save(store, saved, 2, base=first.name).abandon()
    push(run, 3, share=0.05)
    second = save_whole(store, saved, 3, base=first.name)
    under_way = save(store, saved, 3, base=second.name)
    assert next(under_way._calls[0]).partitions, "one shard has written its part"
    for call in under_way._calls:
        call.cancel()  # as when the process ends
    push(run, 4)
    third = save_whole(store, saved, 4, base=second.name)
    assert all(part.base == second.name for part in third.partitions)
    whole = save_whole(store, saved / "whole", 4)
    assert arrays(saved, third.name) == arrays(saved / "whole", whole.name)


def test_partitions_that_do_not_know_the_base_are_saved_whole(store, saved):
    run = begin(store)
    push(run, 1)
    first = save_whole(store, saved, 1)
    push(run, 2)
    save_whole(store, saved / "other", 2)
    push(run, 3)
    manifest = save_whole(store, saved, 3, base=first.name)
    assert {part.base for part in manifest.partitions} == {""}


def flip(path, at=-1):
    contents = bytearray(path.read_bytes())
    contents[at] ^= 1
    path.write_bytes(contents)


@pytest.mark.parametrize("array", ["rows", "exp_avg", "exp_avg_sq"])
def test_a_bit_flip_is_named_and_nothing_half_restored_is_served(store, saved, array):
    run = begin(store)
    push(run, 1)
    before = rows(store)
    manifest = save_whole(store, saved, 1)
    push(run, 2)
    path = saved / manifest.name / f"tables/adam-00003.{array}.safetensors"
    flip(path)
    with pytest.raises(BadRequestError, match=rf"{manifest.name}/tables/adam-00003.{array}.safetensors.*is damaged"):
        restore_tables(store, saved, manifest, attempt=2)
    with pytest.raises(ShardUnavailableError, match="a restore that failed"):
        store.lookup("adam", np.arange(1000))
    with pytest.raises(ShardUnavailableError, match="load a checkpoint"):
        begin(store, 2)
    assert any("adam-00003" in line for line in checkpoints(saved).verify(manifest.name))
    flip(path)
    restore_tables(store, saved, manifest, attempt=3)
    assert rows(store) == before


def test_a_missing_file_is_named(store, saved):
    begin(store)
    manifest = save_whole(store, saved, 0)
    (saved / manifest.name / "tables/half-00000.master.safetensors").unlink()
    with pytest.raises(BadRequestError, match=r"half-00000\.master\.safetensors is missing"):
        restore_tables(store, saved, manifest, attempt=2)


def elsewhere(monkeypatch, shard, root):
    """Lets one shard see another directory than the rest, as on a host where the shared one is not mounted."""
    real = folders.CheckpointFolders.disk

    def disk(self, folder, within=""):
        return real(self, str(root) if self._shard == shard else folder, within)

    monkeypatch.setattr(folders.CheckpointFolders, "disk", disk)


def test_a_directory_that_one_shard_does_not_share_is_refused_naming_it(store, saved, tmp_path, monkeypatch):
    check_folder(store, saved)
    assert list(saved.iterdir()) == [], "nothing is left"
    elsewhere(monkeypatch, "s1", tmp_path / "run" / "nowhere")
    with pytest.raises(BadRequestError, match=r"shard s1 cannot use .*saved.*finds no folder"):
        check_folder(store, saved)
    (tmp_path / "run" / "nowhere").mkdir()
    with pytest.raises(BadRequestError, match=r"shard s1 cannot use .*No such file"):
        check_folder(store, saved)
    begin(store)
    with pytest.raises(BadRequestError, match="shard s1 finds no"):
        save(store, saved, 0)
    assert checkpoints(saved).names() == []
    monkeypatch.undo()
    save_whole(store, saved, 0)


def test_a_directory_that_cannot_be_written_is_refused(store, saved, monkeypatch):
    saved.mkdir()
    if os.getuid():
        saved.chmod(0o555)
    else:  # root may write anywhere
        read_only = OSError(errno.EROFS, "Read-only file system")
        monkeypatch.setattr(LocalDisk, "create", lambda *_: (_ for _ in ()).throw(read_only))
    with pytest.raises(OSError, match=r"Read-only|denied"):
        check_folder(store, saved)


def test_a_disk_that_fills_up_ends_the_save_and_nothing_else(store, saved, monkeypatch):
    run = begin(store)
    push(run, 1)
    real = LocalDisk.create

    def full(self, path):
        if "half-00001" in path:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        return real(self, path)

    monkeypatch.setattr(LocalDisk, "create", full)
    with pytest.raises(EngridError, match=r"shard s0 could not save half\[1\].*No space left"):
        save_whole(store, saved, 1)
    push(run, 2)
    monkeypatch.undo()
    assert save_whole(store, saved, 2).step == 2


def test_states_name_run_attempt_and_step(store, saved):
    push(begin(store, 3), 1)
    assert {(each.run, each.attempt, each.step) for each in live_states(store)} == {("r", 3, 1)}


def test_damage_is_a_typed_error_where_the_files_are_read_here(store, saved):
    begin(store)
    manifest = save_whole(store, saved, 0)
    flip(saved / manifest.name / "tables/adam-00000.rows.safetensors")
    with pytest.raises(CheckpointDamagedError, match=r"adam-00000\.rows"):
        checkpoints(saved).check_rows([manifest])


def test_what_was_restored_survives_the_end_of_a_shard_that_keeps_a_log(folder, saved, tmp_path):
    state = ["--state", str(tmp_path / "state")]
    with MemoryClient(f"file:{folder}") as client, shard_process(folder, "s0", *state) as (process, _):
        create_tables(client, list(SPECS.values()), partitions_per_shard=2)
        run = begin(client)
        push(run, 1)
        before = rows(client)
        manifest = save_whole(client, saved, 1)
        push(run, 2)
        restore_tables(client, saved, manifest, attempt=2)
        process.kill()
    with shard_process(folder, "s0", *state), MemoryClient(f"file:{folder}") as client:
        spread_placement(client)  # it is back under another address
        assert rows(client) == before
        with pytest.raises(FencedError):
            begin(client, 1)
        run = begin(client, 2)
        assert run.step == 1
        push(run, 2)
        assert save_whole(client, saved, 2, attempt=2, base=manifest.name).step == 2


@pytest.mark.parametrize(
    "given",
    [{"step": given} for given in (-1, True, None, "1", 1.0, 2**63)]
    + [{"attempt": given} for given in (-1, True, None, "1", 2**64)]
    + [{"run": given} for given in ("\ud800", None, "r" * 513)],
)
def test_what_no_checkpoint_can_be_of_is_named_before_a_folder_is_made(tmp_path, given):
    with local_shards(tmp_path, 1), MemoryClient(tmp_path) as client:
        create_tables(client, [table()])
        with pytest.raises(BadRequestError, match=next(iter(given))):
            CheckpointSave(
                client, tmp_path / "saved", **{"run": "r", "attempt": 1, "step": 1, "tables": ["t"], **given}
            )
        assert not (tmp_path / "saved").exists()
