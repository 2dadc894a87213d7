"""Versions are switched atomically under readers, and none is dropped while somebody reads it."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from engrid.client import ClientConfig, MemoryClient, RowLookup
from engrid.client import pins as pins_module
from engrid.control.tables import create_tables, drop_tables, load_partition
from engrid.control.versions import prune_versions, publish_version, rollback_version
from engrid.directory import Version
from engrid.rpc.errors import BadRequestError, EngridError, PinnedError, UnknownTableError
from engrid.shard.core.machine import ShardCore
from tests.shards import local_shards, shard_process, table

ROWS = 300
LAYERS = (1, 2)
WAYS = {
    "wire": ClientConfig(shared_memory=False, cache_bytes=0),
    "cached": ClientConfig(shared_memory=False),
    "mapped": ClientConfig(),
}


def version_of(number):
    return Version(f"v{number}", tuple(f"r.engram.{layer}@v{number}" for layer in LAYERS))


def content(number, layer):
    """Row content is a function of version, layer and row."""
    rows = np.arange(ROWS * 8, dtype=np.float32).reshape(ROWS, 8) + 1e4 * number + 1e6 * layer
    return rows.view(np.uint8)


def load_version(client, number):
    """Makes and loads the tables of a version, pinned."""
    version = version_of(number)
    pin = client.pins.of_tables(version)
    create_tables(client, [table(name, ROWS, optimizer=None) for name in version.tables])
    client.pins.renew()
    for name, layer in zip(version.tables, LAYERS, strict=True):
        for part in client.placement.partitions[name]:
            rows = content(number, layer)[part.start : part.stop]
            load_partition(client, name, part.index, [rows.tobytes()], step=1)
    return pin


def number_of(pin):
    return int(pin.version[1:])


@pytest.fixture
def store(tmp_path):
    with local_shards(tmp_path, 2), MemoryClient(f"file:{tmp_path}") as client:
        yield client


def reading(address, config, until, seen, errors):
    """Reads batches of both tables under one pin at a time, and checks all of each."""
    rng = np.random.default_rng(threading.get_ident() % 2**32)
    newest = 0
    try:
        with MemoryClient(address, config) as client:
            while not until.is_set():
                with client.pins.of_run("r") as pin:
                    number = number_of(pin)
                    assert number >= newest, "never older than the pin before"
                    newest = number
                    for _ in range(3):
                        keys = rng.integers(0, ROWS, 40)
                        lookups = [RowLookup(name, keys[:, None], keys, 2) for name in pin.tables]
                        pending = client.prefetch(lookups)
                        for name, layer in zip(pin.tables, LAYERS, strict=True):
                            assert np.array_equal(pending.rows(name)[:, 0], content(number, layer)[keys])
                    seen.append(number)
                client.forget(pin.tables)
    except BaseException as error:
        errors.append(error)
        raise


@pytest.mark.parametrize("config", WAYS.values(), ids=WAYS.keys())
def test_versions_switched_every_50_ms_under_readers(store, config):
    """Each batch is of one version, that of its pin, whatever is published and dropped meanwhile."""
    with load_version(store, 1):
        publish_version(store, "r", version_of(1))
    until, seen, errors = threading.Event(), [], []
    address = store.placement.shards["s0"]
    readers = [threading.Thread(target=reading, args=(address, config, until, seen, errors)) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        dropped = []
        for number in range(2, 14):
            with load_version(store, number):
                publish_version(store, "r", version_of(number))
            dropped += prune_versions(store, "r")
            time.sleep(0.05)
    finally:
        until.set()
        for reader in readers:
            reader.join()
    assert errors == []
    assert len(set(seen)) > 2
    assert max(seen) >= 12
    assert len(dropped) > 6, "old ones went"
    prune_versions(store, "r")
    assert {name.partition("@")[2] for name in store.placement.tables} == {"v12", "v13"}


def test_pinned_version_stays_until_it_is_let_go(store, tmp_path):
    for number in (1, 2, 3, 4):
        with load_version(store, number):
            publish_version(store, "r", version_of(number))
        if number == 1:
            pin = store.pins.of_run("r")
    with MemoryClient(f"file:{tmp_path}") as other:
        assert prune_versions(other, "r") == list(version_of(2).tables), "1 is read; 3 and 4 are kept anyway"
        with pytest.raises(PinnedError, match=r"cannot drop r\.engram\.1@v1.*being read"):
            drop_tables(other, version_of(1).tables)
        assert np.array_equal(store.lookup(pin.tables[0], np.arange(ROWS)), content(1, 1))
        pin.release()
        pin.release()
        assert prune_versions(other, "r") == list(version_of(1).tables)
        assert prune_versions(other, "r") == []


def test_pruning_an_unknown_run_says_so_and_names_those_there_are(store):
    with load_version(store, 1):
        publish_version(store, "r", version_of(1))
    with pytest.raises(UnknownTableError, match=r"no run .R. has sealed tables; known: r$"):
        prune_versions(store, "R")
    assert prune_versions(store, "r") == []


def test_reader_that_dies_lets_go_when_its_lease_is_over(tmp_path, monkeypatch):
    script = (
        "import sys; from engrid.client import MemoryClient, pins; pins.LEASE_SECONDS = 2.0;"
        "client = MemoryClient(sys.argv[1]); pin = client.pins.of_run('r'); print(pin.version, flush=True); input()"
    )
    monkeypatch.setattr(pins_module, "LEASE_SECONDS", 2.0)
    with shard_process(tmp_path) as (_, _), MemoryClient(f"file:{tmp_path}") as client:
        for number in (1, 2):
            with load_version(client, number):
                publish_version(client, "r", version_of(number))
            if number == 1:
                pipe = subprocess.PIPE
                env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
                command = [sys.executable, "-c", script, f"file:{tmp_path}"]
                reader = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
                assert reader.stdout.readline() == "v1\n"
        with load_version(client, 3):
            publish_version(client, "r", version_of(3))
        assert prune_versions(client, "r") == []
        reader.send_signal(signal.SIGKILL)
        reader.communicate()
        until = time.monotonic() + 20
        while not (dropped := prune_versions(client, "r")):
            assert time.monotonic() < until
            time.sleep(0.1)
        assert dropped == list(version_of(1).tables)


def test_each_rollback_goes_further_back_and_not_past_the_first(store):
    for number in (1, 2, 3):
        with load_version(store, number):
            publish_version(store, "r", version_of(number))
    assert rollback_version(store, "r") == version_of(2)
    assert rollback_version(store, "r") == version_of(1), "and not to the one that was taken back first"
    with pytest.raises(UnknownTableError, match=r"no earlier version to go back to; .* \(taken back\)"):
        rollback_version(store, "r")
    publish_version(store, "r", version_of(3))
    assert rollback_version(store, "r") == version_of(1), "2 was taken back"
    assert rollback_version(store, "r", "v3") == version_of(3)
    prune_versions(store, "r")
    assert rollback_version(store, "r") == version_of(1), "what a rollback goes to stays"


def test_rollback_makes_an_earlier_version_current(store):
    for number in (1, 2):
        with load_version(store, number):
            publish_version(store, "r", version_of(number))
    held = store.pins.of_run("r")
    assert number_of(held) == 2
    assert rollback_version(store, "r") == version_of(1)
    assert number_of(store.pins.of_run("r")) == 1
    assert np.array_equal(store.lookup(held.tables[0], np.arange(ROWS)), content(2, 1)), "who reads 2 goes on"
    assert rollback_version(store, "r", "v2") == version_of(2), "and forth again"
    assert rollback_version(store, "r", "v1") == version_of(1)
    with pytest.raises(UnknownTableError, match=r"no earlier version v9; published: v2 .taken back., v1"):
        rollback_version(store, "r", "v9")
    with pytest.raises(UnknownTableError, match="run 'other' has no earlier version"):
        rollback_version(store, "other")


def test_version_that_is_not_whole_is_not_published(store):
    version = version_of(1)
    with pytest.raises(EngridError, match="no tables yet"):
        publish_version(store, "r", version)
    create_tables(store, [table(name, ROWS, optimizer=None) for name in version.tables])
    with pytest.raises(BadRequestError, match=r"version v1 of run r lacks rows of r\.engram\.1@v1"):
        publish_version(store, "r", version)
    with pytest.raises(UnknownTableError, match="no version of run 'r' is published"):
        store.pins.of_run("r")


def test_dropping_a_table_takes_its_version_away(store):
    with load_version(store, 1):
        publish_version(store, "r", version_of(1))
    drop_tables(store, version_of(1).tables[:1])
    assert store.placement.versions == {}


def test_pin_is_for_a_time_and_for_sealed_tables():
    core = ShardCore("s0")
    core.pin("a", ["t@1"], 5.0, now=100.0)
    core.pin("b", ["t@1", "t@2"], 50.0, now=100.0)
    assert core.pinned(104.0) == {"t@1", "t@2"}
    core.pin("b", ["t@1"], 50.0, now=104.0)
    assert core.pinned(104.0) == {"t@1"}, "a pin takes the place of the reader's last"
    core.pin("b", [], 0.0, now=104.0)
    assert core.pinned(104.0) == {"t@1"}
    assert core.pinned(105.0) == frozenset()
    for reader, names, seconds in (("a", ["live"], 1.0), ("", ["t@1"], 1.0), ("a", ["t@1"], -1.0), ("a", ["t@1"], 1e9)):
        with pytest.raises(BadRequestError):
            core.pin(reader, names, seconds, now=0.0)
