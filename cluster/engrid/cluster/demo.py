"""`engrid demo`: the main job from start to end, and what it measured."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from engrid.v1 import compute_pb2 as pb
from engrid.worker.config import Memory, TrainConfig, demo_model
from engrid.worker.corpus import standard_library
from engrid.worker.saved_model import FOLDER

from .config import ClusterConfig, Record
from .demo_report import draw_curves, result_table, trace_table
from .generate import Worker, open_model, stream
from .launch import up
from .stop import down
from .train import run_training, train_with_progress

STEPS = 250
"""Of each of the two models: a run of under six minutes on two cores."""
PAIRED_STEPS = 10
"""Of each of the short runs that compare memory in the shards with memory in process."""
PAIRS = 5
SHOWN_PROMPT = "def read_file(path):\n    "
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
    seconds: float


def run_demo(config: ClusterConfig, out: Path, *, steps: int | None, seed: int, console: Console) -> DemoResult:
    """Brings a cluster up, trains with and without Engram, generates, compares, and takes the cluster down.

    Writes demo.json, curves.png and the checkpoint below `out`. Whatever ends it, Ctrl-C too, the cluster is stopped.
    """
    started = time.monotonic()
    shutil.rmtree(out / FOLDER, ignore_errors=True)  # of an earlier demo
    training = TrainConfig(
        run="demo", out=str(out), steps=steps or STEPS, seed=seed, model=replace(demo_model(), seed=seed)
    )
    with console.status("starting the cluster") as status:
        record = up(config, status.update)
    try:
        console.print(
            f"{len(record.shards)} memory shards and {len(record.workers)} compute worker(s) are up; "
            f"the text is {standard_library()}",
            highlight=False,
        )
        engram = train_with_progress(record, training, console, "with Engram   ")
        plain = train_with_progress(record, _variant(training, "off"), console, "without Engram")
        with console.status("comparing memory in the shards with memory in process"):
            ratio = _paired_ratio(record, training)
        with open_model(record, Path(engram["checkpoint"])) as worker:
            generated = _show_generation(worker, console)
            prefill, decode = _generation_speed(worker)
            stream(worker, TRACED_PROMPT, lambda _: None, max_new_tokens=1, explain=True)
            traces = list(worker.traces)
    finally:
        with console.status("stopping the cluster"):
            down(config.run_dir)
    result = DemoResult(engram, plain, ratio, prefill, decode, generated, time.monotonic() - started)
    (out / "demo.json").write_text(json.dumps(asdict(result), indent=1))
    draw_curves(out / "curves.png", engram, plain, training)
    _report(console, result, traces, out)
    return result


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
    console.rule("generated through the compute worker")
    console.print(SHOWN_PROMPT, end="", style="bold", markup=False, highlight=False)
    pieces: list[str] = []

    def show(text: str) -> None:
        pieces.append(text)
        console.print(text, end="", markup=False, highlight=False)

    stream(worker, SHOWN_PROMPT, show, max_new_tokens=NEW_TOKENS)
    console.print()
    return SHOWN_PROMPT + "".join(pieces)


def _generation_speed(worker: Worker) -> tuple[float, float]:
    """Tokens/s of prefill and of decoding one sequence: medians."""
    prompt = (standard_library() / "json" / "decoder.py").read_text()[:500]
    prefill, decode = [], []
    for _ in range(SPEED_REPEATS):
        totals = stream(worker, prompt, lambda _: None, max_new_tokens=NEW_TOKENS)
        prefill.append(totals.prompt_tokens / totals.prefill_time)
        decode.append((totals.new_tokens - 1) / totals.decode_time)
    return statistics.median(prefill), statistics.median(decode)


def _report(console: Console, result: DemoResult, traces: list[pb.TokenTrace], out: Path) -> None:
    console.print(trace_table(TRACED_PROMPT, traces))
    console.print(result_table(asdict(result)))
    console.print(f"loss curves in {out / 'curves.png'}, all figures in {out / 'demo.json'}", highlight=False)
    gain = result.plain["validation_loss"] - result.engram["validation_loss"]
    if gain <= 0:
        console.print(f"Engram did not help in this run ({-gain:.4f} worse)", style="yellow")
