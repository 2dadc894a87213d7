"""Which version of a model's memory is the current one: published, taken back, and dropped once nobody reads it."""

from __future__ import annotations

from contextlib import suppress

from engrid.directory import Version, with_version
from engrid.rpc.errors import BadRequestError, PinnedError, UnknownTableError

from .admin import change, current, directory_of, drop_tables
from .client import MemoryClient
from .pins import tables_held

KEEP = 2
"""Published versions that stay though nobody reads them: the current one and the one to go back to."""


def publish_version(client: MemoryClient, run: str, version: Version) -> None:
    """Makes a version, whose tables are loaded, the one that new readers of the run pin. Old readers keep theirs.

    One compare-and-set in the directory: a reader finds the one or the other. Raises BadRequestError where rows are
    missing, EpochConflictError where someone else changed the placement: publish again.
    """
    client.connections.refresh()
    for table in version.tables:
        client.connections.table(table)
        if not client.connections.serves(table):
            raise BadRequestError(f"version {version.name} of run {run} lacks rows of {table}; load it first")
    before = current(directory_of(client))
    if before.versions.get(run, ())[-1:] != (version,):
        change(client, before, with_version(before, run, version))


def rollback_version(client: MemoryClient, run: str, to: str = "") -> Version:
    """Makes an earlier version current again and returns it. to: its name; empty: the one before the current.

    Raises UnknownTableError where there is none.
    """
    client.connections.refresh()
    versions = client.placement.versions.get(run, ())
    earlier = [each for each in versions[:-1] if each.name == to or not to]
    if not earlier:
        known = ", ".join(each.name for each in versions) or "none"
        raise UnknownTableError(f"run {run!r} has no earlier version {to or 'to go back to'}; published: {known}")
    publish_version(client, run, earlier[-1])
    return earlier[-1]


def prune_versions(client: MemoryClient, run: str) -> list[str]:
    """Drops sealed tables of a run that belong to none of its last KEEP published versions and that nobody has pinned.

    Returns their names. What somebody pins while we look stays, for the next time. Raises UnknownTableError for a run that
    has neither versions nor sealed tables.
    """
    client.connections.refresh()
    placement = client.placement
    versions = placement.versions.get(run, ())
    others = [version for each, of in placement.versions.items() if each != run for version in of]
    kept = {table for version in (*others, *versions[-KEEP:]) for table in version.tables}
    named = {name for name, spec in placement.tables.items() if spec.version and name.startswith(f"{run}.engram.")}
    if not versions and not named:
        known = {
            *placement.versions,
            *(name.partition(".engram.")[0] for name, spec in placement.tables.items() if spec.version),
        }
        raise UnknownTableError(f"no run {run!r} has sealed tables; known: {', '.join(sorted(known)) or 'none'}")
    of_run = named | {table for version in versions for table in version.tables}
    unused = sorted(of_run - kept - tables_held(client.connections))
    with suppress(PinnedError):
        drop_tables(client, unused)
        client.forget(unused)
        return unused
    return []
