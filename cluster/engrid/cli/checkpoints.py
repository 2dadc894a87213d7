"""`engrid checkpoint`: save, restore, verify and list checkpoints by hand. Needs neither Ray nor torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import console, errors, report_errors, run_directory
from .options import RunDir, path_option

if TYPE_CHECKING:
    from engrid.client import MemoryClient
    from engrid.storage.checkpoint import Checkpoints
    from engrid.v1.memory_pb2 import PartitionState

app = typer.Typer(
    name="checkpoint",
    help="Rows and optimizer state of a run's live tables, saved and restored by the shards themselves.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Folder = Annotated[Path, path_option("Folder of the run's checkpoints, seen by all shards.")]
DEFAULT_FOLDER = Path("engrid-run/checkpoint")


@app.command()
def save(
    run: Annotated[str, typer.Option(help="Name of the run whose tables are saved.")] = "default",
    tables: Annotated[
        list[str] | None,
        typer.Option(help="Names of the tables instead, with commas or again for more.", show_default="RUN.engram.*"),
    ] = None,
    folder: Folder = DEFAULT_FOLDER,
    run_dir: RunDir = None,
) -> None:
    """Save live tables at the step they stand at. Not while they are trained: `engrid train --checkpoint-every` is for that."""
    from engrid.cluster.status import memory_of
    from engrid.control.checkpoints import CheckpointSave, check_folder, live_states

    with report_errors(), memory_of(run_directory(run_dir)) as client:
        states = live_states(client)
        names = _chosen(run, tables, {state.table for state in states}, client)
        identity, attempt, step = _stand([state for state in states if state.table in names], names)
        check_folder(client, folder)
        begun = CheckpointSave(client, folder, run=identity, attempt=attempt, step=step, tables=names)
        manifest = begun.finish({}, {})
        console.print(f"{folder / manifest.name}: rows and optimizer state of {', '.join(names)}", highlight=False)
        console.print(
            "no dense weights are in it: it can be restored and its rows published, not generated with or trained on",
            style="dim",
        )


def _chosen(run: str, tables: Sequence[str] | None, live: Collection[str], client: MemoryClient) -> list[str]:
    """The tables to save: those named, or those of the run. Raises BadRequestError where one is not live."""
    from engrid.rpc.errors import BadRequestError

    if tables is None:
        names = sorted(name for name in live if name.startswith(f"{run}.engram."))
        if not names:
            known = ", ".join(sorted(live)) or "none"
            raise BadRequestError(f"no tables of run {run}; name others with --tables (live tables: {known})")
        return names
    names = list(dict.fromkeys(name.strip() for each in tables for name in each.split(",") if name.strip()))
    placed = client.placement.tables if client.connections.epoch else {}
    for name in names:
        if name not in live:
            why = "is sealed: its rows are in the checkpoint that it was made of" if name in placed else "is not there"
            raise BadRequestError(f"table {name} {why}; live tables: {', '.join(sorted(live)) or 'none'}")
    if not names:
        raise BadRequestError("--tables names no table")
    return names


def _stand(states: Sequence[PartitionState], names: Sequence[str]) -> tuple[str, int, int]:
    """Run, attempt and step that all partitions stand at. Raises BadRequestError where they differ."""
    from engrid.rpc.errors import BadRequestError

    stands = {(state.run, state.attempt, state.step) for state in states}
    if len(stands) != 1:
        known = "; ".join(
            f"{table}: run {run or '-'}, attempt {attempt}, step {step}"
            for table, run, attempt, step in sorted(
                {(each.table, each.run, each.attempt, each.step) for each in states}
            )
        )
        raise BadRequestError(
            f"tables {', '.join(names)} stand at different steps ({known}); save again, or those of one run and step at a time"
        )
    return stands.pop()


@app.command()
def restore(
    name: Annotated[str | None, typer.Argument(help="Of the checkpoint.", show_default="the newest")] = None,
    folder: Folder = DEFAULT_FOLDER,
    replace: Annotated[  # noqa: FBT002
        bool, typer.Option("--replace", help="Give up live tables that hold another run's steps.")
    ] = False,
    run_dir: RunDir = None,
) -> None:
    """Put a checkpoint's rows and optimizer state into the live tables, over the shards there are now."""
    from engrid.client.attempts import newest_attempt
    from engrid.cluster.status import memory_of
    from engrid.control.checkpoints import check_replaces, restore_tables
    from engrid.storage.errors import CheckpointMissingError

    with report_errors(), memory_of(run_directory(run_dir)) as client:
        checkpoints = _open(folder)
        chain = checkpoints.chain(name) if name else checkpoints.latest()
        if not chain:
            raise CheckpointMissingError(f"{folder} holds no complete checkpoint")
        manifest = chain[-1]
        if not replace:
            check_replaces(client, manifest.tables, manifest.run)
        attempt = checkpoints.claim_attempt(max(newest_attempt(client, manifest.run), manifest.attempt) + 1)
        restore_tables(client, folder, manifest, attempt=attempt)
        console.print(
            f"{', '.join(manifest.tables)} are at step {manifest.step} of run {manifest.run}; attempts before {attempt} are fenced",
            highlight=False,
        )


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="Of the checkpoint.", show_default="all")] = None,
    folder: Folder = DEFAULT_FOLDER,
) -> None:
    """Read every file of a checkpoint and of those it builds on; name each that is not as it was written."""

    with report_errors():
        checkpoints = _open(folder)
        names = [name] if name else checkpoints.names()
        problems = dict.fromkeys(problem for each in names for problem in checkpoints.verify(each))
        for problem in problems:
            errors.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)
        if problems:
            raise typer.Exit(1)
        console.print(f"{', '.join(names) or 'no checkpoint'}: every byte is as it was written", highlight=False)


@app.command("list")
def list_checkpoints(folder: Folder = DEFAULT_FOLDER) -> None:
    """Show the checkpoints of a folder, oldest first."""
    from rich.table import Table
    from rich.text import Text

    from engrid.storage.errors import CheckpointError

    with report_errors():
        checkpoints = _open(folder)
        table = Table(box=None, pad_edge=False)
        for column in ("name", "run", "step", "attempt", "rows", "model", "MiB"):
            table.add_column(column, overflow="fold", no_wrap=column == "name")
        for name in checkpoints.names():
            try:
                manifest = checkpoints.chain(name)[-1]
            except CheckpointError as error:
                table.add_row(name, Text(str(error), style="red"))
                continue
            size = sum(size for size, _ in manifest.sha256s().values()) / (1 << 20)
            rows = f"changed since {manifest.base}" if manifest.base else "all"
            model = "yes" if "model.safetensors" in manifest.files else "no"
            table.add_row(name, manifest.run, str(manifest.step), str(manifest.attempt), rows, model, f"{size:,.1f}")
        console.print(table)


def _open(folder: Path) -> Checkpoints:
    from engrid.storage.checkpoint import Checkpoints
    from engrid.storage.disk import LocalDisk
    from engrid.storage.errors import CheckpointMissingError

    if not folder.is_dir():
        raise CheckpointMissingError(f"{folder} is no folder; name that of the run's checkpoints")
    return Checkpoints(LocalDisk(folder.resolve()))
