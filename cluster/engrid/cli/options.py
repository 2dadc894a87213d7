"""Values of options, checked before a command runs. A shell variable that is not set leaves an empty one, which is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

MOST_SHARDS = 4096
"""Also of workers."""
MOST_GIB = 1 << 20


def read_path(text: str | Path) -> Path:
    """The path with ~ expanded."""
    given = str(text)
    if not given or "\0" in given:
        raise typer.BadParameter("the path is empty")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", given):
        from engrid.directory import masked

        shown = masked(given)
        raise typer.BadParameter(f"{shown} is an address and no path; for a folder of that name give ./{shown}")
    if not given.startswith("~"):
        return Path(given)
    from engrid.directory import expand_home

    try:
        return expand_home(Path(given))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def read_redis(text: str) -> str:
    """A URL of Redis."""
    from engrid.directory import redis_url

    try:
        return redis_url(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def path_option(help_text: str, *names: str, **more: Any) -> Any:
    """An option that takes a path."""
    return typer.Option(*names, help=help_text, parser=read_path, metavar="PATH", **more)


def path_argument(help_text: str, **more: Any) -> Any:
    """An argument that is a path."""
    return typer.Argument(help=help_text, parser=read_path, metavar="PATH", **more)


def number_option(help_text: str, least: float, most: float, **more: Any) -> Any:
    """An option that takes a finite number from `least` to `most`."""
    return typer.Option(help=help_text, parser=_finite(least, most), metavar="NUMBER", **more)


def _finite(least: float, most: float) -> Callable[[str | float], float]:
    def read(text: str | float) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise typer.BadParameter(f"{text!r} is no number from {least:g} to {most:g}")
        return number

    return read


CheckpointFolders = Annotated[
    list[Path] | None,
    path_option(
        "Folder in which clients may have checkpoints written and read; may be given again.",
        show_default="the working directory",
    ),
]
RunDir = Annotated[
    Path | None,
    path_option("Folder of the cluster's record and directory.", show_default="~/.local/state/engrid"),
]
Redis = Annotated[
    str | None,
    typer.Option(
        help="Directory for several hosts: redis://[USER:PASSWORD@]HOST:PORT[/DB][?prefix=NAME].",
        parser=read_redis,
        envvar="ENGRID_REDIS",  # other users see a command line, and so a password in it
        metavar="URL",
    ),
]
Memory = Annotated[
    float | None,
    number_option("GiB of rows and optimizer state per shard.", 1e-6, MOST_GIB, show_default="half of what is free"),
]
Shards = Annotated[int, typer.Option(min=1, max=MOST_SHARDS, help="Memory shards to start.")]
Workers = Annotated[int, typer.Option(min=0, max=MOST_SHARDS, help="Compute workers to start.")]
Address = Annotated[str | None, typer.Option(help="Join this Ray cluster instead of starting one: HOST:PORT, or auto.")]
Timeout = Annotated[float, number_option("Seconds it may take.", 0.1, 86_400)]
