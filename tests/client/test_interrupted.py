"""Ctrl-C and other exceptions anywhere in a lookup: nothing stays taken, and the client goes on."""

import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from engrid.client import ClientConfig, MemoryClient, RowLookup, TrainingRun
from engrid.client.cache.cached import CachedBatch
from engrid.client.transport import GrpcTransport, Wanted
from engrid.control.tables import create_tables, export_partition, load_partition
from engrid.rpc.errors import (
    CancelledError,
    DeadlineExceededError,
    EngridError,
    ShardUnavailableError,
    StepNotReachedError,
)
from tests.shards import load_initial, local_shards, table
from tests.waiting import until

MOST = 4
SPEC, SEALED = table(), table("s@1", optimizer=None)
IDS = np.arange(1000)[:, None]


class Interrupt(BaseException):
    """As KeyboardInterrupt, which pytest would take for its own."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    with local_shards(folder, 2), MemoryClient(f"file:{folder}") as admin:
        create_tables(admin, [SPEC])
        load_initial(admin, SEALED)
        yield folder


@pytest.fixture(scope="module", params=[0, 1 << 20], ids=["wire", "cached"])
def client(request, folder):
    config = ClientConfig(max_in_flight=MOST, request_bytes=4000, shared_memory=False, cache_bytes=request.param)
    with MemoryClient(f"file:{folder}", config) as client:
        yield client


@contextmanager
def interrupted_after(seconds):
    """A signal in the main thread after so long, wherever it is then."""

    def interrupt(*_):
        raise Interrupt

    # Not an alarm: pytest has the only timer there is.
    before, over = signal.signal(signal.SIGUSR1, interrupt), threading.Event()
    main = threading.get_ident()

    def press():
        if not over.wait(seconds):
            signal.pthread_kill(main, signal.SIGUSR1)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        yield
    finally:
        try:
            over.set()
            thread.join()
        finally:
            signal.signal(signal.SIGUSR1, before)


def in_flight(client):
    transports = [client.connections.transport(shard) for shard in client.placement.shards]
    return sum(len(stream._calls) for each in transports for stream in each._streams.values())


def wait_for_none_in_flight(client):
    """What was dropped unread is given up when the next request is sent."""
    until = time.monotonic() + 10
    while client.lookup("t", np.arange(1000)) is None or in_flight(client):
        assert time.monotonic() < until, "slots stay taken"
        time.sleep(0.01)


def test_an_interrupt_anywhere_in_a_lookup_leaves_the_client_whole(client):
    """At 300 moments spread over a lookup's time, so inside all that it does."""
    started = time.monotonic()
    expected = {name: bytes(client.lookup(name, np.arange(1000))) for name in ("t", "s@1")}
    whole = max(0.003, time.monotonic() - started)
    interrupted = 0
    keys = np.arange(1000)
    for moment in range(300):
        name = ("t", "s@1")[moment % 2]
        pending = rows = None
        try:
            with interrupted_after(whole * (moment + 1) / 300):
                pending = client.prefetch([RowLookup(name, IDS, keys + moment * 1000)], timeout=20)
                rows = pending.rows(name)
        except Interrupt:
            interrupted += 1
        if rows is None and pending is not None:
            try:
                rows = pending.rows(name)
            except CancelledError:
                """Cleanly cancelled: it was interrupted when the rows were all but handed out."""
        assert rows is None or bytes(rows) == expected[name]
    assert interrupted > 5
    wait_for_none_in_flight(client)
    for name, rows in expected.items():
        assert bytes(client.lookup(name, np.arange(1000))) == rows


def test_rows_asked_for_again_after_an_interrupt_come(client):
    create_tables(client, [table("slow")], exist_ok=True)
    run = TrainingRun(client, run="slow", tables=["slow"])
    pending = client.prefetch([RowLookup("slow", IDS)], step=run.step + 1, timeout=30)
    for _ in range(5):
        with pytest.raises(Interrupt), interrupted_after(0.02):
            pending.rows("slow")
    run.push({}, step=run.step + 1, learning_rate=1.0)
    assert len(pending.rows("slow")) == 1000


def test_waiting_for_room_can_be_interrupted_and_gives_nothing_away(client):
    create_tables(client, [table("slow")], exist_ok=True)
    run = TrainingRun(client, run="r", tables=["t"])
    for _ in range(3):
        with pytest.raises(Interrupt), interrupted_after(0.03):
            # More requests than may be in flight, and none is answered before its time is over.
            client.prefetch([RowLookup("t", IDS), RowLookup("slow", IDS)], step=run.step + 1, timeout=30)
        wait_for_none_in_flight(client)
    assert len(client.lookup("t", np.arange(1000))) == 1000


def test_a_request_that_cannot_be_made_gives_its_place_back(folder):
    with local_shards(folder / "raw", 1) as (shard,):
        transport = GrpcTransport("s0", shard.address, max_in_flight=2)
        for _ in range(5):
            with pytest.raises(OverflowError):
                transport.lookup(
                    [("t", np.arange(3), 32)], Wanted(0, "", float("inf")), epoch=1, deliver=lambda rows: None
                )
        call = transport.lookup(
            [("t", np.arange(3), 32)], Wanted(0, "", time.monotonic() + 5), epoch=1, deliver=lambda rows: None
        )
        with pytest.raises(EngridError, match="no table"):
            call.wait()
        transport.close()


def test_admission_cut_off_leaves_no_key_with_anothers_rows(folder, monkeypatch):
    config = ClientConfig(shared_memory=False, cache_bytes=1 << 20)
    with MemoryClient(f"file:{folder}", config) as client:
        keys = np.arange(1000)
        expected = bytes(client.prefetch([RowLookup("s@1", IDS, keys)]).rows("s@1"))
        pending = client.prefetch([RowLookup("s@1", IDS, keys + 5000)])
        cache = next(iter(client.caches._by_width.values()))
        real = cache._engine.admit

        def admit(*arguments):
            real(*arguments)
            raise Interrupt

        monkeypatch.setattr(cache._engine, "admit", admit)
        with pytest.raises(Interrupt):
            pending.rows("s@1")
        monkeypatch.undo()
        for shift in (5000, 0):
            assert bytes(client.prefetch([RowLookup("s@1", IDS, keys + shift)]).rows("s@1")) == expected


def test_rows_that_were_kept_no_longer_are_said_so(folder):
    with MemoryClient(f"file:{folder}", ClientConfig(shared_memory=False)) as client:
        pending = client.prefetch([RowLookup("s@1", IDS, np.arange(1000))])
        assert isinstance(pending._batches["s@1"], CachedBatch)
        pending.rows("s@1")
        with pytest.raises(CancelledError, match=r"table s@1 were placed before"):
            pending.rows("s@1")


def test_a_call_nobody_answers_ends_by_its_deadline_however_often_it_is_interrupted(client):
    run = TrainingRun(client, run="r", tables=["t"])
    pending = client.prefetch([RowLookup("t", IDS[:3])], step=run.step + 1, timeout=0.3)
    until, ended = time.monotonic() + 10, None
    while ended is None:
        assert time.monotonic() < until
        try:
            with interrupted_after(0.01):
                pending.rows("t")
        except Interrupt:
            continue
        except (DeadlineExceededError, StepNotReachedError) as error:
            ended = error
    wait_for_none_in_flight(client)


def test_a_push_cut_off_is_cancelled_and_can_be_made_again(folder):
    with MemoryClient(f"file:{folder}") as client:
        create_tables(client, [table("cut", init_std=0.0)], exist_ok=True)
        run = TrainingRun(client, run="cut", tables=["cut"])
        part = {"cut": (np.arange(1000), np.ones((1000, 8), np.float32))}
        steps = interrupted = 0
        for moment in range(60):
            step = run.step + 1
            try:
                with interrupted_after(0.0002 * (moment + 1)):
                    run.push(part, step=step, learning_rate=1.0)
            except Interrupt:
                interrupted += 1
            if run.step < step:
                run.push(part, step=step, learning_rate=1.0)
            steps += 1
        assert interrupted
        assert (client.lookup("cut", np.arange(1000), step=steps, dtype=np.float32) == -steps).all()


def test_a_client_that_is_closed_ends_the_pushes_under_way(folder):
    """Cancelling what pushes must not take `push_timeout`."""
    with MemoryClient(f"file:{folder}") as client:
        create_tables(client, [table("ended")], exist_ok=True)
        run = TrainingRun(client, run="ended", tables=["ended"])
        client.connections._addresses = dict.fromkeys(client.placement.shards, "127.0.0.1:1")
        client.connections.directory.shards = dict  # it knows of no other address
        ended = []

        def push():
            try:
                run.push({}, step=1, learning_rate=1.0)
            except CancelledError as error:
                ended.append(error)

        pushing = threading.Thread(target=push)
        pushing.start()
        client.close()
        pushing.join(10)
        assert len(ended) == 1


CTRL_C = """
import signal, sys, time
import numpy as np
from engrid.client import MemoryClient, RowLookup
with MemoryClient(sys.argv[1]) as client:
    ids = np.arange(1000)[:, None]
    expected = client.prefetch([RowLookup("t", ids)]).rows("t")
    interrupted = 0
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005)
                pending = client.prefetch([RowLookup("t", ids)])
                rows = pending.rows("t")
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupted += 1
    assert (client.prefetch([RowLookup("t", ids)]).rows("t") == expected).all()
    print("interrupted", interrupted > 50)
"""


def test_a_program_goes_on_after_many_a_ctrl_c(folder):
    code = "import signal; signal.signal(signal.SIGALRM, signal.default_int_handler)\n" + CTRL_C
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("interrupted True\n", "")


def reopened(client):
    with MemoryClient(client.connections.directory.folder) as other:
        other.lookup("u", [1])


OTHER_CALLS = {
    "a table made": lambda client: create_tables(client, [table("x", 100 + client.placement.epoch)], replace=True),
    "rows loaded": lambda client: load_partition(client, "u", 0, [bytes(16_000), bytes(16_000)], step=1),
    "rows exported": lambda client: list(export_partition(client, "u", 0)),
    "a run begun": lambda client: TrainingRun(client, run="r", tables=["u"]),
    "the placement read": lambda client: client.connections.refresh(),
    "a shard asked": lambda client: client.connections.describe("s0"),
    "a client opened and closed": reopened,
}


def done(work):
    """Whether it could be done: not while a load that was cut off is ending still."""
    try:
        work()
    except ShardUnavailableError:
        return False
    return True


@pytest.mark.parametrize("call", OTHER_CALLS.values(), ids=OTHER_CALLS.keys())
def test_a_call_of_any_kind_cut_off_leaves_the_client_and_the_shards_as_they_were(tmp_path, call):
    """Ctrl-C inside gRPC left its locks held, and the next call, or closing, hung for ever."""
    with local_shards(tmp_path, 1) as (shard,), MemoryClient(tmp_path) as client:
        create_tables(client, [table("u")])
        call(client)
        began = time.monotonic()
        call(client)
        took, cut = time.monotonic() - began, 0
        for place in np.random.default_rng(5).uniform(0, 1.2 * took, 25):
            try:
                with interrupted_after(place):
                    call(client)
            except Interrupt:
                cut += 1
            except ShardUnavailableError:
                assert call is OTHER_CALLS["rows loaded"], "the load that was cut off is ending still"
            if call is OTHER_CALLS["rows loaded"]:
                until(lambda: done(lambda: client.lookup("u", [1], timeout=60)))
            else:
                assert client.lookup("u", [1], timeout=60).any()
            client.connections.refresh()
            assert shard._service.journal.core.epoch == client.connections.directory.placement().epoch
        assert cut
        until(lambda: done(lambda: call(client)))
