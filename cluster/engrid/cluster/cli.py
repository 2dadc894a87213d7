"""The command line. Nothing of ours, Ray or torch is imported until a command needs it."""

from __future__ import annotations

import sys

from engrid.rpc.search_path import look_last_in_the_working_folder

look_last_in_the_working_folder()
if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the working folder: a random.py or queue.py that lies there is not ours

import io
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from . import bench, checkpoints, interrupts, train_command
from .options import (
    MOST_GIB,
    MOST_SHARDS,
    Address,
    CheckpointFolders,
    Memory,
    Redis,
    RunDir,
    Shards,
    Timeout,
    Workers,
    number_option,
    path_argument,
    path_option,
)
from .terminal import Terminal

app = typer.Typer(
    name="engrid",
    help="A distributed memory for Engram tables: shards hold the rows, workers train and generate over gRPC.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench.app)
app.add_typer(checkpoints.app)
console = Terminal()
errors = Terminal(stderr=True)


def main() -> None:
    """Runs the CLI; SIGTERM ends it as Ctrl-C does, so that what it started is stopped."""
    interrupts.handle()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks is shown as its number
    try:
        app()
    except ImportError as error:
        from .extras import words_for_import

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


@contextmanager
def told() -> Iterator[None]:
    """Our errors in one red line, exit code 1; Ctrl-C is 130. Anything else is a bug and keeps its traceback."""
    from engrid.directory import DirectoryError
    from engrid.rpc.errors import EngridError

    from .config import ClusterError

    try:
        yield
    except (EngridError, DirectoryError, ClusterError, ValueError, OSError) as error:
        errors.print(f"error: {words_of(error)}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except BaseException as error:
        if not interrupts.pressed():
            raise
        errors.print("stopped", style="yellow")
        raise typer.Exit(interrupts.INTERRUPTED) from error


def words_of(error: Exception) -> str:
    """What the error says; of a working folder that was removed the system names nothing."""
    if isinstance(error, FileNotFoundError) and error.filename is None:
        try:
            Path.cwd()
        except FileNotFoundError:
            return "the working folder is gone; go to one that is there, or give absolute paths"
    return str(error)


def command(words: str, run_dir: Path | None) -> str:
    """A command to type next, for the same run directory."""
    return f"engrid {words}" + (f" --run-dir {shlex.quote(str(run_dir))}" if run_dir else "")


def where(run_dir: Path | None) -> Path:
    """The run directory asked for, or the default."""
    from .config import default_run_dir

    return run_dir or default_run_dir()


@app.command()
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
    from .config import ClusterConfig
    from .launch import up as launch

    with told():
        config = ClusterConfig(
            run_dir=where(run_dir),
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


@app.command()
def down(
    keep_rows: Annotated[  # noqa: FBT002
        bool,
        typer.Option("--keep-rows", help="Leave the shards' rows on disk; the next `engrid up` goes on from them."),
    ] = False,
    run_dir: RunDir = None,
) -> None:
    """Stop what `engrid up` started, and nothing else. Live rows that no checkpoint holds are discarded."""
    from .stop import down as stop

    with told():
        with console.status("stopping"):
            stopped = stop(where(run_dir), keep_rows=keep_rows)
        say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
        if not stopped.parts and not stopped.kept and not stopped.discarded_kept:
            say(f"no cluster is up in {where(run_dir)}")
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
    from engrid.shard.state_folder import owner_of

    with told():
        port = listen.rpartition(":")[2]
        if name is None:
            name = owner_of(state) if state is not None else ""
            name = name or f"shard-{os.getpid() if port == '0' else port}"
        serve(
            ShardConfig(
                name=name,
                listen=listen,
                advertise_host=advertise_host,
                directory=redis if redis is not None else folder_source(where(run_dir)),
                memory_bytes=int(memory * (1 << 30)) if memory is not None else None,
                state=state,
                checkpoints=tuple(checkpoints or ()),
                log_bytes=log_bytes if log_bytes is not None else ShardConfig.log_bytes,
            )
        )


app.command()(train_command.train)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    checkpoint: Annotated[
        Path | None,
        path_option("Checkpoint to load, or the folder of a run's.", show_default="engrid-run/checkpoint"),
    ] = None,
    run: Annotated[str, typer.Option(help="Load the published version of this run instead.")] = "",
    max_new_tokens: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="At most this many; 0 fills the context.")
    ] = 64,
    temperature: Annotated[float, number_option("0 is greedy.", 0, 1e6)] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling.")] = 0,
    draft: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="Guess so many tokens ahead; greedy only. 0: off.")
    ] = 0,
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
    checkpoint: Annotated[Path, path_argument("A checkpoint, or the folder of a run's: its newest.")],
    run: Annotated[
        str | None, typer.Option(help="Name to publish it under.", show_default="that of the checkpoint's run")
    ] = None,
    run_dir: RunDir = None,
) -> None:
    """Make a checkpoint the version of its run that new readers get; who reads another one keeps it."""
    with told():
        from .versions import publish as publish_checkpoint

        run, version, dropped = publish_checkpoint(where(run_dir), checkpoint, run)
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

        if to and rollback is None:
            raise ValueError(f"--to {to} needs --rollback RUN")
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
    preset: Annotated[
        str | None, typer.Option(help="A published shape: paper, or v41 (DeepSeek-V4.1).", show_default="paper")
    ] = None,
    checkpoint: Annotated[
        Path | None, path_option("Shape and tokenizer of this checkpoint, or of the newest in the folder of a run's.")
    ] = None,
    tokenizer: Annotated[Path | None, path_option("A tokenizer.json.", show_default="DeepSeek's")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,  # noqa: FBT002
) -> None:
    """Print token ids, canonical ids and row ids of a text, to check another implementation against."""
    from .generate import argument_text
    from .ids import of_checkpoint, of_preset, print_ids

    with told():
        if checkpoint is not None and (preset is not None or tokenizer is not None):
            raise ValueError(
                "a checkpoint has its own shape and tokenizer: give --checkpoint alone, or --preset and --tokenizer"
            )
        hashing = of_checkpoint(checkpoint) if checkpoint is not None else of_preset(preset or "paper", tokenizer)
        print_ids(argument_text(text), hashing, layer=layer, as_json=as_json, console=console)


@app.command()
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
    from .config import ClusterConfig
    from .demo import run_demo

    with told():
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


if __name__ == "__main__":
    main()
