"""The command `engrid train`: its options, and what it says at the end."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engrid.cluster import interrupts

from .console import command, console, errors, report_errors, run_directory
from .options import RunDir, number_option, path_option

if TYPE_CHECKING:
    from engrid.worker.config import TrainConfig


def _numbers(text: str | None) -> list[int] | None:
    """What "1,2" holds."""
    if text is None:
        return None
    try:
        return [int(each) for each in text.replace("_", "").split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r}: give whole numbers with commas between them, as 1,2") from None


def train(
    out: Annotated[
        Path | None, path_option("Folder for corpus and checkpoint, seen by all workers.", show_default="engrid-run")
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Name of the run; its tables carry it.", show_default="default")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps to train.", show_default="300")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences per worker and step.", show_default="8")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per sequence.", show_default="256")] = None,
    learning_rate: Annotated[
        float | None, number_option("Peak, of the dense weights.", 1e-30, 1e3, show_default="0.003")
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps to the peak.", show_default="20")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, rows and data order.", show_default="0")] = None,
    memory: Annotated[str | None, typer.Option(help="remote, in_process, or off (no Engram).")] = None,
    text: Annotated[
        list[Path] | None,
        path_option(
            'Folder or file to train on: .py, .txt, .md, or .jsonl with a "text" per line. Again for more.',
            show_default="Python's standard library",
        ),
    ] = None,
    staleness: Annotated[
        int | None, typer.Option(help="Steps by which rows may lag; 0: synchronous, -1: any.", show_default="0")
    ] = None,
    durable: Annotated[
        bool | None, typer.Option("--durable", help="Each step is on the shards' disks before the next.")
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option(help="Points of the validation curve; 0: none.", show_default="8")
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps from one checkpoint to the next while training.", show_default="none")
    ] = None,
    full_every: Annotated[
        int | None, typer.Option(help="Checkpoints from one of all rows to the next; between them: what changed.")
    ] = None,
    keep: Annotated[int | None, typer.Option(help="Checkpoints that stay; 0: all.", show_default="3")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,  # noqa: FBT002
    replace: Annotated[
        bool | None, typer.Option("--replace", help="Give up live tables that hold steps of another run of this name.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the model.", show_default="4")] = None,
    width: Annotated[int | None, typer.Option(help="Values per token (d_model).", show_default="128")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads.", show_default="4")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key and value heads.", show_default="2")] = None,
    context: Annotated[int | None, typer.Option(help="Longest sequence, in tokens.", show_default="256")] = None,
    vocabulary: Annotated[
        int | None,
        typer.Option(help="BPE entries learned from the text.", min=300, max=1 << 16, show_default="4096"),
    ] = None,
    experts: Annotated[int | None, typer.Option(help="Routed experts per layer.", show_default="8")] = None,
    top_k: Annotated[int | None, typer.Option(help="Routed experts a token goes to.", show_default="2")] = None,
    expert_width: Annotated[int | None, typer.Option(help="Hidden values of an expert.", show_default="128")] = None,
    engram_layers: Annotated[str | None, typer.Option(help="Layers with a table, from 0.", show_default="1,2")] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Rows per head: of each order of n-grams from 2 on, or one number for all.",
            show_default="50000,150000",
        ),
    ] = None,
    row_width: Annotated[int | None, typer.Option(help="Values per row.", show_default="32")] = None,
    row_format: Annotated[str | None, typer.Option(help="float32 or bfloat16.", show_default="float32")] = None,
    engram_heads: Annotated[int | None, typer.Option(help="Hash heads per order.", show_default="4")] = None,
    max_ngram: Annotated[int | None, typer.Option(help="Largest order of n-grams.", show_default="3")] = None,
    config: Annotated[
        Path | None, path_option("JSON that holds any part of what --print-config shows; options win over it.")
    ] = None,
    print_config: Annotated[  # noqa: FBT002
        bool, typer.Option("--print-config", help="Print the whole configuration as JSON, and train nothing.")
    ] = False,
    run_dir: RunDir = None,
) -> None:
    """Train a model whose tables live in the shards, on all workers of the cluster.

    The first Ctrl-C ends the run after the step under way and saves a checkpoint; the second ends it at once.
    """

    with report_errors():
        training = _configuration(
            config,
            out=out,
            resume=resume,
            model={
                "layers": layers,
                "d_model": width,
                "heads": heads,
                "kv_heads": kv_heads,
                "context": context,
                "vocab_size": vocabulary,
                "experts": experts,
                "top_k": top_k,
                "expert_width": expert_width,
            },
            engram={
                "layers": _numbers(engram_layers),
                "vocab_size": _numbers(rows),
                "row_width": row_width,
                "row_format": row_format,
                "heads": engram_heads,
                "max_ngram": max_ngram,
            },
            run=run,
            steps=steps,
            batch=batch,
            length=length,
            learning_rate=learning_rate,
            warmup=warmup,
            seed=seed,
            memory=memory,
            text=[str(each) for each in text] if text else None,
            staleness=staleness,
            durable=durable,
            evaluations=evaluations,
            checkpoint_every=checkpoint_every,
            full_every=full_every,
            keep=keep,
            replace=replace,
        )
        if print_config:
            from .train_config import print_config as show

            show(training)
            return
        _train(training, run_dir)


def _configuration(path: Path | None, **given: Any) -> TrainConfig:
    from .train_config import read_config

    return read_config(path, **given)


def _train(training: TrainConfig, run_dir: Path | None) -> None:
    from engrid.cluster.config import require_cluster
    from engrid.cluster.train import train_with_progress

    record = require_cluster(run_directory(run_dir))
    try:
        result = train_with_progress(record, training, console, stoppable=True)
    except BaseException:
        if interrupts.pressed():
            errors.print(_lost(training), style="yellow", markup=False, highlight=False)
        raise
    again = command(f"train --resume --out {shlex.quote(training.out)}", run_dir)
    if result.get("stopped"):
        kept = f"checkpoint in {result['checkpoint']}" if "checkpoint" in result else "nothing is saved (save is false)"
        console.print(
            f"stopped after step {result['steps']} of {training.steps}; {kept}", highlight=False, soft_wrap=True
        )
        if "checkpoint" in result:
            console.print(f"go on with: {again}", highlight=False, soft_wrap=True)
        return
    loss = f"validation loss {result['validation_loss']:.4f}" if "validation_loss" in result else "trained"
    console.print(
        f"{loss} after {result['steps']} steps, {result['tokens_per_second']:,.0f} tokens/s, "
        f"exposed wait {1e3 * result['exposed_wait']:.1f} ms a step",
        highlight=False,
    )
    if "checkpoint" in result:
        console.print(f"checkpoint in {result['checkpoint']}", highlight=False, soft_wrap=True)


def _lost(training: TrainConfig) -> str:
    """What a run that was cut off leaves behind."""
    from engrid.storage.errors import CheckpointError
    from engrid.worker.saved_model import FOLDER, open_checkpoint

    try:
        saved = open_checkpoint(Path(training.out) / FOLDER)
    except (CheckpointError, OSError):
        return "cut off: no checkpoint was saved, so the steps of this run are lost (--checkpoint-every saves some on the way)"
    return (
        f"cut off: steps after {saved.step} are lost; go on from checkpoint {saved.manifest.name} with: "
        f"engrid train --resume --out {shlex.quote(training.out)}"
    )
