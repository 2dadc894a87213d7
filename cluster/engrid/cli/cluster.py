"""`engrid up`, `down`, `status`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from .console import command, console, report_errors, run_directory
from .options import Address, CheckpointFolders, Memory, Redis, RunDir, Shards, Timeout, Workers


def up(
    shards: Shards = 2,
    workers: Workers = 1,
    memory: Memory = None,
    address: Address = None,
    redis: Redis = None,
    checkpoints: CheckpointFolders = None,
    timeout: Timeout = 120.0,
    run_dir: RunDir = None,
) -> None:
    """Start shards and workers on Ray; return when all are healthy."""
    from engrid.cluster.config import ClusterConfig
    from engrid.cluster.launch import up as launch

    with report_errors():
        config = ClusterConfig(
            run_dir=run_directory(run_dir),
            shards=shards,
            workers=workers,
            memory_gib=memory,
            address=address,
            redis=redis,
            checkpoints=tuple(checkpoints or ()),
            timeout=timeout,
        )
        with console.status("starting") as status:
            record = launch(config, status.update)
        for name, at in {**record.shards, **record.workers}.items():
            console.print(f"{name:<10} {at}", highlight=False)
        console.print(f"up; stop it with: {command('down', run_dir)}", highlight=False, soft_wrap=True)


def down(
    keep_rows: Annotated[  # noqa: FBT002
        bool,
        typer.Option("--keep-rows", help="Leave the shards' rows on disk; the next `engrid up` goes on from them."),
    ] = False,
    run_dir: RunDir = None,
) -> None:
    """Stop what `engrid up` started, and nothing else. Live rows that no checkpoint holds are discarded."""
    from engrid.cluster.stop import down as stop

    with report_errors():
        with console.status("stopping"):
            stopped = stop(run_directory(run_dir), keep_rows=keep_rows)
        say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
        if not stopped.parts and not stopped.kept and not stopped.discarded_kept:
            say(f"no cluster is up in {run_directory(run_dir)}")
            return
        if stopped.parts:
            say(f"stopped {', '.join(stopped.parts)}")
        tables = ", ".join(f"{name} at step {step}" for name, step in stopped.tables.items())
        if stopped.kept:
            say(f"kept {tables or 'what the shards hold'}; go on with: {command('up', run_dir)}")
        elif tables:
            say(f"discarded {tables}; checkpoints are not touched, and --keep-rows would have kept the rows")
        elif stopped.discarded_kept:
            say("discarded the rows that were kept")
        for name, process in stopped.by_hand.items():
            say(f"{name} was started by hand and goes on, its state folder too; stop it with: kill {process}")


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every second until Ctrl-C.")] = False,  # noqa: FBT002
    run_dir: RunDir = None,
) -> None:
    """Show shards, workers and tables."""
    from engrid.cluster.status import show_status

    with report_errors():
        show_status(run_directory(run_dir), console, watch=watch)
