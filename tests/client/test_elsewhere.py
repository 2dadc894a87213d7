"""Shards that come back at another address, directories that hang: found by the next call, and in its time."""

import os
import signal
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from engrid.client import ClientConfig, MemoryClient, RowLookup, TrainingRun
from engrid.client.pins import Pins
from engrid.control.checkpoints import CheckpointSave
from engrid.control.tables import create_tables, drop_tables
from engrid.directory import Version
from engrid.rpc.errors import BadRequestError, EngridError, ShardUnavailableError, UnavailableError, UnknownTableError
from engrid.shard.config import ShardConfig
from engrid.shard.grpc.server import ShardServer
from engrid.tables import OptimizerSpec, TableSpec
from tests.mortal import MortalShard, free_port
from tests.redis_server import running_redis
from tests.shards import load_initial, local_shards, shard_process, table


@contextmanager
def closing_shard(directory):
    server = ShardServer(ShardConfig(name="s0", directory=directory))
    try:
        yield
    finally:
        server.stop(0)


SPEC = table(rows=100, init_std=0.0)
PART = {"t": (np.arange(3), np.ones((3, 8), np.float32))}


def values(client, step=0):
    return client.lookup("t", np.arange(3), step=step, dtype=np.float32)


def test_a_shard_back_at_another_address_is_found_by_the_next_call(tmp_path):
    """Of a reader, a trainer and a new client, though nobody has told the placement."""
    state = ["--state", str(tmp_path / "state")]
    with MemoryClient(f"file:{tmp_path}") as reader, MemoryClient(f"file:{tmp_path}") as trainer:
        with shard_process(tmp_path, "s0", *state) as (_, first):
            create_tables(reader, [SPEC])
            run = TrainingRun(trainer, run="r", tables=["t"])
            run.push(PART, step=1, learning_rate=1.0)
            assert (values(reader, 1) == -1).all()
            epoch = reader.connections.epoch
        with shard_process(tmp_path, "s0", *state) as (_, second):
            assert first != second
            assert (values(reader) == -1).all()
            run.push(PART, step=2, learning_rate=1.0)
            assert (values(reader, 2) == -2).all()
            with MemoryClient(f"file:{tmp_path}") as fresh:
                assert (values(fresh) == -2).all()
            assert reader.connections.epoch == epoch
            with MemoryClient(second) as by_address:
                assert by_address.connections.epoch == epoch


def test_a_push_waits_for_a_shard_that_comes_back_elsewhere(tmp_path):
    with MortalShard(tmp_path) as shard, MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [SPEC])
        run = TrainingRun(client, run="r", tables=["t"])
        shard.kill()
        pushing = threading.Thread(target=lambda: run.push(PART, step=1, learning_rate=1.0))
        pushing.start()
        shard._options[1] = f"127.0.0.1:{free_port()}"
        shard.start()
        pushing.join(30)
        assert run.step == 1
        assert (values(client, 1) == -1).all()


def test_another_shard_at_the_address_of_the_first_is_not_taken_for_it(tmp_path):
    """s0 and s1 come back with their addresses exchanged."""
    shards = [MortalShard(tmp_path, name) for name in ("s0", "s1")]
    with MemoryClient(f"file:{tmp_path}") as client:
        for shard in shards:
            shard.start()
        create_tables(client, [SPEC])
        run = TrainingRun(client, run="r", tables=["t"])
        run.push({"t": (np.arange(100), np.ones((100, 8), np.float32))}, step=1, learning_rate=1.0)
        for shard in shards:
            shard.kill()
        ports = [shard._options[1] for shard in shards]
        for shard, port in zip(shards, reversed(ports), strict=True):
            shard._options[1] = port
            shard.start()
        try:
            assert (client.lookup("t", np.arange(100), step=1, dtype=np.float32) == -1).all()
            run.push(PART, step=2, learning_rate=1.0)
            assert (values(client, 2) == -2).all()
        finally:
            for shard in shards:
                shard.kill()


def test_a_shard_that_is_gone_is_an_error_by_the_deadline(tmp_path):
    with MemoryClient(f"file:{tmp_path}") as client:
        with shard_process(tmp_path, "s0") as (_, address):
            create_tables(client, [SPEC])
        with pytest.raises(ShardUnavailableError, match=f"s0 at {address}"):
            values(client)


@pytest.mark.parametrize("state", ["running", "hangs"])
def test_a_lookup_keeps_its_time_whatever_the_directory_does(tmp_path, state):
    """Of a table made anew, of one unknown, and of a sealed one that is to be mapped first."""
    with (
        running_redis(tmp_path) as redis,
        closing_shard(redis.url),
        MemoryClient(redis.url) as admin,
        MemoryClient(redis.url) as client,
    ):
        create_tables(admin, [SPEC])
        assert len(values(client)) == 3
        create_tables(admin, [SPEC], replace=True)
        load_initial(admin, table("s@1", rows=50, optimizer=None))
        if state == "hangs":
            os.kill(redis._process.pid, signal.SIGSTOP)
        try:
            told = {name: what_came(client, name) for name in ("t", "nobody", "s@1")}
        finally:
            os.kill(redis._process.pid, signal.SIGCONT)
        # Redis' own time is 5 s.
        assert max(seconds for _, seconds in told.values()) < 3
        assert told["t"][0] == 3
        if state == "hangs":  # it may be there: the directory has not said
            assert isinstance(told["nobody"][0], UnavailableError)
        else:
            assert isinstance(told["nobody"][0], UnknownTableError)
            assert told["s@1"][0] == 3
        assert len(client.lookup("s@1", [1, 2])) == 2


def what_came(client, name):
    """The number of rows, or the error; and after how many seconds."""
    started, came = time.monotonic(), None
    try:
        came = len(client.lookup(name, np.arange(3), timeout=0.6))
    except EngridError as error:
        came = error
    return came, time.monotonic() - started


def test_mapping_a_table_takes_no_more_than_a_lookups_time(tmp_path):
    spec = table("s@1", optimizer=None)
    with shard_process(tmp_path) as (process, _), MemoryClient(f"file:{tmp_path}") as admin:
        load_initial(admin, spec)
        with MemoryClient(f"file:{tmp_path}", ClientConfig(timeout=60)) as client:
            os.kill(process.pid, signal.SIGSTOP)
            try:
                started = time.monotonic()
                with pytest.raises(UnavailableError):
                    client.prefetch([RowLookup("s@1", [[1]])], timeout=0.5).rows("s@1")
                assert time.monotonic() - started < 5
            finally:
                os.kill(process.pid, signal.SIGCONT)


def test_tables_that_are_there_are_kept_with_their_rows_or_refused_by_what_differs(tmp_path):
    with local_shards(tmp_path, 2), MemoryClient(f"file:{tmp_path}") as client:
        first = create_tables(client, [SPEC], exist_ok=True)
        TrainingRun(client, run="r", tables=["t"]).push(PART, step=1, learning_rate=1.0)
        assert create_tables(client, [SPEC], exist_ok=True) == first
        both = create_tables(client, [SPEC, table("u")], exist_ok=True)
        assert list(both.tables) == ["t", "u"]
        assert (values(client, 1) == -1).all(), "what was trained is there"
        other = table(rows=200, optimizer="adam", init_std=0.0)
        with pytest.raises(BadRequestError, match=r"table t exists with rows 100, not 200; optimizer .*'sgd'.*'adam'"):
            create_tables(client, [table("v"), other], exist_ok=True)
        assert "v" not in client.placement.tables
        with pytest.raises(BadRequestError, match="give one of the two"):
            create_tables(client, [SPEC], exist_ok=True, replace=True)
        with pytest.raises(BadRequestError, match="exists; keep it"):
            create_tables(client, [SPEC])
        with pytest.raises(BadRequestError, match="table w is given twice"):
            create_tables(client, [table("w"), table("w")])


@pytest.mark.parametrize("tables", [[], "t", ["t", "t"]])
def test_a_checkpoint_is_of_tables_that_are_named_once(tmp_path, tables):
    with local_shards(tmp_path, 1), MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [SPEC])
        with pytest.raises(BadRequestError, match="tables"):
            CheckpointSave(client, tmp_path / "saved", run="r", attempt=1, step=0, tables=tables)
        assert not (tmp_path / "saved").exists()
        with pytest.raises(BadRequestError, match="a list of names"):
            drop_tables(client, "t")
        assert "t" in client.placement.tables


def test_a_table_needs_a_name_rows_and_a_width():
    spec = TableSpec(name="t", rows=10, width=4)
    assert (spec.row_format, spec.seed, spec.layer, spec.optimizer, spec.buckets) == ("float32", 0, 0, None, ())
    assert 0 < spec.init_std < 1
    assert TableSpec.from_json(spec.to_json()) == spec
    with pytest.raises(TypeError):
        TableSpec(name="t", optimizer=OptimizerSpec(kind="sgd"))


def test_pins_are_renewed_whatever_one_renewal_meets(tmp_path, monkeypatch):
    monkeypatch.setattr("engrid.client.pins.RENEW_SECONDS", 0.01)
    with local_shards(tmp_path, 1), MemoryClient(f"file:{tmp_path}") as client:
        load_initial(client, table("s@1", optimizer=None))
        real, renewed = Pins._renew, threading.Event()

        def fail(self):
            raise ZeroDivisionError("nobody thought of it")

        pin = client.pins.of_tables(Version("1", ("s@1",)))
        monkeypatch.setattr(Pins, "_renew", fail)
        until = time.monotonic() + 10
        while not isinstance(client.pins.trouble, ZeroDivisionError):
            assert time.monotonic() < until

        def renew(self):
            real(self)
            renewed.set()

        monkeypatch.setattr(Pins, "_renew", renew)
        assert renewed.wait(10), "its thread goes on"
        until = time.monotonic() + 10
        while client.pins.trouble is not None:
            assert time.monotonic() < until
        pin.release()


def test_tables_of_a_shard_that_left_are_named_with_what_to_do_and_can_be_given_up(tmp_path):
    """A shard without --state that was stopped and started again has another name, and none of its rows."""
    with closing_shard(f"file:{tmp_path}"), MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [SPEC, table("other")])
        client.lookup("t", np.arange(3))
    server = ShardServer(ShardConfig(name="s1", directory=f"file:{tmp_path}"))
    try:
        with MemoryClient(f"file:{tmp_path}") as client:
            for make in ({"exist_ok": True}, {}):
                with pytest.raises(ShardUnavailableError, match=r"has rows on s0, .*--state folder.* replace=True"):
                    create_tables(client, [SPEC], **make)
            drop_tables(client, ["other", "t"])
            create_tables(client, [SPEC])
            assert (values(client) == 0).all()
    finally:
        server.stop(0)


def test_a_table_of_a_shard_that_left_is_replaced(tmp_path):
    with closing_shard(f"file:{tmp_path}"), MemoryClient(f"file:{tmp_path}") as client:
        create_tables(client, [SPEC])
    server = ShardServer(ShardConfig(name="s1", directory=f"file:{tmp_path}"))
    try:
        with MemoryClient(f"file:{tmp_path}") as client:
            create_tables(client, [SPEC], replace=True)
            assert (values(client) == 0).all()
    finally:
        server.stop(0)


def test_a_client_opened_by_a_shards_address_says_what_to_call_once_that_shard_has_moved(tmp_path):
    state = ["--state", str(tmp_path / "state")]
    said = (
        "this client, opened by a shard's address, cannot look it up: open it by the run directory or the redis:// URL$"
    )
    with shard_process(tmp_path, "s0", *state) as (_, address), MemoryClient(tmp_path) as admin:
        create_tables(admin, [SPEC])
        client = MemoryClient(address, ClientConfig(timeout=5.0, push_timeout=0.2))
        run = TrainingRun(client, run="r", tables=["t"])
        values(client)
    with client, shard_process(tmp_path, "s0", *state):
        for call in (lambda: values(client), lambda: run.push(PART, step=1, learning_rate=1.0)):
            with pytest.raises(ShardUnavailableError, match=said):
                call()
        with pytest.raises(ShardUnavailableError, match=said):
            client.connections.describe("s0")
