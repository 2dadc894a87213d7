"""Sealed tables: the same rows by every way, never before they are whole, and never changed by anybody."""

import contextlib
import fcntl
import json
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engrid.client import ClientConfig, MemoryClient, RowLookup, TrainingRun
from engrid.client.shared import CannotMapError, SharedTable
from engrid.control.tables import create_tables, drop_tables, export_partition, load_partition
from engrid.directory import Partition
from engrid.host.mapping import HUGE_PAGE
from engrid.rpc.errors import (
    BadRequestError,
    ReadOnlyTableError,
    RowOutOfRangeError,
    RowWidthMismatchError,
    ShardUnavailableError,
)
from engrid.shard.rows.sealed import SealedRows
from engrid.tables import RowTable
from engrid.v1 import memory_pb2 as pb
from tests.memory_maps import huge_bytes, mappings, needs_collapse
from tests.shards import load_initial, local_shards, shard_process, table

WAYS = {
    "wire": ClientConfig(shared_memory=False, cache_bytes=0),
    "cached": ClientConfig(shared_memory=False, cache_bytes=1 << 20),
    "tiny cache": ClientConfig(shared_memory=False, cache_bytes=20_000),
    "mapped": ClientConfig(cache_bytes=0),
}


def spec_of(name="t@1", rows=1000, **more):
    return table(name, rows, optimizer=None, **more)


def expected(spec, ids):
    out = np.zeros((ids.size, spec.row_bytes), np.uint8)
    alive = ids.reshape(-1) >= 0
    out[alive] = RowTable(spec).raw(0, spec.rows)[ids.reshape(-1)[alive]]
    return out.reshape(*ids.shape, spec.row_bytes)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three shards with sealed tables of several row widths, cut in six partitions."""
    folder = tmp_path_factory.mktemp("store")
    specs = [spec_of(), spec_of("odd@1", 777, width=5), spec_of("fp8@x", 500, width=256, row_format="fp8_e4m3_ue8m0")]
    with local_shards(folder, 3), MemoryClient(f"file:{folder}") as client:
        for spec in specs:
            load_initial(client, spec)
        yield client, {spec.name: spec for spec in specs}


@pytest.fixture(scope="module", params=WAYS.values(), ids=WAYS.keys())
def reader(request, store):
    client, specs = store
    with MemoryClient(client.placement.shards["s0"], request.param) as reader:
        yield reader, specs


def hashed(spec, keys, heads, order):
    """Row ids that keys stand for: any function of key, head and order."""
    return (keys[:, None] * np.array([7, 11, 13])[:heads] + order) % spec.rows


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rows_are_the_tables_whatever_the_batch(reader, data):
    client, specs = reader
    lookups, wanted = [], {}
    heads = data.draw(st.integers(1, 3))
    for name, spec in specs.items():
        positions = data.draw(st.integers(0, 40))
        pieces = []
        for order in range(2, 2 + data.draw(st.integers(1, 2))):
            keys = np.array(data.draw(st.lists(st.integers(0, 60), min_size=positions, max_size=positions)), np.int64)
            ids = hashed(spec, keys, heads, order)
            ids[keys % 10 == 9] = -1
            lookups.append(RowLookup(name, ids, keys, order))
            pieces.append(expected(spec, ids))
        wanted[name] = np.concatenate(pieces, axis=1)
    pending = client.prefetch(lookups)
    for name, rows in wanted.items():
        assert np.array_equal(pending.rows(name), rows)


def test_each_way_is_the_one_taken(reader):
    client, specs = reader
    spec, keys = specs["t@1"], np.arange(50)
    ids = hashed(spec, keys, 2, 2)
    for _ in range(2):
        before = replace(client.traffic)
        client.prefetch([RowLookup("t@1", ids, keys, 2)]).rows("t@1")
    fetched, here = client.traffic.rows - before.rows, client.traffic.here - before.here
    config = client.config
    if config.shared_memory:
        assert (fetched, here) == (0, ids.size)
        assert client.shared.reason("t@1") == ""
    elif not config.cache_bytes:
        assert (fetched, here) == (ids.size, 0)
    else:
        assert fetched + here == ids.size
        assert here > 0
        counts = client.caches.counts("t@1")[2]
        assert counts.hits >= here // 2


@pytest.mark.parametrize("bad", [1000, 2**40, -2])
def test_id_outside_the_table_is_an_error(reader, bad):
    client, _ = reader
    with pytest.raises(RowOutOfRangeError, match=str(bad) if bad > 0 else "negative row id"):
        client.prefetch([RowLookup("t@1", np.array([[1, bad]]), np.array([bad]), 5)])


def test_step_and_run_are_not_asked_of_a_sealed_table(reader):
    client, _ = reader
    for wanted in ({"step": 1}, {"run": "r"}):
        with pytest.raises(BadRequestError, match="t@1 is sealed"):
            client.prefetch([RowLookup("t@1", np.array([[1]]))], **wanted)


def test_pushes_and_runs_are_refused(store):
    client, _ = store
    with pytest.raises(ReadOnlyTableError, match="t@1"):
        TrainingRun(client, run="r", attempt=1, worker=0, workers=1, tables=["t@1"])


def test_other_rows_are_refused_and_the_same_are_taken(store):
    client, specs = store
    spec = specs["t@1"]
    part = client.placement.partitions["t@1"][0]
    held = b"".join(rows for _, rows in export_partition(client, "t@1", 0))
    assert load_partition(client, "t@1", 0, [held], step=1) == len(part)
    other = bytes([held[0] ^ 1]) + held[1:]
    with pytest.raises(BadRequestError, match="holds other rows"):
        load_partition(client, "t@1", 0, [other], step=1)
    with pytest.raises(RowWidthMismatchError, match="more than"):
        load_partition(client, "t@1", 0, [held, b"x"], step=1)
    assert np.array_equal(client.lookup("t@1", np.arange(spec.rows)), RowTable(spec).raw(0, spec.rows))


def test_nothing_is_served_before_all_rows_have_come(tmp_path):
    with local_shards(tmp_path, 1), MemoryClient(f"file:{tmp_path}") as client:
        spec = spec_of()
        create_tables(client, [spec])
        rows = RowTable(spec).raw(0, spec.rows).tobytes()
        for sent in ([], [rows[:-1]]):
            with pytest.raises(RowWidthMismatchError, match="bytes came"):
                load_partition(client, "t@1", 0, sent, step=1)
            with pytest.raises(ShardUnavailableError, match="does not have all rows of sealed table t@1"):
                client.lookup("t@1", np.array([0]))
        assert "does not have all rows" in client.shared.reason("t@1")
        load_partition(client, "t@1", 0, [rows[:1001], rows[1001:]], step=1)
        assert np.array_equal(client.lookup("t@1", np.array([999])), expected(spec, np.array([999])))


def test_sealed_table_takes_no_optimizer_and_needs_a_version():
    with pytest.raises(ValueError, match="sealed, so it takes no optimizer"):
        table("t@1")
    for name in ("t@", "@1", "t@a@b", "t@/x"):
        with pytest.raises(ValueError, match="sealed table '@' and its version"):
            spec_of(name)


def test_cache_smaller_than_a_set_is_refused_naming_the_least(store):
    client, _ = store
    config = ClientConfig(shared_memory=False, cache_bytes=100)
    with (
        MemoryClient(client.placement.shards["s0"], config) as reader,
        pytest.raises(ValueError, match=r"100 bytes is smaller than one set .* give at least"),
    ):
        reader.prefetch([RowLookup("t@1", np.array([[1]]), np.array([1]), 2)])


# -- the descriptor


@pytest.fixture
def sealed():
    spec = spec_of()
    rows = SealedRows(spec, 0, spec.rows)
    rows.write(0, RowTable(spec).raw(0, spec.rows).tobytes())
    rows.seal()
    return rows


ATTEMPTS = {
    "truncate": lambda descriptor, size: os.ftruncate(descriptor, size // 2),
    "grow": lambda descriptor, size: os.ftruncate(descriptor, 2 * size),
    "write": lambda descriptor, _: os.write(descriptor, b"x"),
    "map for writing": lambda descriptor, size: mmap.mmap(descriptor, size, prot=mmap.PROT_READ | mmap.PROT_WRITE),
    "seal further": lambda descriptor, _: fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    "punch a hole": lambda descriptor, size: os.posix_fallocate(descriptor, 0, 2 * size),
}


@pytest.mark.parametrize("attempt", ATTEMPTS.values(), ids=ATTEMPTS.keys())
def test_sealed_descriptor_cannot_be_changed(sealed, attempt):
    with pytest.raises(OSError, match=r"Operation not permitted|Permission denied"):
        attempt(sealed.descriptor, sealed.nbytes)
    assert np.array_equal(sealed.raw(0, 1000), RowTable(sealed.spec).raw(0, 1000))


def part_of(spec, **more):
    return Partition(table=spec.name, index=0, start=0, stop=spec.rows, shards=("s0",), **more)


def test_unsealed_or_short_descriptor_is_not_mapped(sealed):
    spec = sealed.spec
    loading = SealedRows(spec, 0, spec.rows)
    with pytest.raises(CannotMapError, match=r"t@1\[0\] was handed over unsealed"):
        SharedTable(spec, [part_of(spec)], [loading.descriptor])
    longer = replace(spec, rows=2000)
    with pytest.raises(CannotMapError, match="32000 bytes instead of 64000"):
        SharedTable(longer, [part_of(longer)], [sealed.descriptor])


@needs_collapse
def test_shard_and_reader_get_huge_pages_under_every_partition():
    """At an address of its own each: a reader whose mappings are not aligned as the file is would get none."""
    part_rows = 2 * HUGE_PAGE // 32 + 1
    spec = spec_of("huge@1", 2 * part_rows)
    table = RowTable(spec)
    parts = [SealedRows(spec, first, first + part_rows) for first in (0, part_rows)]
    for rows in parts:
        rows.write(0, table.raw(rows.start, rows.stop).tobytes())
        rows.seal()
    each, deadline = 2 * HUGE_PAGE, time.monotonic() + 20
    while huge_bytes("engrid huge@1") < len(parts) * each:
        assert time.monotonic() < deadline
        assert all(np.array_equal(rows.raw(0, 10), table.raw(rows.start, rows.start + 10)) for rows in parts)
        time.sleep(0.01)
    partitions = [
        Partition(table=spec.name, index=at, start=rows.start, stop=rows.stop, shards=("s0",))
        for at, rows in enumerate(parts)
    ]
    reader = SharedTable(spec, partitions, [rows.descriptor for rows in parts])
    out = np.empty((spec.rows, spec.row_bytes), np.uint8)
    reader.gather(np.arange(spec.rows), out)
    assert np.array_equal(out, table.raw(0, spec.rows))
    assert huge_bytes("engrid huge@1") == 2 * len(parts) * each, "the shard's and the reader's"


def test_rows_stay_when_the_shard_is_killed(tmp_path):
    with shard_process(tmp_path) as (process, _), MemoryClient(f"file:{tmp_path}") as client:
        spec = spec_of()
        load_initial(client, spec)
        ids = np.arange(spec.rows)
        first = client.lookup("t@1", ids)
        process.kill()
        process.wait()
        assert np.array_equal(client.lookup("t@1", ids), first)
        assert client.traffic.rows == 0
        client.forget(["t@1"])
        with pytest.raises(ShardUnavailableError, match="s0"):
            client.lookup("t@1", ids)


def test_dropped_table_is_freed_once_nobody_reads_it(tmp_path):
    with local_shards(tmp_path, 1), MemoryClient(f"file:{tmp_path}") as client:
        load_initial(client, spec_of("gone@1"))

        client.lookup("gone@1", np.array([1]))
        assert mappings("engrid gone@1") == 2, "by the shard and by the client, both in this process"
        drop_tables(client, ["gone@1"])
        client.forget(["gone@1"])
        assert mappings("engrid gone@1") == 0


# -- the handover


@pytest.fixture
def shard(tmp_path):
    """(client, path of the shard's socket, its instance), of a shard with sealed table t@1 and live table live."""
    with local_shards(tmp_path, 1), MemoryClient(f"file:{tmp_path}") as client:
        load_initial(client, spec_of())
        create_tables(client, [table("live")])
        reply = client.connections.transport("s0").stub.Describe(pb.DescribeRequest())
        yield client, reply.local_socket, reply.instance


def ask(path, raw):
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(5)
        peer.connect(path)
        with contextlib.suppress(BrokenPipeError):
            peer.sendall(raw)
        line, descriptors, _, _ = socket.recv_fds(peer, 4096, 1)
        for descriptor in descriptors:
            os.close(descriptor)
        return json.loads(line), len(descriptors)


def request(instance, name="t@1", partition=0):
    return json.dumps({"instance": instance, "table": name, "partition": partition}).encode() + b"\n"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\n", "not a request"),
        (b"[]\n", "not a request"),
        (b"\xff\n", "not a request"),
        (b"x" * 5000, "not a request"),
        (request("another"), "another shard"),
        (None, "live is live"),
        (b'{"instance": "INSTANCE", "table": 7, "partition": 0}\n', "not a request"),
        (b'{"instance": "INSTANCE", "table": "t@1", "partition": 9}\n', "not held"),
        (b'{"instance": "INSTANCE", "table": "t@2", "partition": 0}\n', "not held"),
    ],
)
def test_bad_request_is_answered_with_the_reason_and_no_descriptor(shard, raw, words):
    _, path, instance = shard
    raw = request(instance, "live") if raw is None else raw.replace(b"INSTANCE", instance.encode())
    answer, descriptors = ask(path, raw)
    assert words in answer["message"]
    assert descriptors == 0
    assert ask(path, request(instance)) == ({"start": 0, "stop": 1000}, 1), "the next is served"


def test_client_that_says_nothing_holds_up_the_others_for_a_second_at_most(shard):
    _, path, instance = shard
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(path)
        started = time.monotonic()
        assert ask(path, request(instance))[1] == 1
        assert time.monotonic() - started < 4


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become another user")
def test_another_user_is_refused(shard):
    _, path, instance = shard
    folder = os.path.dirname(path)  # noqa: PTH120 - text as it travels
    mode = os.stat(folder).st_mode  # noqa: PTH116
    script = (
        f"import os, socket; os.setuid(65534); s = socket.socket(socket.AF_UNIX); s.connect({path!r});"
        f"s.sendall({request(instance)!r}); line, fds, *_ = socket.recv_fds(s, 4096, 1); print(line.decode(), len(fds))"
    )
    closed = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert "PermissionError" in closed.stderr, "the folder lets nobody in"
    os.chmod(folder, 0o755)  # noqa: PTH101
    os.chmod(path, 0o777)  # noqa: PTH101
    try:
        opened = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    finally:
        os.chmod(folder, mode)  # noqa: PTH101
    assert "user 65534 may not read" in opened.stdout, opened.stderr
    assert opened.stdout.rstrip().endswith(" 0")


def test_where_nothing_is_handed_over_rows_come_over_grpc(tmp_path):
    with local_shards(tmp_path, 2, shared_memory=False), MemoryClient(f"file:{tmp_path}") as client:
        spec = spec_of()
        load_initial(client, spec)
        assert np.array_equal(client.lookup("t@1", np.arange(1000)), expected(spec, np.arange(1000)))
        assert client.traffic.rows == 1000
        assert "hands nothing over" in client.shared.reason("t@1")


def test_socket_that_is_not_on_this_host_is_passed_over(shard):
    client, path, _ = shard
    os.rename(path, path + ".away")  # noqa: PTH104
    try:
        client.lookup("t@1", np.array([1]))
        assert "is not on this host" in client.shared.reason("t@1")
    finally:
        os.rename(path + ".away", path)  # noqa: PTH104


def test_threads_that_map_a_table_at_once_map_it_once(shard):
    client, _, _ = shard
    spec, _ = client.connections.table("t@1")
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(client.shared.table(spec, time.monotonic() + 5))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1
    assert found[0] is not None
