"""`engrid bench`: starts the benchmarks of a source checkout, which are not part of the package."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import report_errors
from .options import path_option

app = typer.Typer(
    name="bench",
    help="Measure lookups, the model and other systems on this machine. Needs a source checkout.",
    no_args_is_help=True,
)

ROOT = Path(__file__).parents[3]

Repeats = Annotated[int, typer.Option(min=1, help="Times everything is measured, in turn.")]
Quick = Annotated[bool, typer.Option("--quick", help="A smoke run of seconds; its figures mean nothing.")]


def out(name: str) -> Any:
    """The option for the JSON file of a subcommand."""
    return path_option("JSON file; the picture is written beside it.", "--json", show_default=f"build/{name}.json")


def run(name: str, json: Path | None, **options: Any) -> None:
    """Runs benchmarks/NAME.py of the checkout these sources lie in."""

    # gRPC's fork handlers would warn at each process that Ray starts while our channels are open.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    with report_errors():
        if not (ROOT / "benchmarks" / f"{name}.py").is_file():
            raise ValueError(
                "engrid bench needs a source checkout (pip install -e .): the benchmarks are not in the package"
            )
        sys.path.insert(0, str(ROOT))
        importlib.import_module(f"benchmarks.{name}").run(json or Path("build", f"{name}.json"), **options)


@app.command()
def lookup(
    json: Annotated[Path | None, out("lookup")] = None,
    repeats: Repeats = 5,
    quick: Quick = False,  # noqa: FBT002
) -> None:
    """Lookups by size, width, shards and clients, beside a raw socket, a naive path and an in-process gather."""
    run("lookup", json, repeats=repeats, quick=quick)


@app.command()
def peers(
    json: Annotated[Path | None, out("peers")] = None,
    repeats: Repeats = 5,
    quick: Quick = False,  # noqa: FBT002
) -> None:
    """Lookups beside Redis, a Ray actor and Mooncake; pip install -e '.[peers]'."""
    run("peers", json, repeats=repeats, quick=quick)


@app.command()
def model(
    json: Annotated[Path | None, out("model")] = None,
    repeats: Repeats = 5,
    quick: Quick = False,  # noqa: FBT002
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
) -> None:
    """The demo model's tokens/s over remote rows and over tables in its own process."""
    run("model", json, repeats=repeats, quick=quick, threads=threads)


@app.command()
def marks(
    group: Annotated[str, typer.Option(help="Which marks: data or train.")] = "data",
    json: Annotated[Path | None, out("marks")] = None,
    repeats: Repeats = 5,
    quick: Quick = False,  # noqa: FBT002
) -> None:
    """Figures that have an aim, and whether it is met; some minutes."""
    run("marks", json, group=group, repeats=repeats, quick=quick)
