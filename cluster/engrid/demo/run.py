"""`engrid demo`: the main job from start to end, and what it measured."""

from __future__ import annotations

import json
import shlex
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from engrid.cluster import interrupts
from engrid.cluster.config import ClusterConfig, Record
from engrid.cluster.extras import require
from engrid.cluster.generate import Worker, open_model, stream
from engrid.cluster.launch import up
from engrid.cluster.stop import down
from engrid.cluster.train import run_training, train_with_progress
from engrid.v1 import compute_pb2 as pb
from engrid.worker.config import Memory, TrainConfig, demo_model
from engrid.worker.train.text import standard_library

from .folder import begin, give_up, settle
from .report import draw_curves, next_commands, result_table, trace_table, whole_lines

STEPS = 250
"""Of each of the two models: a run of under six minutes on two cores."""
PAIRED_STEPS = 10
"""Of each of the short runs that compare memory in the shards with memory in process."""
PAIRS = 5
SHOWN_PROMPT = "class Reader:\n    def __init__(self, path):\n        self."
SHOWN_TOKENS = 96
SHOWN_TEMPERATURE = 0.5
"""Greedily so small a model repeats itself."""
SHOWN_SEED = 0
TRACED_PROMPT = "Harry Potter dropped his wand"
SPEED_REPEATS = 5
NEW_TOKENS = 48


@dataclass
class DemoResult:
    """What the demo measured."""

    engram: dict[str, Any]
    plain: dict[str, Any]
    """The same run without an Engram."""
    remote_over_in_process: float
    """Training tokens/s, median of the pairs."""
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    generated: str
    seconds: float = 0.0


def run_demo(config: ClusterConfig, out: Path, *, steps: int | None, seed: int, console: Console) -> DemoResult:
    """Brings a cluster up, trains with and without Engram, generates, compares, and takes the cluster down.

    Writes demo.json, curves.png and the checkpoint below `out`. Whatever ends it, Ctrl-C too, the cluster is stopped, and
    what an earlier demo left there stays until this one has finished.
    """
    require("ray", "torch", "tokenizers", "safetensors", "matplotlib")
    started = time.monotonic()
    record, finished = None, False
    try:
        with console.status("starting the cluster") as status:
            record = up(config, status.update)
        work = begin(out)
        result, traces, training = _measure(record, work, console, steps=steps, seed=seed)
        finished = True
    finally:
        if record is not None:
            with console.status("stopping the cluster"):
                down(config.run_dir)
            if not finished:
                _leave_as_it_was(out, console)
    result.seconds = time.monotonic() - started
    result.engram["checkpoint"] = str(settle(work, out) / Path(result.engram["checkpoint"]).name)
    (out / "demo.json").write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")
    draw_curves(out / "curves.png", result.engram, result.plain, training)
    _report(console, result, traces, out)
    return result


def _leave_as_it_was(out: Path, console: Console) -> None:
    with interrupts.uninterrupted():
        give_up(out)
    if (out / "demo.json").exists():
        console.print(f"cut off; {out} holds what the demo before this one left", style="yellow", highlight=False)


def _measure(
    record: Record, work: Path, console: Console, *, steps: int | None, seed: int
) -> tuple[DemoResult, list[pb.TokenTrace], TrainConfig]:
    training = TrainConfig(
        run="demo",
        out=str(work),
        steps=steps or STEPS,
        seed=seed,
        model=replace(demo_model(), seed=seed),
        replace=True,
    )
    console.print(
        f"{len(record.shards)} memory shards and {len(record.workers)} compute worker(s) are up; "
        f"the text is {standard_library()}",
        highlight=False,
        soft_wrap=True,
    )
    engram = train_with_progress(record, training, console, "with Engram   ")
    plain = train_with_progress(record, _variant(training, "off"), console, "without Engram")
    with console.status("comparing memory in the shards with memory in process"):
        ratio = _paired_ratio(record, training)
    with open_model(record, Path(engram["checkpoint"])) as worker:
        generated = _show_generation(worker, console)
        prefill, decode = _generation_speed(worker)
        stream(worker, TRACED_PROMPT, lambda _: None, max_new_tokens=1, explain=True)
        return DemoResult(engram, plain, ratio, prefill, decode, generated), list(worker.traces), training


def _variant(training: TrainConfig, memory: Memory) -> TrainConfig:
    model = training.model if memory != "off" else replace(training.model, engram=None)
    return replace(training, run=f"demo-{memory}", memory=memory, model=model, save=False)


def _paired_ratio(record: Record, training: TrainConfig) -> float:
    """Tokens/s with rows in the shards over tokens/s with rows in process, in turn, on one worker."""
    name, address = next(iter(record.workers.items()))
    alone = replace(record, workers={name: address})
    steps = min(PAIRED_STEPS, training.steps)
    ratios = []
    for _ in range(PAIRS if steps == PAIRED_STEPS else 1):
        rates = {}
        for memory in ("remote", "in_process"):
            short = replace(_variant(training, memory), run="demo-paired", steps=steps, evaluations=0)
            rates[memory] = run_training(alone, short, _ignore)["tokens_per_second"]
        ratios.append(float(rates["remote"] / rates["in_process"]))
    return statistics.median(ratios)


def _ignore(progress: pb.TrainProgress) -> None:
    """Short runs show no progress of their own."""


def _show_generation(worker: Worker, console: Console) -> str:
    pieces: list[str] = []
    with console.status("generating"):
        stream(
            worker,
            SHOWN_PROMPT,
            pieces.append,
            max_new_tokens=SHOWN_TOKENS,
            temperature=SHOWN_TEMPERATURE,
            seed=SHOWN_SEED,
        )
    written = whole_lines(SHOWN_PROMPT + "".join(pieces))
    console.rule("generated through the compute worker, from its third line on")
    console.print(written, markup=False, highlight=False, soft_wrap=True)
    console.rule()
    return written


def _generation_speed(worker: Worker) -> tuple[float, float]:
    """Tokens/s of prefill and of decoding one sequence: medians."""
    prompt = (standard_library() / "json" / "decoder.py").read_text(encoding="utf-8")[:500]
    prefill, decode = [], []
    for _ in range(SPEED_REPEATS):
        totals = stream(worker, prompt, lambda _: None, max_new_tokens=NEW_TOKENS)
        prefill.append(totals.prompt_tokens / totals.prefill_time)
        decode.append((totals.new_tokens - 1) / totals.decode_time)
    return statistics.median(prefill), statistics.median(decode)


def _report(console: Console, result: DemoResult, traces: list[pb.TokenTrace], out: Path) -> None:
    console.print(trace_table(TRACED_PROMPT, traces))
    console.print(result_table(asdict(result)))
    shown = as_typed(out)
    console.print(
        f"loss curves in {shown}/curves.png, all figures in {shown}/demo.json", highlight=False, soft_wrap=True
    )
    gain = result.plain["validation_loss"] - result.engram["validation_loss"]
    if gain <= 0:
        console.print(f"Engram did not help in this run ({-gain:.4f} worse)", style="yellow")
    console.print("\nnext, on the checkpoint of this run:", highlight=False)
    for command, what in next_commands(program(), shown):
        console.print(f"  {command}  # {what}", markup=False, highlight=False, soft_wrap=True)


def as_typed(path: Path) -> str:
    """The path from the working folder, where it lies below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def program() -> str:
    """How this program is called: its name where the shell finds it by that, else its path."""
    called = Path(sys.argv[0])
    found = shutil.which("engrid")
    if called.name != "engrid" or (found and Path(found).resolve() == called.resolve()):
        return "engrid"
    return shlex.quote(as_typed(called.absolute()))
