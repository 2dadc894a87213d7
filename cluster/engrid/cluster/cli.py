"""The command line. Nothing of ours, Ray or torch is imported until a command needs it."""

from __future__ import annotations

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the working folder: a random.py or queue.py that lies there is not ours

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from . import bench, checkpoints, interrupts
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


def main() -> None:
    """Runs the CLI; SIGTERM ends it as Ctrl-C does, so that what it started is stopped."""
    interrupts.handle()
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
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except BaseException as error:
        if not interrupts.pressed():
            raise
        errors.print("stopped", style="yellow")
        raise typer.Exit(interrupts.INTERRUPTED) from error


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
        kept = owner_of(state) if state is not None and name is None else ""
        serve(
            ShardConfig(
                name=name or kept or f"shard-{os.getpid() if port == '0' else port}",
                listen=listen,
                advertise_host=advertise_host,
                directory=redis if redis is not None else folder_source(where(run_dir)),
                memory_bytes=int(memory * (1 << 30)) if memory is not None else None,
                state=state,
                checkpoints=tuple(checkpoints or ()),
                log_bytes=log_bytes if log_bytes is not None else ShardConfig.log_bytes,
            )
        )


@app.command()
def train(
    out: Annotated[Path, path_option("Folder for corpus and checkpoint, seen by all workers.")] = Path("engrid-run"),
    run: Annotated[
        str | None, typer.Option(help="Name of the run; its tables carry it.", show_default="default")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps to train.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences per worker and step.")] = None,
    learning_rate: Annotated[float | None, number_option("Peak, of the dense weights.", 1e-30, 1e3)] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, rows and data order.")] = None,
    memory: Annotated[str | None, typer.Option(help="remote, in_process, or off (no Engram).")] = None,
    text: Annotated[
        Path | None, path_option("Folder of *.py files to train on.", show_default="Python's standard library")
    ] = None,
    staleness: Annotated[
        int | None, typer.Option(help="Steps by which rows may lag; 0: synchronous, -1: any.", show_default="0")
    ] = None,
    durable: Annotated[
        bool | None, typer.Option("--durable", help="Each step is on the shards' disks before the next.")
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps from one checkpoint to the next while training.", show_default="none")
    ] = None,
    full_every: Annotated[
        int | None, typer.Option(help="Checkpoints from one of all rows to the next; between them: what changed.")
    ] = None,
    keep: Annotated[int | None, typer.Option(help="Checkpoints that stay; 0: all.", show_default="3")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,  # noqa: FBT002
    config: Annotated[Path | None, path_option("A TrainConfig as JSON; the options above win over it.")] = None,
    run_dir: RunDir = None,
) -> None:
    """Train the demo model on all workers of the cluster."""
    from .config import require_cluster
    from .train import read_config, train_with_progress

    with told():
        given: dict[str, Any] = {
            "steps": steps,
            "batch": batch,
            "learning_rate": learning_rate,
            "seed": seed,
            "memory": memory,
            "text": str(text.resolve()) if text else None,
            "staleness": staleness,
            "durable": durable,
            "checkpoint_every": checkpoint_every,
            "full_every": full_every,
            "keep": keep,
        }
        training = read_config(config, out=str(out.resolve()), run=run, resume=resume, **given)
        record = require_cluster(where(run_dir))
        result = train_with_progress(record, training, console)
        console.print(
            f"validation loss {result['validation_loss']:.4f} after {result['steps']} steps, "
            f"{result['tokens_per_second']:,.0f} tokens/s, exposed wait {1e3 * result['exposed_wait']:.1f} ms a step",
            highlight=False,
        )
        if "checkpoint" in result:
            console.print(f"checkpoint in {result['checkpoint']}", highlight=False)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    checkpoint: Annotated[Path, path_option("Checkpoint to load, or the folder of a run's.")] = Path(
        "engrid-run/checkpoint"
    ),
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
    from .generate import open_model, stream

    with told():
        record = require_cluster(where(run_dir))
        with open_model(record, checkpoint.resolve()) as worker:
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
                + (f"; {totals.accepted_tokens} of {totals.drafted_tokens} drafted tokens accepted" if draft else ""),
                style="dim",
                highlight=False,
            )


@app.command()
def publish(
    checkpoint: Annotated[Path, path_argument("A checkpoint, or the folder of a run's: its newest.")],
    run_dir: RunDir = None,
) -> None:
    """Make a checkpoint the version of its run that new readers get; who reads another one keeps it."""
    with told():
        from .versions import publish as publish_checkpoint

        run, version, dropped = publish_checkpoint(where(run_dir), checkpoint)
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
    tokenizer: Annotated[Path | None, path_option("A tokenizer.json.", show_default="DeepSeek's")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,  # noqa: FBT002
) -> None:
    """Print token ids, canonical ids and row ids of a text, to check another implementation against."""
    from .ids import print_ids

    with told():
        print_ids(text, preset=preset, layer=layer, tokenizer=tokenizer, as_json=as_json, console=console)


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
