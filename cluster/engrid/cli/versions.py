"""`engrid publish`, `engrid versions`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import console, report_errors, run_directory
from .options import RunDir, path_argument


def publish(
    checkpoint: Annotated[Path, path_argument("A checkpoint, or the folder of a run's: its newest.")],
    run: Annotated[
        str | None, typer.Option(help="Name to publish it under.", show_default="that of the checkpoint's run")
    ] = None,
    run_dir: RunDir = None,
) -> None:
    """Make a checkpoint the version of its run that new readers get; who reads another one keeps it."""
    with report_errors():
        from engrid.cluster.versions import publish as publish_checkpoint

        run, version, dropped = publish_checkpoint(run_directory(run_dir), checkpoint, run)
        console.print(f"version {version} of run {run} is current", highlight=False)
        if dropped:
            console.print(f"dropped {', '.join(dropped)}", style="dim", highlight=False)


def versions(
    rollback: Annotated[
        str | None, typer.Option(help="Make the version before the current one of this run current.")
    ] = None,
    to: Annotated[str, typer.Option(help="With --rollback: the version to go back to.")] = "",
    prune: Annotated[str | None, typer.Option(help="Drop versions of this run that nobody reads.")] = None,
    run_dir: RunDir = None,
) -> None:
    """Show what is published and loaded, go back to an earlier version, or drop unused ones."""
    with report_errors():
        from engrid.cluster.versions import prune as prune_run
        from engrid.cluster.versions import roll_back, show_versions

        if to and rollback is None:
            raise ValueError(f"--to {to} needs --rollback RUN")
        if rollback is not None:
            name = roll_back(run_directory(run_dir), rollback, to)
            console.print(f"version {name} of run {rollback} is current again", highlight=False)
        if prune is not None:
            dropped = prune_run(run_directory(run_dir), prune)
            console.print(f"dropped {', '.join(dropped) or 'nothing'}", highlight=False)
        show_versions(run_directory(run_dir), console)
