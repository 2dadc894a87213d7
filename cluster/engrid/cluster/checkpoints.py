"""`engrid checkpoint`: save, restore, verify and list checkpoints by hand. Needs neither Ray nor torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import RunDir, path_option

if TYPE_CHECKING:
    from engrid.storage.checkpoint import Checkpoints

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
    folder: Folder = DEFAULT_FOLDER,
    run_dir: RunDir = None,
) -> None:
    """Save a run's live tables at the step they stand at. Not while it trains: `engrid train --checkpoint-every` is for that."""
    from engrid.client import MemoryClient
    from engrid.client.checkpoints import CheckpointSave, check_folder, live_states
    from engrid.rpc.errors import BadRequestError

    from .cli import console, told, where
    from .status import members

    with told(), MemoryClient(members(where(run_dir))[0]) as client:
        states = [state for state in live_states(client) if state.table.startswith(f"{run}.engram.")]
        stands = {(state.run, state.attempt, state.step) for state in states}
        if len(stands) != 1:
            known = "; ".join(f"run {each[0] or '-'}, attempt {each[1]}, step {each[2]}" for each in sorted(stands))
            raise BadRequestError(
                f"tables of run {run} stand at different steps ({known}); save again"
                if stands
                else f"no tables of run {run}"
            )
        identity, attempt, step = stands.pop()
        check_folder(client, folder)
        tables = sorted({state.table for state in states})
        begun = CheckpointSave(client, folder, run=identity, attempt=attempt, step=step, tables=tables)
        manifest = begun.finish({}, {})
        console.print(f"{folder / manifest.name}: rows and optimizer state of {', '.join(tables)}", highlight=False)
        console.print("no dense weights are in it: it can be restored, not served or trained on", style="dim")


@app.command()
def restore(
    name: Annotated[str | None, typer.Argument(help="Of the checkpoint.", show_default="the newest")] = None,
    folder: Folder = DEFAULT_FOLDER,
    run_dir: RunDir = None,
) -> None:
    """Put a checkpoint's rows and optimizer state into the live tables, over the shards there are now."""
    from engrid.client import MemoryClient
    from engrid.client.attempts import newest_attempt
    from engrid.client.checkpoints import restore_tables
    from engrid.storage.errors import CheckpointMissingError

    from .cli import console, told, where
    from .status import members

    with told(), MemoryClient(members(where(run_dir))[0]) as client:
        checkpoints = _open(folder)
        chain = checkpoints.chain(name) if name else checkpoints.latest()
        if not chain:
            raise CheckpointMissingError(f"{folder} holds no complete checkpoint")
        manifest = chain[-1]
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
    from .cli import console, errors, told

    with told():
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

    from engrid.storage.errors import CheckpointError

    from .cli import console, told

    with told():
        checkpoints = _open(folder)
        table = Table("name", "run", "step", "attempt", "rows", "model", "MiB", box=None)
        for name in checkpoints.names():
            try:
                manifest = checkpoints.chain(name)[-1]
            except CheckpointError as error:
                table.add_row(name, f"[red]{error}[/red]")
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
