"""`engrid shard`: one shard in this process, without Ray."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .console import report_errors, run_directory
from .options import MOST_GIB, CheckpointFolders, Redis, RunDir, number_option, path_option


def shard(
    name: Annotated[
        str | None,
        typer.Option(
            help="Unique name in the directory.",
            show_default="that of --state, else shard-PORT, or shard-PID for port 0",
        ),
    ] = None,
    listen: Annotated[str, typer.Option(help="HOST:PORT; port 0 for any free one.")] = "127.0.0.1:0",
    advertise_host: Annotated[
        str | None,
        typer.Option(
            help="Host others reach us by.", show_default="that of --listen; for 0.0.0.0 and [::], this host's"
        ),
    ] = None,
    redis: Redis = None,
    memory: Annotated[
        float | None,
        number_option("GiB of rows and optimizer state.", 1e-6, MOST_GIB, show_default="80 % of what is free"),
    ] = None,
    state: Annotated[
        Path | None, path_option("Folder of its log and rows, from which it goes on when started again.")
    ] = None,
    log_bytes: Annotated[
        int | None,
        typer.Option(help="Log to replay at most.", min=1, max=1 << 62, show_default="2 GiB", metavar="BYTES"),
    ] = None,
    checkpoints: CheckpointFolders = None,
    run_dir: RunDir = None,
) -> None:
    """Run one shard in this process, without Ray."""
    from engrid.directory import folder_source
    from engrid.shard.__main__ import serve
    from engrid.shard.config import ShardConfig
    from engrid.shard.journal.state_folder import owner_of

    with report_errors():
        port = listen.rpartition(":")[2]
        if name is None:
            name = owner_of(state) if state is not None else ""
            name = name or f"shard-{os.getpid() if port == '0' else port}"
        serve(
            ShardConfig(
                name=name,
                listen=listen,
                advertise_host=advertise_host,
                directory=redis if redis is not None else folder_source(run_directory(run_dir)),
                memory_bytes=int(memory * (1 << 30)) if memory is not None else None,
                state=state,
                checkpoints=tuple(checkpoints or ()),
                log_bytes=log_bytes if log_bytes is not None else ShardConfig.log_bytes,
            )
        )
