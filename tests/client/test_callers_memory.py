"""Arrays given to the client are the caller's: what becomes of them afterwards changes nothing, by any way to the rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engrid.client import ClientConfig, MemoryClient, RowLookup, TrainingRun, training
from engrid.control.tables import create_tables
from engrid.rpc.errors import BadRequestError, RowOutOfRangeError
from engrid.tables import RowTable, decode_rows
from tests.shards import load_initial, local_shards, table

WAYS = {
    "wire": ClientConfig(shared_memory=False, cache_bytes=0),
    "cached": ClientConfig(shared_memory=False, cache_bytes=1 << 20),
    "tiny cache": ClientConfig(shared_memory=False, cache_bytes=20_000),
    "mapped": ClientConfig(cache_bytes=0),
}
SEALED, LIVE = table("t@1", optimizer=None), table("t")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    with local_shards(folder, 2), MemoryClient(f"file:{folder}") as admin:
        load_initial(admin, SEALED)
        create_tables(admin, [LIVE])
        yield folder


@pytest.fixture(scope="module", params=WAYS.values(), ids=WAYS.keys())
def reader(request, folder):
    with MemoryClient(f"file:{folder}", request.param) as client:
        yield client


def expected(ids):
    out = np.zeros((ids.size, SEALED.row_bytes), np.uint8)
    alive = np.flatnonzero(ids.reshape(-1) >= 0)
    living = np.empty((len(alive), SEALED.row_bytes), np.uint8)
    RowTable(SEALED).gather(ids.reshape(-1)[alive], living)
    out[alive] = living
    return out.reshape(*ids.shape, SEALED.row_bytes)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ids_and_keys_may_be_written_to_right_after_prefetch(reader, data):
    name = data.draw(st.sampled_from(["t@1", "t"]))
    batches = []
    for _ in range(data.draw(st.integers(1, 2))):
        positions, heads = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 3))
        orders = []
        for order in range(2, 2 + data.draw(st.integers(1, 2))):
            keys = np.array(data.draw(st.lists(st.integers(0, 5), min_size=positions, max_size=positions)), np.int64)
            ids = (keys[:, None] * 31 + np.arange(heads) * 101 + order) % SEALED.rows
            if data.draw(st.booleans()):
                ids[data.draw(st.integers(0, positions)) :] = -1
            if data.draw(st.booleans()):
                ids = np.asfortranarray(ids)
            orders.append(RowLookup(name, ids, keys if data.draw(st.booleans()) else None, order))
        pending = reader.prefetch(orders)
        rows = np.concatenate([expected(each.row_ids) for each in orders], axis=1)
        for each in orders:
            each.row_ids[:] = data.draw(st.sampled_from([500, 10**9, -1, -7]))
            if each.keys is not None:
                each.keys[:] = data.draw(st.integers(-(2**63), 2**63 - 1))
        batches.append((pending, rows))
    for pending, rows in batches:
        found = pending.rows(name)
        assert np.array_equal(found, rows)
        found[:] = 255  # it is the caller's as well


def test_ids_are_kept_for_a_request_that_is_sent_again(tmp_path):
    spec = table()
    with (
        local_shards(tmp_path, 2),
        MemoryClient(f"file:{tmp_path}") as admin,
        MemoryClient(f"file:{tmp_path}") as reader,
    ):
        create_tables(admin, [spec])
        reader.lookup("t", [0])
        create_tables(admin, [spec], replace=True)
        ids = np.arange(1000)[:, None]
        pending, wanted = reader.prefetch([RowLookup("t", ids)]), expected(ids)
        ids[:] = 500
        assert np.array_equal(pending.rows("t"), wanted)


def test_a_push_is_of_the_gradients_it_was_given(folder, monkeypatch):
    """Tried again or not: they are written to by another thread while it is under way."""
    spec = table("pushed", init_std=0.0)
    with MemoryClient(f"file:{folder}") as client:
        create_tables(client, [spec], exist_ok=True)
        run = TrainingRun(client, run="r", tables=["pushed"])
        ids, values, real = np.array([3, 999]), np.ones((2, 8), np.float32), TrainingRun._ask

        def ask(self, method, requests):
            ids[:], values[:] = 500, np.nan
            return real(self, method, requests)

        monkeypatch.setattr(TrainingRun, "_ask", ask)
        run.push({"pushed": (ids, values)}, step=run.step + 1, learning_rate=1.0)
        rows = client.lookup("pushed", np.arange(1000), step=run.step, dtype=np.float32)
        assert np.flatnonzero(rows.any(axis=1)).tolist() == [3, 999]
        assert (rows[[3, 999]] == -1).all()


@pytest.mark.parametrize(
    "ids",
    [
        [3, 1, 2],
        (3, 1, 2),
        np.array([3, 1, 2], np.int32),
        np.array([3, 1, 2], np.uint64),
        np.array([3, 1, 2], np.int8),
        np.array([3, 1, 2], ">i8"),
        np.array([3, 0, 1, 0, 2, 0])[::2],
    ],
)
def test_any_whole_numbers_are_row_ids(reader, ids):
    wanted = expected(np.array([3, 1, 2]))
    for name in ("t", "t@1"):
        assert np.array_equal(reader.lookup(name, ids), wanted)
        column = [[value] for value in ids] if isinstance(ids, list | tuple) else ids[:, None]
        assert np.array_equal(reader.prefetch([RowLookup(name, column, ids)]).rows(name)[:, 0], wanted)
        values = reader.lookup(name, ids, dtype=np.float32)
        assert np.array_equal(values, decode_rows(wanted, "float32", 8))
        assert values.dtype == np.float32
    assert reader.lookup("t", []).shape == (0, 32)


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([1.0, 2.0], BadRequestError),
        (np.arange(3, dtype=np.float64), BadRequestError),
        (np.zeros(0), BadRequestError),
        ([True, False], BadRequestError),
        (np.zeros(3, bool), BadRequestError),
        (["1"], BadRequestError),
        (None, BadRequestError),
        ([[1], [2, 3]], BadRequestError),
        ([1, 2**63], RowOutOfRangeError),
        ([2**64], RowOutOfRangeError),
        ([-(2**70)], RowOutOfRangeError),
        (np.array([2**63], np.uint64), RowOutOfRangeError),
    ],
)
def test_what_are_no_row_ids_is_refused_by_the_tables_name(reader, ids, error):
    with pytest.raises(error, match="table t"):
        reader.lookup("t", ids)
    with pytest.raises(BadRequestError, match="table t"):
        reader.prefetch([RowLookup("t", np.zeros((2, 1), np.int64), np.zeros(2))])


@pytest.mark.parametrize("dtype", [np.float64, np.uint8, "int64"])
def test_values_are_float32(reader, dtype):
    with pytest.raises(BadRequestError, match=r"as bytes .* or as float32"):
        reader.lookup("t", [1], dtype=dtype)


@pytest.mark.parametrize("timeout", [float("inf"), float("nan"), -1, -0.001, 1e300, "1", True])
def test_a_time_that_is_none_is_refused_and_takes_nothing(reader, timeout):
    for _ in range(3):
        with pytest.raises(BadRequestError, match="timeout"):
            reader.lookup("t", [1], timeout=timeout)
    assert len(reader.lookup("t", [1], timeout=5)) == 1


@pytest.mark.parametrize("step", [-1, 2**63, 1.5, True])
def test_a_step_that_is_none_is_refused(reader, step):
    with pytest.raises(BadRequestError, match="step"):
        reader.lookup("t", [1], step=step)
    with pytest.raises(ValueError, match="timeout"):
        ClientConfig(timeout=float("nan"))


BUFFERS = {
    "another type": lambda shape: np.zeros(shape, np.float32),
    "signed bytes": lambda shape: np.zeros(shape, np.int8),
    "more positions": lambda shape: np.zeros((shape[0] + 1, *shape[1:]), np.uint8),
    "more heads": lambda shape: np.zeros((shape[0], shape[1] + 1, shape[2]), np.uint8),
    "flat": lambda shape: np.zeros(shape, np.uint8).reshape(-1),
    "in Fortran's order": lambda shape: np.zeros(shape, np.uint8, order="F"),
    "with gaps": lambda shape: np.zeros((shape[0], 2 * shape[1], shape[2]), np.uint8)[:, ::2],
    "read-only": lambda shape: np.frombuffer(bytes(np.prod(shape)), np.uint8).reshape(shape),
    "no array": lambda shape: bytearray(np.prod(shape)),
}


@pytest.mark.parametrize("name", ["t@1", "t"])
@pytest.mark.parametrize("buffer", BUFFERS.values(), ids=BUFFERS.keys())
def test_a_buffer_that_rows_cannot_be_written_to_as_they_are_is_refused(reader, name, buffer):
    """Such a one came back unfilled, converted, or with the rows of one position at all."""
    ids = np.array([[5, 6], [-1, -1], [700, 3]])
    pending = reader.prefetch([RowLookup(name, ids, keys=np.array([1, 2, 3]), order=7)], timeout=60.0)
    with pytest.raises(BadRequestError, match=f"table {name}: the buffer for its rows must be"):
        pending.rows(name, buffer)
    assert np.array_equal(pending.rows(name), expected(ids)), "and may be asked for again"


def test_row_ids_of_a_push_are_read_once(tmp_path, monkeypatch):
    """Written to by another thread after they were looked at, they lay in no partition: the step was applied empty."""
    ids, check = np.arange(3), training._check_arrays

    def check_then_write(*arguments):
        check(*arguments)
        ids[:] = 10**9

    monkeypatch.setattr(training, "_check_arrays", check_then_write)
    with local_shards(tmp_path, 1), MemoryClient(tmp_path) as client:
        create_tables(client, [table("u", init_std=0.0)])
        run = TrainingRun(client, run="r", tables=["u"])
        assert run.push({"u": (ids, np.ones((3, 8), np.float32))}, step=1, learning_rate=1.0) == 3
        assert (client.lookup("u", [0, 1, 2], step=1, dtype=np.float32) == -1).all()
