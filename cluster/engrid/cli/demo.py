"""`engrid demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import console, report_errors
from .options import MOST_SHARDS, Address, Redis, Shards, path_option


def demo(
    steps: Annotated[
        int | None, typer.Option(min=1, max=2**31, help="Training steps of each of the two models.", show_default="250")
    ] = None,
    out: Annotated[Path, path_option("Folder for corpus, checkpoint, table and picture.")] = Path("demo"),
    shards: Shards = 2,
    workers: Annotated[int, typer.Option(min=1, max=MOST_SHARDS, help="Compute workers to start.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Of weights, rows and data order.")] = 0,
    address: Address = None,
    redis: Redis = None,
) -> None:
    """The main job from start to end: train with and without Engram over real shards, generate, compare."""
    from engrid.cluster.config import ClusterConfig
    from engrid.demo.run import run_demo

    with report_errors():
        out.mkdir(parents=True, exist_ok=True)
        config = ClusterConfig(
            run_dir=out.resolve() / "run",
            shards=shards,
            workers=workers,
            address=address,
            redis=redis,
            checkpoints=(out.resolve(),),
        )
        run_demo(config, out.resolve(), steps=steps, seed=seed, console=console)
