"""Which version of a model's memory is the current one: published, taken back, and dropped once nobody reads it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from engrid.client.client import MemoryClient
from engrid.client.pins import tables_held
from engrid.directory import Version, with_rollback, with_version
from engrid.rpc.errors import BadRequestError, PinnedError, UnknownTableError

from .tables import change, current, directory_of, drop_tables

KEEP = 2
"""Published versions that stay though nobody reads them: the current one and the one to go back to."""


def publish_version(client: MemoryClient, run: str, version: Version) -> None:
    """Makes a version, whose tables are loaded, the one that new readers of the run pin. Old readers keep theirs.

    One compare-and-set in the directory: a reader finds the one or the other. Raises BadRequestError where rows are
    missing, EpochConflictError where someone else changed the placement: publish again.
    """
    client.connections.refresh()
    _check_served(client, run, version)
    before = current(directory_of(client))
    if before.versions.get(run, ())[-1:] != (version,):
        change(client, before, with_version(before, run, version))


def _check_served(client: MemoryClient, run: str, version: Version) -> None:
    for table in version.tables:
        client.connections.table(table)
        if not client.connections.serves(table):
            raise BadRequestError(f"version {version.name} of run {run} lacks rows of {table}; load it first")


def rollback_version(client: MemoryClient, run: str, to: str = "") -> Version:
    """Makes an earlier version current again and returns it. to: its name; empty: the one published before the current,
    so that each call goes further back.

    Raises UnknownTableError where there is none.
    """
    client.connections.refresh()
    before = current(directory_of(client))
    versions = before.versions.get(run, ())
    earlier = [each for each in versions[:-1] if each.name == to or (not to and not each.taken_back)]
    if not earlier:
        known = ", ".join(f"{each.name} (taken back)" if each.taken_back else each.name for each in versions) or "none"
        raise UnknownTableError(f"run {run!r} has no earlier version {to or 'to go back to'}; published: {known}")
    found = earlier[-1]
    _check_served(client, run, found)
    change(client, before, with_rollback(before, run, found.name))
    return replace(found, taken_back=False)


def prune_versions(client: MemoryClient, run: str) -> list[str]:
    """Drops sealed tables of a run that nobody has pinned and that belong to none of its last KEEP published versions,
    with and without those that were taken back.

    Returns their names. What somebody pins while we look stays, for the next time. Raises UnknownTableError for a run that
    has neither versions nor sealed tables.
    """
    client.connections.refresh()
    placement = client.placement
    versions = placement.versions.get(run, ())
    others = [version for each, of in placement.versions.items() if each != run for version in of]
    standing = [version for version in versions if not version.taken_back]
    kept = {table for version in (*others, *versions[-KEEP:], *standing[-KEEP:]) for table in version.tables}
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
