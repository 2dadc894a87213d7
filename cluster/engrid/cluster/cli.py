"""The command line. Nothing of ours, Ray or torch is imported until a command needs it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import bench, checkpoints, interrupts, train_command

app = typer.Typer(
    name="engrid",
    help="A distributed memory for Engram tables: shards hold the rows, workers train and generate over gRPC.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench.app)
app.add_typer(checkpoints.app)
console = Console()
errors = Console(stderr=True)

RunDir = Annotated[
    Path | None,
    typer.Option(help="Folder of the cluster's record and directory.", show_default="~/.local/state/engrid"),
]


def main() -> None:
    """Runs the CLI; SIGTERM ends it as Ctrl-C does, so that what it started is stopped."""
    interrupts.handle()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks is shown as its number
    try:
        app()
    finally:
        if interrupts.pressed():
            interrupts.leave()


@contextmanager
def told() -> Iterator[None]:
    """Our errors in one red line, exit code 1; Ctrl-C is 130. Anything else is a bug and keeps its traceback."""
    from engrid.directory import DirectoryError
    from engrid.rpc.errors import EngridError

    from .config import ClusterError

    try:
        yield
    except (EngridError, DirectoryError, ClusterError, ValueError, OSError) as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    except BaseException as error:
        if not interrupts.pressed():
            raise
        errors.print("stopped", style="yellow")
        raise typer.Exit(interrupts.INTERRUPTED) from error


def where(run_dir: Path | None) -> Path:
    """The run directory asked for, or the default."""
    from .config import default_run_dir

    return run_dir or default_run_dir()


@app.command()
def up(
    shards: Annotated[int, typer.Option(help="Memory shards to start.")] = 2,
    workers: Annotated[int, typer.Option(help="Compute workers to start.")] = 1,
    memory: Annotated[
        float | None,
        typer.Option(help="GiB of rows and optimizer state per shard.", show_default="half of what is free"),
    ] = None,
    address: Annotated[str | None, typer.Option(help="Join this Ray cluster (host:port, or auto).")] = None,
    redis: Annotated[str | None, typer.Option(help="Directory for several hosts: redis://HOST:PORT.")] = None,
    run_dir: RunDir = None,
) -> None:
    """Start shards and workers on Ray; return when all are healthy."""
    from .config import ClusterConfig
    from .launch import up as launch

    with told():
        config = ClusterConfig(
            run_dir=where(run_dir), shards=shards, workers=workers, memory_gib=memory, address=address, redis=redis
        )
        with console.status("starting") as status:
            record = launch(config, status.update)
        for name, at in {**record.shards, **record.workers}.items():
            console.print(f"{name:<10} {at}", highlight=False)
        console.print(f"up; stop it with: engrid down{f' --run-dir {run_dir}' if run_dir else ''}", highlight=False)


@app.command()
def down(run_dir: RunDir = None) -> None:
    """Stop what `engrid up` started, and nothing else."""
    from .launch import down as stop

    with told():
        with console.status("stopping"):
            stopped = stop(where(run_dir))
        console.print(f"stopped {', '.join(stopped)}" if stopped else f"no cluster is up in {where(run_dir)}")


@app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every second until Ctrl-C.")] = False,  # noqa: FBT002
    run_dir: RunDir = None,
) -> None:
    """Show shards, workers and tables."""
    from .status import show_status

    with told():
        show_status(where(run_dir), console, watch=watch)


@app.command()
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
        str | None, typer.Option(help="Host others reach us by, for --listen 0.0.0.0:PORT.")
    ] = None,
    redis: Annotated[str | None, typer.Option(help="Directory for several hosts: redis://HOST:PORT.")] = None,
    memory: Annotated[
        float | None, typer.Option(help="GiB of rows and optimizer state.", show_default="80 % of what is free")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Folder of its log and rows, from which it goes on when started again.")
    ] = None,
    log_bytes: Annotated[
        int | None, typer.Option(help="Log to replay at most.", show_default="2 GiB", metavar="BYTES")
    ] = None,
    run_dir: RunDir = None,
) -> None:
    """Run one shard in this process, without Ray."""
    from engrid.shard.__main__ import serve
    from engrid.shard.config import ShardConfig
    from engrid.shard.state_folder import owner_of

    with told():
        port = listen.rpartition(":")[2]
        kept = owner_of(state) if state is not None and name is None else ""
        serve(
            ShardConfig(
                name=name or kept or f"shard-{os.getpid() if port == '0' else port}",
                listen=listen,
                advertise_host=advertise_host,
                directory=redis or f"file:{where(run_dir).resolve()}",
                memory_bytes=int(memory * (1 << 30)) if memory is not None else None,
                state=state,
                log_bytes=log_bytes if log_bytes is not None else ShardConfig.log_bytes,
            )
        )


app.command()(train_command.train)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Checkpoint to load, or the folder of a run's.", show_default="engrid-run/checkpoint"),
    ] = None,
    run: Annotated[str, typer.Option(help="Load the published version of this run instead.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="At most this many; 0 fills the context.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    draft: Annotated[int, typer.Option(min=0, help="Guess so many tokens ahead; greedy only. 0: off.")] = 0,
    run_dir: RunDir = None,
) -> None:
    """Continue a prompt on a compute worker, rows fetched from the shards."""
    from .config import require_cluster
    from .generate import argument_text, open_model, stream

    with told():
        prompt = argument_text(prompt)
        if run and checkpoint is not None:
            raise ValueError("give --run (what is published) or --checkpoint (that one), not both")
        chosen = None if run else (checkpoint or Path("engrid-run/checkpoint")).expanduser().resolve()
        record = require_cluster(where(run_dir))
        with open_model(record, chosen, run) as worker:
            console.print(prompt, end="", style="bold", markup=False, highlight=False, soft_wrap=True)
            totals = stream(
                worker,
                prompt,
                lambda text: console.print(text, end="", markup=False, highlight=False, soft_wrap=True),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                draft_tokens=draft,
            )
            console.print()
            rate = (totals.new_tokens - 1) / totals.decode_time if totals.new_tokens > 1 else 0.0
            console.print(
                f"{totals.new_tokens} tokens, {rate:.1f} a second; {totals.rows_fetched} rows "
                f"({totals.bytes_fetched} bytes) fetched, {totals.rows_here} found on this host, {1e3 * totals.exposed_wait:.1f} ms waited for them"
                + (f"; {totals.accepted_tokens} of {totals.drafted_tokens} drafted tokens accepted" if draft else "")
                + f"; model {worker.model}",
                style="dim",
                highlight=False,
            )


@app.command()
def publish(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run's: its newest.")],
    run: Annotated[
        str | None, typer.Option(help="Name to publish it under.", show_default="that of the checkpoint's run")
    ] = None,
    run_dir: RunDir = None,
) -> None:
    """Make a checkpoint the version of its run that new readers get; who reads another one keeps it."""
    with told():
        from .versions import publish as publish_checkpoint

        run, version, dropped = publish_checkpoint(where(run_dir), checkpoint.expanduser(), run)
        console.print(f"version {version} of run {run} is current", highlight=False)
        if dropped:
            console.print(f"dropped {', '.join(dropped)}", style="dim", highlight=False)


@app.command()
def versions(
    rollback: Annotated[
        str | None, typer.Option(help="Make the version before the current one of this run current.")
    ] = None,
    to: Annotated[str, typer.Option(help="With --rollback: the version to go back to.")] = "",
    prune: Annotated[str | None, typer.Option(help="Drop versions of this run that nobody reads.")] = None,
    run_dir: RunDir = None,
) -> None:
    """Show what is published and loaded, go back to an earlier version, or drop unused ones."""
    with told():
        from .versions import prune as prune_run
        from .versions import roll_back, show_versions

        if rollback is not None:
            name = roll_back(where(run_dir), rollback, to)
            console.print(f"version {name} of run {rollback} is current again", highlight=False)
        if prune is not None:
            dropped = prune_run(where(run_dir), prune)
            console.print(f"dropped {', '.join(dropped) or 'nothing'}", highlight=False)
        show_versions(where(run_dir), console)


@app.command()
def ids(
    text: Annotated[str, typer.Argument(help="Text to hash.")],
    layer: Annotated[int, typer.Option(help="Engram layer, as configured.")],
    preset: Annotated[str, typer.Option(help="Published shape: demo or v41.")] = "demo",
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json.", show_default="DeepSeek's")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,  # noqa: FBT002
) -> None:
    """Print token ids, canonical ids and row ids of a text, to check another implementation against."""
    from .ids import print_ids

    with told():
        print_ids(text, preset=preset, layer=layer, tokenizer=tokenizer, as_json=as_json, console=console)


@app.command()
def demo(
    steps: Annotated[int | None, typer.Option(help="Training steps of each of the two models.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for corpus, checkpoint, table and picture.")] = Path("demo"),
    shards: Annotated[int, typer.Option(help="Memory shards.")] = 2,
    workers: Annotated[int, typer.Option(help="Compute workers.")] = 1,
    seed: Annotated[int, typer.Option(help="Of weights, rows and data order.")] = 0,
    address: Annotated[str | None, typer.Option(help="Join this Ray cluster instead of starting one.")] = None,
    redis: Annotated[str | None, typer.Option(help="Directory for several hosts.")] = None,
) -> None:
    """The main job from start to end: train with and without Engram over real shards, generate, compare."""
    from .config import ClusterConfig
    from .demo import run_demo

    with told():
        out.mkdir(parents=True, exist_ok=True)
        config = ClusterConfig(
            run_dir=out.resolve() / "run", shards=shards, workers=workers, address=address, redis=redis
        )
        run_demo(config, out.resolve(), steps=steps, seed=seed, console=console)


if __name__ == "__main__":
    main()
