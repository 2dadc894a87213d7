"""The command line. Nothing of ours, Ray or torch is imported until a command needs it."""

from __future__ import annotations

import sys

from engrid.host.search_path import look_last_in_the_working_folder

look_last_in_the_working_folder()
if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the working folder: a random.py or queue.py that lies there is not ours

import io
from typing import Annotated

import typer

from engrid.cluster import interrupts

from . import bench, checkpoints, cluster, demo, generate, ids, shard, train, versions
from .console import errors

app = typer.Typer(
    name="engrid",
    help="A distributed memory for Engram tables: shards hold the rows, workers train and generate over gRPC.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench.app)
app.add_typer(checkpoints.app)
for function in (
    *(cluster.up, cluster.down, cluster.status, shard.shard, train.train, generate.generate),
    *(versions.publish, versions.versions, ids.ids, demo.demo),
):
    app.command()(function)


def main() -> None:
    """Runs the CLI; SIGTERM ends it as Ctrl-C does, so that what it started is stopped."""
    interrupts.handle()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks is shown as its number
    try:
        app()
    except ImportError as error:
        from engrid.cluster.extras import words_for_import

        words = words_for_import(error)
        if words is None:
            raise
        errors.print(f"error: {words}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    finally:
        if interrupts.pressed():
            interrupts.leave()


def _show_version(asked: bool) -> None:  # noqa: FBT001 - Typer's call
    if asked:
        from importlib.metadata import version

        typer.echo(f"engrid {version('engrid')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[  # noqa: FBT002
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """A distributed memory for Engram tables: shards hold the rows, workers train and generate over gRPC."""


if __name__ == "__main__":
    main()
