"""Which shard holds which rows: a placement, and the pure functions that make the next one from it.

The rows of a table are cut into partitions, contiguous ranges end to end; each names the shards that hold it, its
primary first. So finding a row's shard is one search over the partitions' starts, and a row's place in its partition
is a subtraction:

    table  |  head 0  |  head 1  |  head 2  |  head 3  |  head 4  |  head 5  |     rows 0 .. rows-1
           |--- partition 0 -----|--- partition 1 -----|--- partition 2 -----|     whole heads
    shards       s0, s2                s1, s0                s2, s1                primary first

Cuts fall between heads where there are enough heads: every token reads one row of each head, so whole heads carry
equal load whatever the text. A range inside a head may be hot, as a few n-grams are most of any text; hashing spreads
them over the head, not over its ranges.

A placement is a value. A change makes a new one at epoch + 1 (or more), and the directory lets exactly one publisher
put it in place of the epoch it was made from.

Rejected: consistent hashing of single rows, which needs a search per row and moves rows one by one; equal counts of
rows cut anywhere, which are at most one head better balanced in bytes and worse in load.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from engrid.tables import TableSpec, check_keys

from .errors import PlacementError
from .versions import Version, check_version, versions_from_json

MOST_EPOCH = 1 << 63
"""What travels as 64 bits, and what Redis counts to."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Rows start..stop-1 of a table: the unit of placement, replication, movement and checkpoints."""

    table: str
    """Name of the table."""

    index: int
    """Position among the table's partitions, in row order."""

    start: int
    """First row id."""

    stop: int
    """One past the last row id."""

    shards: tuple[str, ...]
    """Names of the shards that hold it; the first is its primary."""

    @property
    def primary(self) -> str:
        """Name of the shard that orders pushes."""
        return self.shards[0]

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Placement:
    """All tables, their partitions and the shards that hold them, at one epoch. Not to be changed in place."""

    epoch: int
    """Rises with every published change; requests carry the epoch they were routed by."""

    shards: Mapping[str, str]
    """Address (host:port) of each shard, by name."""

    tables: Mapping[str, TableSpec]
    """Specs by name of the table."""

    partitions: Mapping[str, tuple[Partition, ...]]
    """Partitions in row order, by name of the table; together they are all its rows."""

    versions: Mapping[str, tuple[Version, ...]] = field(default_factory=dict)
    """What was published, by name of the run. The last is the current one, which new readers pin."""

    def __post_init__(self) -> None:
        if not isinstance(self.epoch, int) or isinstance(self.epoch, bool) or not 0 <= self.epoch < MOST_EPOCH:
            raise PlacementError(f"epoch is {self.epoch!r}; give an integer from 0 to below 2**63")
        for name, address in self.shards.items():
            if not isinstance(address, str) or not name or not address:
                raise PlacementError(f"shard {name!r} has address {address!r}; give both as text")
        if self.tables.keys() != self.partitions.keys():
            raise PlacementError(
                f"tables {sorted(self.tables)} but partitions of {sorted(self.partitions)}; give both for each table"
            )
        for name, spec in self.tables.items():
            if spec.name != name:
                raise PlacementError(f"table {spec.name} is filed under {name!r}; use its own name")
            _check_partitions(spec, self.partitions[name], self.shards)
        for run, versions in self.versions.items():
            for version in versions:
                check_version(run, version, self.tables)

    def owned_by(self, shard: str) -> tuple[Partition, ...]:
        """Return the partitions that `shard` holds, as primary or not, by table and row."""
        if shard not in self.shards:
            raise PlacementError(f"shard {shard!r} is not in the placement; {_known(self.shards)}")
        return tuple(each for parts in self.partitions.values() for each in parts if shard in each.shards)

    def bytes_by_shard(self) -> dict[str, int]:
        """Return the bytes of rows and optimizer state on each shard, by name."""
        sizes = dict.fromkeys(self.shards, 0)
        for table, parts in self.partitions.items():
            spec = self.tables[table]
            for each in parts:
                for shard in each.shards:
                    sizes[shard] += len(each) * (spec.row_bytes + spec.state_bytes_per_row)
        return sizes

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads; partitions are listed by table in row order."""
        return {
            "epoch": self.epoch,
            "shards": dict(self.shards),
            "tables": {name: spec.to_json() for name, spec in self.tables.items()},
            "partitions": {
                name: [{"start": each.start, "stop": each.stop, "shards": list(each.shards)} for each in parts]
                for name, parts in self.partitions.items()
            },
            "versions": {run: [each.to_json() for each in versions] for run, versions in self.versions.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Raises ValueError (PlacementError where it contradicts itself) for anything `to_json` does not return."""
        check_keys("placement", values, {"epoch", "shards", "tables", "partitions", "versions"})
        for name in ("shards", "tables", "partitions", "versions"):
            if not isinstance(values[name], dict):
                raise PlacementError(f"{name} is {values[name]!r}; give a JSON object")
        return cls(
            epoch=values["epoch"],
            shards=values["shards"],
            tables={name: TableSpec.from_json(spec) for name, spec in values["tables"].items()},
            partitions={table: _partitions_from_json(table, parts) for table, parts in values["partitions"].items()},
            versions={run: versions_from_json(run, versions) for run, versions in values["versions"].items()},
        )


EMPTY_PLACEMENT = Placement(epoch=0, shards={}, tables={}, partitions={})
"""What the first placement is made from."""


def with_shards(placement: Placement, shards: Mapping[str, str]) -> Placement:
    """Return the placement at epoch + 1 with `shards` (addresses by name) in place of its own.

    Raises PlacementError if one that is left out still holds partitions.
    """
    return _next(placement, shards=dict(shards))


def with_tables(placement: Placement, specs: Iterable[TableSpec], *, partitions_per_shard: int = 1) -> Placement:
    """Return the placement at epoch + 1 with the tables of `specs` added, each spread over all its shards.

    A table is cut into partitions_per_shard ranges for each shard, as equal in rows as whole heads allow (inside heads
    where there are fewer heads than ranges; a row is the least). A shard gets ranges that lie end to end, and the
    emptiest shard the most rows. Equal arguments give equal placements.
    """
    if partitions_per_shard < 1:
        raise PlacementError(f"partitions_per_shard is {partitions_per_shard}; give at least 1")
    if not placement.shards:
        raise PlacementError("the placement has no shards; start some and add them by with_shards first")
    tables, partitions = dict(placement.tables), dict(placement.partitions)
    used = placement.bytes_by_shard()
    for spec in specs:
        if spec.name in tables:
            raise PlacementError(f"table {spec.name} is in the placement already; remove it by without_tables first")
        parts = _spread(spec, used, partitions_per_shard)
        for each in parts:
            used[each.primary] += len(each) * (spec.row_bytes + spec.state_bytes_per_row)
        tables[spec.name], partitions[spec.name] = spec, parts
    return _next(placement, tables=tables, partitions=partitions)


def without_tables(placement: Placement, names: Iterable[str]) -> Placement:
    """Return the placement at epoch + 1 without the tables `names`, and without the versions that they belong to.

    Raises PlacementError for an unknown one.
    """
    gone = set(names)
    for name in sorted(gone - placement.tables.keys()):
        raise PlacementError(f"table {name} is not in the placement; {_known(placement.tables)}")
    return _next(
        placement,
        tables={name: spec for name, spec in placement.tables.items() if name not in gone},
        partitions={name: parts for name, parts in placement.partitions.items() if name not in gone},
        versions={
            run: kept
            for run, versions in placement.versions.items()
            if (kept := tuple(each for each in versions if not gone & set(each.tables)))
        },
    )


def with_version(placement: Placement, run: str, version: Version) -> Placement:
    """Return the placement at epoch + 1 with `version` as the run's current one, be it new or published before.

    Raises PlacementError where a table of it is not placed.
    """
    others = tuple(each for each in placement.versions.get(run, ()) if each.name != version.name)
    return _next(placement, versions={**placement.versions, run: (*others, version)})


def with_rollback(placement: Placement, run: str, name: str) -> Placement:
    """Return the placement at epoch + 1 with a published version of the run as its current one, and those published after
    it as taken back. One that was taken back itself is current again, and what is before it stays as it is."""
    versions = placement.versions[run]
    at = next(index for index, each in enumerate(versions) if each.name == name)
    if versions[at].taken_back:
        return with_version(placement, run, replace(versions[at], taken_back=False))
    later = tuple(replace(each, taken_back=True) for each in versions[at + 1 :])
    return _next(placement, versions={**placement.versions, run: (*versions[:at], *later, versions[at])})


def _next(placement: Placement, **changes: Any) -> Placement:
    return replace(placement, epoch=placement.epoch + 1, **changes)


def _spread(spec: TableSpec, used: Mapping[str, int], partitions_per_shard: int) -> tuple[Partition, ...]:
    edges = _edges(spec, len(used) * partitions_per_shard)
    ranges = len(edges) - 1
    first = [group * ranges // len(used) for group in range(len(used) + 1)]
    groups = sorted(range(len(used)), key=lambda group: edges[first[group]] - edges[first[group + 1]])
    shard_of_group = dict(zip(groups, sorted(used, key=lambda shard: (used[shard], shard)), strict=True))
    return tuple(
        Partition(table=spec.name, index=index, start=edges[index], stop=edges[index + 1], shards=(shard,))
        for group, shard in sorted(shard_of_group.items())
        for index in range(first[group], first[group + 1])
    )


def _edges(spec: TableSpec, ranges: int) -> list[int]:
    """Return the row ids at which to cut, from 0 to spec.rows, for at most `ranges` non-empty ranges."""
    ranges = min(ranges, spec.rows)
    heads = list(itertools.accumulate(spec.buckets, initial=0))
    if len(spec.buckets) < ranges:
        return [spec.rows * index // ranges for index in range(ranges + 1)]
    chosen = [0]
    for index in range(1, ranges):
        # Each range needs at least one head, those before this cut as well as those after it.
        candidates = range(chosen[-1] + 1, len(spec.buckets) - (ranges - index) + 1)
        chosen.append(min(candidates, key=lambda head: abs(heads[head] * ranges - spec.rows * index)))
    return [heads[head] for head in chosen] + [spec.rows]


def _check_partitions(spec: TableSpec, parts: tuple[Partition, ...], shards: Mapping[str, str]) -> None:
    expected = 0
    for index, each in enumerate(parts):
        name = f"partition {index} of table {spec.name}"
        if each.table != spec.name or each.index != index:
            raise PlacementError(f"{name} calls itself partition {each.index} of {each.table}; list them in row order")
        if each.start != expected or each.stop <= each.start:
            raise PlacementError(f"{name} has rows {each.start}..{each.stop}; give a range that starts at {expected}")
        if not each.shards or len(set(each.shards)) < len(each.shards):
            raise PlacementError(f"{name} is on shards {each.shards}; give at least one, each once")
        for shard in each.shards:
            if shard not in shards:
                raise PlacementError(f"{name} is on shard {shard!r}, which has no address; {_known(shards)}")
        expected = each.stop
    if expected != spec.rows:
        raise PlacementError(f"partitions of table {spec.name} end at row {expected}, not at its {spec.rows} rows")


def _partitions_from_json(table: str, parts: Any) -> tuple[Partition, ...]:
    if not isinstance(parts, list):
        raise PlacementError(f"partitions of table {table} are {parts!r}; give a JSON array")
    result = []
    for index, each in enumerate(parts):
        name = f"partition {index} of table {table}"
        check_keys(name, each, {"start", "stop", "shards"})
        start, stop, shards = each["start"], each["stop"], each["shards"]
        if type(start) is not int or type(stop) is not int or not isinstance(shards, list):
            raise PlacementError(f"{name} is {each!r}; give integers start and stop and an array of shards")
        result.append(Partition(table=table, index=index, start=start, stop=stop, shards=tuple(shards)))
    return tuple(result)


def _known(names: Iterable[str]) -> str:
    return f"known are {', '.join(sorted(names)) or 'none'}"
