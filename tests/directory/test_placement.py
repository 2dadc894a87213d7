import dataclasses
import itertools
import json
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engrid.directory import (
    EMPTY_PLACEMENT,
    EpochConflictError,
    Partition,
    Placement,
    PlacementError,
    with_shards,
    with_tables,
    without_tables,
)
from engrid.tables import OptimizerSpec, TableSpec


def table_spec(name: str = "t", rows: int = 30, buckets: tuple[int, ...] = ()) -> TableSpec:
    return TableSpec(
        name=name,
        rows=sum(buckets) or rows,
        row_format="float32",
        width=4,
        seed=0,
        layer=1,
        init_std=0.1,
        optimizer=OptimizerSpec(kind="adam"),
        buckets=buckets,
    )


def shards(count: int) -> dict[str, str]:
    return {f"s{index}": f"h:{5000 + index}" for index in range(count)}


def on_shards(count: int) -> Placement:
    return with_shards(EMPTY_PLACEMENT, shards(count))


specs = st.one_of(
    st.builds(table_spec, rows=st.integers(1, 2000)),
    st.builds(table_spec, buckets=st.lists(st.integers(1, 200), min_size=1, max_size=30).map(tuple)),
    st.builds(
        lambda heads, size: table_spec(buckets=tuple(size + 2 * head for head in range(heads))),
        st.integers(1, 32),
        st.integers(100, 10_000),
    ),
)


@settings(max_examples=200, deadline=None)
@given(specs=st.lists(specs, min_size=1, max_size=4), count=st.integers(1, 9), partitions_per_shard=st.integers(1, 4))
def test_every_table_is_cut_whole_even_and_on_one_stretch_per_shard(
    specs: list[TableSpec], count: int, partitions_per_shard: int
) -> None:
    specs = [dataclasses.replace(spec, name=f"t{index}") for index, spec in enumerate(specs)]
    placement = with_tables(on_shards(count), specs, partitions_per_shard=partitions_per_shard)
    assert placement.epoch == 2
    assert list(placement.tables.values()) == specs
    assert with_tables(on_shards(count), specs, partitions_per_shard=partitions_per_shard) == placement
    for spec in specs:
        parts = placement.partitions[spec.name]
        ranges = min(count * partitions_per_shard, spec.rows)
        assert len(parts) == ranges
        edges = {part.stop for part in parts}
        if len(spec.buckets) >= ranges:
            assert edges <= set(itertools.accumulate(spec.buckets))
            assert max(map(len, parts)) <= spec.rows / ranges + max(spec.buckets)
        else:
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
        owners = [owner for owner, _ in itertools.groupby(part.primary for part in parts)]
        assert len(owners) == len(set(owners)) == min(count, ranges)
        assert max(sum(part.primary == owner for part in parts) for owner in owners) <= partitions_per_shard


@settings(max_examples=100, deadline=None)
@given(heads=st.integers(1, 48), tables=st.integers(1, 6), count=st.integers(1, 9))
def test_tables_with_equal_heads_load_all_shards_alike(heads: int, tables: int, count: int) -> None:
    """Over several tables no shard has more than one head above the emptiest: the emptiest gets the most rows."""
    placement = with_tables(on_shards(count), [table_spec(f"t{i}", buckets=(90,) * heads) for i in range(tables)])
    rows = {name: sum(map(len, placement.owned_by(name))) for name in placement.shards}
    assert max(rows.values()) - min(rows.values()) <= 90
    assert placement.bytes_by_shard() == {name: 48 * count for name, count in rows.items()}


@pytest.mark.parametrize(
    "buckets", [(1, 1, 1, 100), (100, 1, 1, 1), (1, 100, 1, 1), (1, 1, 1, 1, 100), (100, 1, 1, 1, 1)]
)
def test_every_range_has_a_head_however_unequal_they_are(buckets: tuple[int, ...]) -> None:
    parts = with_tables(on_shards(4), [table_spec(buckets=buckets)]).partitions["t"]
    assert len(parts) == 4
    assert {part.stop for part in parts} <= set(itertools.accumulate(buckets))


def test_heads_are_kept_whole_and_the_next_table_evens_out() -> None:
    placement = with_tables(on_shards(3), [table_spec("a", buckets=(10,) * 4), table_spec("b", buckets=(10,) * 4)])
    layout = {
        name: [(part.start, part.stop, part.shards) for part in parts] for name, parts in placement.partitions.items()
    }
    assert layout == {
        "a": [(0, 10, ("s1",)), (10, 30, ("s0",)), (30, 40, ("s2",))],
        "b": [(0, 10, ("s2",)), (10, 30, ("s1",)), (30, 40, ("s0",))],
    }


def test_tables_and_shards_come_and_go_epoch_by_epoch() -> None:
    placement = with_tables(on_shards(2), [table_spec("a"), table_spec("b")])
    fewer = without_tables(placement, ["a"])
    assert (fewer.epoch, list(fewer.tables), list(fewer.partitions)) == (3, ["b"], ["b"])
    more = with_shards(fewer, shards(3))
    assert (more.epoch, more.partitions, more.owned_by("s2")) == (4, fewer.partitions, ())
    assert more.bytes_by_shard() == {"s0": 720, "s1": 720, "s2": 0}
    assert [part.index for part in with_tables(more, [table_spec("c")]).owned_by("s2")] == [0]
    with pytest.raises(PlacementError, match="partition 1 of table b is on shard 's1', which has no address"):
        with_shards(fewer, shards(1))
    with pytest.raises(PlacementError, match="table x is not in the placement; known are b"):
        without_tables(fewer, ["x"])
    with pytest.raises(PlacementError, match="table b is in the placement already"):
        with_tables(fewer, [table_spec("b")])
    with pytest.raises(PlacementError, match="table c is in the placement already"):
        with_tables(fewer, [table_spec("c"), table_spec("c")])
    with pytest.raises(PlacementError, match="has no shards; start some"):
        with_tables(EMPTY_PLACEMENT, [table_spec()])
    with pytest.raises(PlacementError, match="partitions_per_shard is 0"):
        with_tables(placement, [], partitions_per_shard=0)
    with pytest.raises(PlacementError, match="shard 's7' is not in the placement; known are s0, s1"):
        placement.owned_by("s7")


def part(start: int, stop: int, *names: str, index: int = 0, table: str = "t") -> Partition:
    return Partition(table=table, index=index, start=start, stop=stop, shards=names)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "end at row 0, not at its 30"),
        ([part(0, 29, "s0")], "end at row 29, not at its 30"),
        ([part(0, 31, "s0")], "end at row 31, not at its 30"),
        ([part(1, 30, "s0")], r"partition 0 of table t has rows 1\.\.30; give a range that starts at 0"),
        ([part(0, 9, "s0"), part(10, 30, "s0", index=1)], r"partition 1 .* rows 10\.\.30; .* starts at 9"),
        ([part(0, 9, "s0"), part(8, 30, "s0", index=1)], r"partition 1 .* rows 8\.\.30; .* starts at 9"),
        ([part(0, 0, "s0"), part(0, 30, "s0", index=1)], r"partition 0 .* rows 0\.\.0;"),
        ([part(0, 30)], r"is on shards \(\); give at least one"),
        ([part(0, 30, "s0", "s0")], "give at least one, each once"),
        ([part(0, 30, "s0", "s9")], "is on shard 's9', which has no address; known are s0, s1"),
        ([part(0, 30, "s0", index=1)], "calls itself partition 1 of t"),
        ([part(0, 30, "s0", table="u")], "calls itself partition 0 of u"),
    ],
)
def test_partitions_that_do_not_make_a_table_are_refused(parts: list[Partition], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        Placement(epoch=1, shards=shards(2), tables={"t": table_spec()}, partitions={"t": tuple(parts)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": -1}, "epoch is -1"),
        ({"epoch": True}, "epoch is True"),
        ({"shards": {"s0": ""}}, "shard 's0' has address ''"),
        ({"shards": {"s0": 7}}, "shard 's0' has address 7"),
        ({"partitions": {}}, r"tables \['t'\] but partitions of \[\]"),
        ({"tables": {"u": table_spec("t")}, "partitions": {"u": ()}}, "table t is filed under 'u'"),
    ],
)
def test_a_placement_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "epoch": 1,
        "shards": shards(1),
        "tables": {"t": table_spec()},
        "partitions": {"t": (part(0, 30, "s0"),)},
    }
    Placement(**good)
    with pytest.raises(PlacementError, match=message):
        Placement(**good | change)


def test_json_carries_everything_and_refuses_the_rest() -> None:
    placement = with_tables(on_shards(2), [table_spec("a", buckets=(13, 17)), table_spec("b")], partitions_per_shard=2)
    plain = json.loads(json.dumps(placement.to_json()))
    assert Placement.from_json(plain) == placement
    assert pickle.loads(pickle.dumps(placement)) == placement
    with pytest.raises(ValueError, match=r"placement has unknown keys \['version'\]"):
        Placement.from_json(plain | {"version": 2})
    with pytest.raises(ValueError, match="partition 0 of table a has unknown keys"):
        Placement.from_json(plain | {"partitions": {"a": [{"start": 0, "stop": 1, "shards": [], "lease": 1}]}})
    with pytest.raises(PlacementError, match="give integers start and stop"):
        Placement.from_json(plain | {"partitions": {"a": [{"start": 0, "stop": "1", "shards": []}]}})
    with pytest.raises(PlacementError, match="partitions of table a are 3"):
        Placement.from_json(plain | {"partitions": {"a": 3}})
    with pytest.raises(PlacementError, match="shards is"):
        Placement.from_json(plain | {"shards": ["s0"]})


def test_a_conflict_keeps_its_epochs_between_processes() -> None:
    error = pickle.loads(pickle.dumps(EpochConflictError("x", 3, None)))
    assert (error.expected_epoch, error.actual_epoch) == (3, None)
    assert str(error) == "x holds no placement, not epoch 3; read placement() and make the change on top of it"


@pytest.mark.parametrize("epoch", [-1, 2**63, 2**70, True, 1.0, "1", None])
def test_epoch_is_a_number_that_travels(epoch):
    with pytest.raises(PlacementError, match="epoch is"):
        Placement(epoch=epoch, shards={}, tables={}, partitions={})
