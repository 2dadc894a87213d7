"""Lookups through real shards: the rows are the table's, wherever they lie, or the error says what is wrong."""

import os
import signal
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engrid.client import ClientConfig, MemoryClient, RowLookup, pending
from engrid.client.transport import Wanted
from engrid.control.tables import create_tables, drop_tables
from engrid.rpc.errors import (
    BadRequestError,
    DeadlineExceededError,
    OutOfMemoryError,
    RequestTooLargeError,
    RowOutOfRangeError,
    RowWidthMismatchError,
    ShardUnavailableError,
    UnknownTableError,
    WrongEpochError,
)
from engrid.rpc.wire import MAX_TABLES
from engrid.tables import RowTable
from tests.shards import local_shards, shard_process, table


def expected(spec, ids):
    out = np.empty((ids.size, spec.row_bytes), np.uint8)
    RowTable(spec).gather(ids.reshape(-1), out)
    return out.reshape(*ids.shape, spec.row_bytes)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three shards, a table cut in six partitions and one of fp8 rows."""
    folder = tmp_path_factory.mktemp("store")
    specs = [table(), table("fp8", 500, width=256, optimizer=None, row_format="fp8_e4m3_ue8m0")]
    with local_shards(folder, 3), MemoryClient(f"file:{folder}") as client:
        create_tables(client, specs, partitions_per_shard=2)
        yield client, {spec.name: spec for spec in specs}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_are_the_tables_whatever_the_batch(store, data):
    client, specs = store
    lookups, wanted = [], {}
    for name, spec in specs.items():
        positions = data.draw(st.integers(0, 40))
        heads = data.draw(st.integers(1, 3))
        ids = data.draw(st.lists(st.integers(0, spec.rows - 1), min_size=positions * heads, max_size=positions * heads))
        ids = np.array(ids, np.int64).reshape(positions, heads)
        dead = np.array(data.draw(st.lists(st.booleans(), min_size=positions, max_size=positions)), bool)
        rows = expected(spec, ids) if positions else np.empty((0, heads, spec.row_bytes), np.uint8)
        rows[dead] = 0
        ids[dead] = -1
        lookups.append(RowLookup(name, ids))
        wanted[name] = rows
    pending = client.prefetch(lookups)
    for name, rows in wanted.items():
        assert np.array_equal(pending.rows(name), rows)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.lists(st.integers(-3, 3), max_size=50), heads=st.integers(1, 4))
def test_equal_keys_are_fetched_once_and_land_everywhere(store, keys, heads):
    client, specs = store
    keys = np.array(keys, np.int64)
    ids = (keys[:, None] % 7 * 100 + np.arange(heads)) % specs["t"].rows
    before = client.traffic.rows
    rows = client.prefetch([RowLookup("t", ids, keys)]).rows("t")
    assert np.array_equal(rows, expected(specs["t"], ids) if len(keys) else rows)
    assert client.traffic.rows - before == len(set(keys.tolist())) * heads


def test_orders_of_one_table_lie_side_by_side(store):
    client, specs = store
    first, second = np.arange(12).reshape(4, 3), np.arange(500, 508).reshape(4, 2)
    rows = client.prefetch([RowLookup("t", first), RowLookup("t", second)]).rows("t")
    assert np.array_equal(rows, expected(specs["t"], np.hstack([first, second])))


def test_large_batch_is_split_and_comes_back_whole(tmp_path):
    spec = table(rows=20_000, width=64)
    with (
        local_shards(tmp_path, 2),
        MemoryClient(f"file:{tmp_path}", ClientConfig(request_bytes=10_000)) as client,
    ):
        create_tables(client, [spec])
        ids = np.random.default_rng(0).integers(0, spec.rows, (5000, 1))
        assert np.array_equal(client.prefetch([RowLookup("t", ids)]).rows("t"), expected(spec, ids))
        assert client.traffic.requests > 100


def test_request_over_the_shards_limit_is_refused(tmp_path):
    with (
        local_shards(tmp_path, 1, max_reply_bytes=1000),
        MemoryClient(f"file:{tmp_path}") as client,
    ):
        create_tables(client, [table()])
        with pytest.raises(RequestTooLargeError, match="limit of 1000"):
            client.lookup("t", np.arange(100))
        assert len(client.lookup("t", np.arange(10))) == 10, "the stream goes on after an error"


def test_any_shards_address_is_enough_to_start(tmp_path):
    spec = table()
    with local_shards(tmp_path, 2) as shards, MemoryClient(f"file:{tmp_path}") as admin:
        create_tables(admin, [spec])
        for shard in shards:
            with MemoryClient(shard.address) as client:
                assert np.array_equal(client.lookup("t", np.arange(1000)), expected(spec, np.arange(1000)))


def test_tables_made_later_are_found_and_dropped_ones_are_gone(tmp_path):
    with local_shards(tmp_path, 2), MemoryClient(f"file:{tmp_path}") as admin:
        create_tables(admin, [table()])
        with MemoryClient(f"file:{tmp_path}") as client:
            client.lookup("t", np.arange(5))
            create_tables(admin, [table("later", 50)])
            assert len(client.lookup("later", np.arange(50))) == 50
            drop_tables(admin, ["t"])
            with pytest.raises(UnknownTableError, match="'t'"):
                client.lookup("t", np.arange(5))
            with pytest.raises(BadRequestError, match="exists"):
                create_tables(admin, [table("later", 50)])


def test_table_replaced_by_another_spec_is_not_read_with_the_old_ids(tmp_path):
    """Same name, same width: nothing but the epoch tells that the rows mean something else."""
    with (
        local_shards(tmp_path, 2),
        MemoryClient(f"file:{tmp_path}") as admin,
        MemoryClient(f"file:{tmp_path}") as reader,
    ):
        create_tables(admin, [table()])
        reader.lookup("t", np.arange(1000))
        create_tables(admin, [table(rows=2000)], replace=True)
        with pytest.raises(WrongEpochError, match="replaced by one of another spec"):
            reader.lookup("t", np.arange(1000))
        assert len(reader.lookup("t", np.arange(2000))) == 2000, "ids hashed anew are answered"
        create_tables(admin, [table(rows=2000)], replace=True)
        spec = table(rows=2000)
        assert np.array_equal(reader.lookup("t", np.arange(2000)), expected(spec, np.arange(2000)))


def test_batch_that_failed_fails_for_each_of_its_tables(tmp_path):
    with shard_process(tmp_path) as (process, address), MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [table("a"), table("b")])
        process.kill()
        process.wait()
        pending = client.prefetch([RowLookup(name, np.arange(5)[:, None]) for name in "ab"], timeout=2)
        for name in "abab":
            with pytest.raises(ShardUnavailableError, match=f"s0 at {address}"):
                pending.rows(name)


@pytest.mark.parametrize("bad", [-2, 1000, 2**62])
def test_row_id_out_of_range(store, bad):
    with pytest.raises(RowOutOfRangeError, match="table t"):
        store[0].lookup("t", np.array([1, bad, 2]))


def test_partly_dead_position_is_refused(store):
    with pytest.raises(RowOutOfRangeError, match="dead position"):
        store[0].prefetch([RowLookup("t", np.array([[-1, 5]]))])


def test_unknown_table_names_the_known(store):
    with pytest.raises(UnknownTableError, match="known: t, fp8"):
        store[0].lookup("u", np.arange(3))


@pytest.mark.parametrize(
    "ids",
    [np.arange(3, dtype=np.int32), np.arange(3.0), [1, 2], np.arange(6).reshape(1, 2, 3), np.empty((3, 0), np.int64)],
)
def test_ids_of_a_wrong_kind_or_shape(store, ids):
    with pytest.raises(BadRequestError, match="table t"):
        store[0].prefetch([RowLookup("t", ids)])


def test_keys_of_a_wrong_length(store):
    with pytest.raises(BadRequestError, match="keys"):
        store[0].prefetch([RowLookup("t", np.zeros((3, 1), np.int64), np.zeros(2, np.int64))])


def test_empty_batch_is_answered(store):
    assert store[0].lookup("t", np.empty(0, np.int64)).shape == (0, 32)
    assert store[0].prefetch([]) is not None


def test_row_width_expected_is_checked_by_the_shard(store):
    client, _ = store
    transport = client.connections.transport("s0")
    call = transport.lookup(
        [("t", np.arange(3), 999)], Wanted(0, "", time.monotonic() + 5), epoch=1, deliver=lambda rows: None
    )
    with pytest.raises(RowWidthMismatchError, match="32 bytes"):
        call.wait()


def test_too_little_memory_is_said_before_anything_is_allocated(tmp_path):
    with local_shards(tmp_path, 2, memory_bytes=1 << 20) as shards, MemoryClient(f"file:{tmp_path}") as client:
        with pytest.raises(OutOfMemoryError, match=r"limit of 1.00 MiB"):
            create_tables(client, [table(rows=1_000_000)])
        with MemoryClient(shards[0].address) as other, pytest.raises(UnknownTableError):
            _ = other.placement
        create_tables(client, [table()])
        assert len(client.lookup("t", np.arange(10))) == 10


def test_dead_shard_is_named_by_the_deadline(tmp_path):
    with (
        shard_process(tmp_path, "s0"),
        shard_process(tmp_path, "s1") as (dying, address),
        MemoryClient(f"file:{tmp_path}", ClientConfig(timeout=2.0)) as client,
    ):
        create_tables(client, [table()])
        assert len(client.lookup("t", np.arange(1000))) == 1000
        dying.kill()
        dying.wait()
        started = time.monotonic()
        with pytest.raises(ShardUnavailableError, match=f"s1 at {address}"):
            client.lookup("t", np.arange(1000))
        assert time.monotonic() - started < 4
        alive = client.placement.partitions["t"]
        mine = next(part for part in alive if part.primary == "s0")
        assert len(client.lookup("t", np.arange(mine.start, mine.stop))) == len(mine)


def test_silent_shard_is_named_by_the_deadline_and_serves_again_after(tmp_path):
    with shard_process(tmp_path) as (process, _), MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [table()])
        client.lookup("t", np.arange(3))
        os.kill(process.pid, signal.SIGSTOP)
        try:
            # By the client, or by the shard where the signal came after the request.
            with pytest.raises(DeadlineExceededError, match="shard s0"):
                client.lookup("t", np.arange(3), timeout=0.3)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        assert len(client.lookup("t", np.arange(3))) == 3


def test_restarted_shard_is_reconnected_and_serves_what_it_served(tmp_path):
    state = ["--state", str(tmp_path / "state")]
    with MemoryClient(f"file:{tmp_path}") as client:
        with shard_process(tmp_path, "s0", *state) as (_, address):
            create_tables(client, [table()])
            before = client.lookup("t", np.arange(3))
        with shard_process(tmp_path, "s0", *state, "--listen", address):
            until = time.monotonic() + 10
            while True:
                try:
                    after = client.lookup("t", np.arange(3), timeout=1)
                    break
                except ShardUnavailableError:
                    assert time.monotonic() < until, "the client did not reconnect"
            assert np.array_equal(after, before)


def test_placement_outlives_the_directory(tmp_path):
    spec = table()
    with local_shards(tmp_path, 2), MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [spec])
        (tmp_path / "directory.json").unlink()
        assert len(client.lookup("t", np.arange(1000))) == 1000
        client.connections.refresh()
        assert len(client.lookup("t", np.arange(1000))) == 1000


def test_a_lookup_of_more_tables_than_a_request_may_name_is_sent_in_several(monkeypatch, tmp_path):
    """The shard ended the stream of such a one, and with it what other threads had under way."""
    assert pending.MAX_TABLES == MAX_TABLES
    monkeypatch.setattr(pending, "MAX_TABLES", 3)
    specs = [table(f"t{number}", 10 + number) for number in range(8)]
    with local_shards(tmp_path, 1), MemoryClient(tmp_path) as client:
        create_tables(client, specs)
        asked = client.prefetch([RowLookup(spec.name, [[spec.rows - 1]]) for spec in specs])
        assert client.traffic.requests == 3
        for spec in specs:
            assert np.array_equal(asked.rows(spec.name)[:, 0], client.lookup(spec.name, [spec.rows - 1]))


@pytest.mark.parametrize("run", ["r" * 513, "\ud800", 5])
def test_the_name_of_a_run_is_looked_at_before_it_is_sent(run, tmp_path):
    with local_shards(tmp_path, 1), MemoryClient(tmp_path) as client:
        create_tables(client, [table()])
        with pytest.raises(BadRequestError, match="run"):
            client.prefetch([RowLookup("t", [[1]])], run=run)
        assert client.traffic.requests == 0
