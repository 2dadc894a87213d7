"""`engrid publish`, `engrid versions`: which version of a run's memory new readers get."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from engrid.client.pins import tables_held
from engrid.control.versions import rollback_version
from engrid.directory import Version
from engrid.tables import NAME
from engrid.worker.saved_model import open_rows
from engrid.worker.serve.sealed_tables import prune as prune_versions
from engrid.worker.serve.sealed_tables import publish as publish_version

from .status import memory_of


def publish(run_dir: Path, checkpoint: Path, run: str | None = None) -> tuple[str, str, list[str]]:
    """Loads the checkpoint's rows, makes them the run's current version and drops what nobody needs any more.

    run: to publish it under; None: that of the checkpoint. Returns the run, the version and the tables dropped.
    """
    saved = open_rows(checkpoint)
    run = run or saved.run
    if not run:
        raise ValueError(f"the tables of {saved.path} are of no run; give a name to publish them under (--run)")
    if not NAME.fullmatch(run):
        raise ValueError(f"run {run!r}: give letters, digits, '.', '_' and '-', not starting with a sign")
    with memory_of(run_dir) as client:
        return run, saved.version, publish_version(saved, client, run)


def roll_back(run_dir: Path, run: str, to: str) -> str:
    """Makes an earlier version current again and returns its name."""
    with memory_of(run_dir) as client:
        return rollback_version(client, run, to).name


def prune(run_dir: Path, run: str) -> list[str]:
    """Drops versions that nobody reads, but for the current one and the one before it; returns tables dropped."""
    with memory_of(run_dir) as client:
        return prune_versions(client, run)


def _state(version: Version, versions: tuple[Version, ...]) -> str:
    if version is versions[-1]:
        return "current"
    return "taken back" if version.taken_back else "published"


def show_versions(run_dir: Path, console: Console) -> None:
    """Prints what is published and what else is loaded."""
    with memory_of(run_dir) as client:
        if not client.connections.epoch:
            console.print("no tables yet", style="dim")
            return
        placement, held = client.placement, tables_held(client.connections)
    table = Table("run", "version", "", "readers", "GiB")
    published = {name for versions in placement.versions.values() for each in versions for name in each.tables}
    rows = [
        (run, each.name, _state(each, versions), each.tables)
        for run, versions in sorted(placement.versions.items())
        for each in versions
    ]
    loose: dict[tuple[str, str], list[str]] = {}
    for name, spec in placement.tables.items():
        if spec.version and name not in published:
            loose.setdefault((name.partition(".engram.")[0], spec.version), []).append(name)
    rows += [(run, version, "loaded", tuple(names)) for (run, version), names in sorted(loose.items())]
    for run, version, state, names in rows:
        size = sum(placement.tables[name].rows * placement.tables[name].row_bytes for name in names)
        table.add_row(run, version, state, "yes" if held & set(names) else "no", f"{size / (1 << 30):.3f}")
    console.print(table)
