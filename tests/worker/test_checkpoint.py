"""A checkpoint is served from a store of any size, and what is not the checkpoint's is never taken for it."""

import dataclasses
import json
import threading

import numpy as np
import pytest

from engrid.client import ClientConfig, MemoryClient
from engrid.control.tables import create_tables, load_partition
from engrid.rpc.errors import BadRequestError
from engrid.tables import RowTable
from engrid.worker.rows.tables import sealed_spec
from engrid.worker.saved_model import open_checkpoint
from engrid.worker.serve.sealed_tables import serve_tables
from engrid.worker.train.run import Place
from tests.shards import local_shards
from tests.worker.conftest import finish, make_out, table_bytes, tiny_config


def serve(checkpoint, client):
    return serve_tables(open_checkpoint(checkpoint), client)


def sealed_bytes(client, saved, layer):
    return table_bytes(client, sealed_spec(saved.tables[layer], saved.version))


def assert_rows(client, trained):
    client.connections.refresh()
    for layer in trained.saved.tables:
        assert np.array_equal(sealed_bytes(client, trained.saved, layer), trained.rows[layer])


def epoch(client):
    client.connections.refresh()
    return client.connections.epoch


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("shared", [False, True], ids=["grpc", "mapped"])
def test_rows_are_the_same_on_any_number_of_shards(trained, folder, shards, shared):
    config = ClientConfig(shared_memory=shared)
    with local_shards(folder, shards), MemoryClient(f"file:{folder}", config) as client:
        names = serve(trained.checkpoint, client)
        for name in names.tables:
            holders = {part.primary for part in client.placement.partitions[name]}
            assert holders == {f"s{index}" for index in range(shards)}
        assert_rows(client, trained)
        assert (client.traffic.rows == 0) is shared


def test_a_new_run_leaves_the_checkpoints_of_another_alone(store, folder, out):
    finish(tiny_config(out), folder=folder)
    version = open_checkpoint(out / "checkpoint").version
    with pytest.raises(ValueError, match=r"holds checkpoints \(step-00000008\); go on from the newest with --resume"):
        finish(tiny_config(out), folder=folder)
    finish(tiny_config(out, save=False), folder=folder)
    assert open_checkpoint(out / "checkpoint").version == version


def test_the_newest_of_several_is_taken_and_old_ones_go_with_what_only_they_need(store, folder, out):
    finish(tiny_config(out, steps=12, checkpoint_every=1, full_every=3, keep=2), folder=folder)
    names = sorted(path.name for path in (out / "checkpoint").iterdir())
    # The last is full; the one before it changes two others.
    assert names == [f"step-{step:08d}" for step in (10, 11, 12)]
    assert open_checkpoint(out / "checkpoint").step == 12
    eleven = open_checkpoint(out / "checkpoint" / "step-00000011")
    assert [manifest.step for manifest in eleven.chain] == [10, 11]


def test_an_incremental_checkpoint_is_served_with_those_it_changes(store, folder, out):
    config = tiny_config(out, checkpoint_every=3, keep=0)
    finish(config, folder=folder)
    saved = open_checkpoint(out / "checkpoint" / "step-00000006")
    assert [manifest.step for manifest in saved.chain] == [3, 6]
    serve(out / "checkpoint" / "step-00000006", store)
    six = make_out(out.parent / "six")
    finish(tiny_config(six, memory="in_process", checkpoint_every=6))
    at_six = open_checkpoint(six / "checkpoint" / "step-00000006")
    for layer, spec in saved.tables.items():
        expected = RowTable(spec)
        at_six.checkpoints.restore(list(at_six.chain), expected)
        assert np.array_equal(sealed_bytes(store, saved, layer), expected.raw(0, spec.rows))


def test_live_tables_of_the_run_are_left_alone(store, folder, out):
    """A version is served beside the rows that are trained on."""
    finish(tiny_config(out), folder=folder)
    manifest = open_checkpoint(out / "checkpoint")
    store.connections.refresh()
    first = table_bytes(store, manifest.tables[0], step=8)
    serve(out / "checkpoint", store)
    assert np.array_equal(table_bytes(store, manifest.tables[0], step=8), first)
    assert np.array_equal(sealed_bytes(store, manifest, 0), first)


def test_checkpoints_of_runs_of_one_name_are_served_side_by_side(store, folder, out):
    finish(tiny_config(out), folder=folder)
    first, names = open_checkpoint(out / "checkpoint"), serve(out / "checkpoint", store)
    rows = sealed_bytes(store, first, 0)
    other = make_out(out.parent / "other")
    finish(tiny_config(other, learning_rate=0.1), Place(identity="demo-2"), folder)
    second = open_checkpoint(other / "checkpoint")
    assert not set(names.tables) & set(serve(other / "checkpoint", store).tables)
    assert not np.array_equal(sealed_bytes(store, second, 0), rows)
    assert np.array_equal(sealed_bytes(store, first, 0), rows)


def test_rows_the_shards_hold_already_are_not_loaded_again(trained, store):
    serve(trained.checkpoint, store)
    assert_rows(store, trained)
    before = epoch(store)
    serve(trained.checkpoint, store)
    assert epoch(store) == before
    with MemoryClient(store.placement.shards["s0"]) as reader:
        serve(trained.checkpoint, reader)


def test_workers_that_serve_one_checkpoint_at_once_do_not_disturb_each_other(trained, folder, store):
    errors = []

    def worker():
        try:
            with MemoryClient(f"file:{folder}") as client:
                serve(trained.checkpoint, client)
                assert_rows(client, trained)
        except Exception as error:  # noqa: BLE001 - told below
            errors.append(error)

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_other_rows_are_refused_under_the_name_of_a_version(trained, store):
    serve(trained.checkpoint, store)
    spec = sealed_spec(trained.saved.tables[0], trained.saved.version)
    part = store.placement.partitions[spec.name][1]
    with pytest.raises(BadRequestError, match="sealed and holds other rows"):
        load_partition(store, spec.name, part.index, [bytes(len(part) * spec.row_bytes)], step=90)
    assert_rows(store, trained)


def test_loading_that_was_cut_off_is_taken_up_again(trained, store):
    spec = sealed_spec(trained.saved.tables[0], trained.saved.version)
    create_tables(store, [spec])
    with pytest.raises(Exception, match="16 bytes came"):
        load_partition(store, spec.name, 0, [bytes(16)], step=90)
    serve(trained.checkpoint, store)
    assert_rows(store, trained)


@pytest.mark.parametrize("moved", [False, True], ids=["same address", "new address"])
def test_rows_lost_with_their_shard_are_loaded_again(trained, folder, moved):
    listen = "127.0.0.1:0"
    for _ in range(2):
        with local_shards(folder, 1, listen=listen) as (shard,), MemoryClient(f"file:{folder}") as client:
            serve(trained.checkpoint, client)
            assert_rows(client, trained)
            listen = "127.0.0.1:0" if moved else shard.address


def test_checkpoint_of_a_run_in_process_holds_its_rows(store, folder, out):
    """`save` promises a checkpoint, whatever the memory."""
    finish(tiny_config(out, memory="in_process"), folder=None)
    manifest = open_checkpoint(out / "checkpoint")
    serve(out / "checkpoint", store)
    ours = {layer: sealed_bytes(store, manifest, layer) for layer in manifest.tables}
    finish(tiny_config(out, save=False), folder=folder)
    store.connections.refresh()
    for layer, spec in manifest.tables.items():
        assert not np.array_equal(ours[layer], RowTable(spec).raw(0, spec.rows))
        assert np.array_equal(ours[layer], table_bytes(store, spec, step=8))


def test_version_names_the_step_and_is_that_of_the_bytes(trained):
    assert trained.saved.version.startswith("90-")
    manifest = trained.saved.manifest
    assert dataclasses.replace(manifest, files={}).digest != manifest.digest
    assert dataclasses.replace(trained.saved, chain=[manifest, manifest]).version != trained.saved.version


def test_checkpoint_without_memory_has_no_tables(out):
    finish(tiny_config(out, memory="off"), folder=None)
    manifest = open_checkpoint(out / "checkpoint")
    assert manifest.tables == {}
    assert manifest.model.engram is None
    assert not list((out / "checkpoint" / "step-00000008" / "tables").iterdir())
    assert json.loads((out / "result.json").read_text(encoding="utf-8"))["config"]["memory"] == "off"
