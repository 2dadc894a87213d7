"""Versions: which sealed tables together are a model's memory at one time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engrid.tables import TableSpec, check_keys

from .errors import PlacementError


@dataclass(frozen=True)
class Version:
    """A sealed state of all tables of a model."""

    name: str
    """As in the names of its tables, behind the @."""

    tables: tuple[str, ...]
    """Names of its sealed tables."""

    checkpoint: str = ""
    """Folder of the checkpoint that its rows are of, which may hold the dense weights that go with them; empty: none."""

    taken_back: bool = False
    """A rollback went past it: the next one goes further back, and not to this one."""

    def to_json(self) -> dict[str, Any]:
        """Return what `versions_from_json` reads."""
        return {
            "name": self.name,
            "tables": list(self.tables),
            "checkpoint": self.checkpoint,
            "taken_back": self.taken_back,
        }


def check_version(run: str, version: Version, tables: Mapping[str, TableSpec]) -> None:
    """Raise PlacementError unless all tables of the version are there and of that version."""
    if not version.tables:
        raise PlacementError(f"version {version.name} of run {run} has no tables; name them")
    for table in version.tables:
        if table not in tables or tables[table].version != version.name:
            raise PlacementError(
                f"version {version.name} of run {run} names {table}, which is no table of that version in the placement"
            )


def versions_from_json(run: str, versions: Any) -> tuple[Version, ...]:
    """Raises ValueError for anything that is not a list of what `to_json` returns."""
    if not isinstance(versions, list):
        raise PlacementError(f"versions of run {run} are {versions!r}; give a JSON array")
    result = []
    for each in versions:
        check_keys(f"a version of run {run}", each, {"name", "tables", "checkpoint", "taken_back"})
        texts = isinstance(each["name"], str) and isinstance(each["checkpoint"], str)
        if not texts or not isinstance(each["tables"], list) or not isinstance(each["taken_back"], bool):
            raise PlacementError(
                f"a version of run {run} is {each!r}; give a name, an array of tables, a checkpoint and a truth value"
            )
        result.append(Version(each["name"], tuple(each["tables"]), each["checkpoint"], each["taken_back"]))
    return tuple(result)
