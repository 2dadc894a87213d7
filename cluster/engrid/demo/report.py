"""The demo's tables and picture."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from engrid.v1 import compute_pb2 as pb
from engrid.worker.config import TrainConfig
from engrid.worker.saved_model import FOLDER

SMOOTHED = 10
"""Steps the training curve is averaged over."""


def result_table(result: dict[str, Any]) -> Table:
    """What was measured, and what each figure is."""
    engram, plain = result["engram"], result["plain"]
    table = Table(title=f"engrid demo: {engram['steps']} steps of each model, {result['seconds']:.0f} s in all")
    table.add_column("measured", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    gain = plain["validation_loss"] - engram["validation_loss"]
    rows: list[tuple[str, str, str]] = [
        ("validation loss, with Engram", f"{engram['validation_loss']:.4f}", "nats per token"),
        ("  same model without", f"{plain['validation_loss']:.4f}", "nats per token"),
        ("  gained by Engram", f"{gain:.4f}", "nats per token"),
        ("weights in the tables", f"{engram['table_values'] / 1e6:.1f}", "million"),
        ("dense weights", f"{engram['parameters'] / 1e6:.2f}", f"million; {plain['parameters'] / 1e6:.2f} without"),
        ("training", f"{engram['tokens_per_second']:,.0f}", "tokens/s"),
        ("  same model without", f"{plain['tokens_per_second']:,.0f}", "tokens/s"),
        ("prefill", f"{result['prefill_tokens_per_second']:,.0f}", "tokens/s, one prompt"),
        ("decoding", f"{result['decode_tokens_per_second']:,.1f}", "tokens/s, one sequence"),
        ("fetched in training", f"{engram['rows_per_token']:.2f}", "rows per token, deduped"),
        ("", f"{engram['bytes_per_token']:,.0f}", "bytes per token"),
        ("exposed wait", f"{1e3 * engram['exposed_wait']:.2f}", f"ms per step, {engram['exposed_wait_share']:.1%}"),
        ("pushing gradients", f"{1e3 * engram['push_seconds']:.2f}", "ms per step"),
        ("remote memory / in-process tables", f"{result['remote_over_in_process']:.3f}", "of training's tokens/s"),
    ]
    for found in engram["collisions"]:
        rows += [
            (f"{found['order']}-grams of the text, distinct", f"{found['ngrams']:,}", ""),
            ("  share a row in one head", f"{found['one_head']:.1%}", "of them, mean of heads"),
            ("  share a row in every head", f"{found['all_heads']:.2%}", "of them"),
            ("  share all K rows with one other", f"{found['same_in_all']:.4%}", "of them: cannot be told"),
        ]
    for row in rows:
        table.add_row(*row)
    return table


def trace_table(prompt: str, traces: Sequence[pb.TokenTrace]) -> Table:
    """Each token's n-grams, their K row ids, and how far the Engram let them in. 80 columns, for ids of up to 6 digits."""
    table = Table(
        title=f'"{prompt}": what the Engram layers looked up',
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("token", max_width=10, no_wrap=True)
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("n-gram", max_width=20, no_wrap=True)
    table.add_column("row ids", no_wrap=True)
    table.add_column("gate", justify="right", no_wrap=True)
    for trace in traces:
        table.add_row(
            Text(repr(trace.token)),
            str(trace.layer),
            Text("\n".join(_end(repr(ngram.text)) for ngram in trace.ngrams)),
            "\n".join(" ".join(map(str, ngram.row_ids)) for ngram in trace.ngrams),
            "\n".join(f"{gate:.3f}" for gate in trace.gates),
        )
    return table


def _end(text: str) -> str:
    """The end of an n-gram, which tells it from the others of its line."""
    return text if len(text) <= 20 else f"…{text[-19:]}"


def whole_lines(text: str) -> str:
    """The text without the line that generation broke off in, if another is left."""
    lines = text.rstrip().split("\n")
    return "\n".join(lines[:-1] if len(lines) > 2 else lines).rstrip()


def next_commands(program: str, out: str) -> list[tuple[str, str]]:
    """What to type after the demo, and what it does."""
    checkpoint = shlex.quote(f"{out}/{FOLDER}")
    return [
        (f"{program} up", "a cluster that stays, until: down"),
        (f'{program} generate "def main(" --checkpoint {checkpoint}', "another prompt"),
        (f'{program} ids "import os" --layer 1 --checkpoint {checkpoint}', "the rows that a text reads"),
        (f"{program} train --out run --steps 300", "a model of your own; --text FOLDER"),
        (f"{program} down", "stops what `up` started"),
    ]


def draw_curves(path: Path, engram: dict[str, Any], plain: dict[str, Any], training: TrainConfig) -> None:
    """Training loss (smoothed) and validation loss of both models."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    for name, result, color in (("with Engram", engram, "tab:blue"), ("without Engram", plain, "tab:orange")):
        losses = result["losses"]
        smooth = [
            sum(part) / len(part) for part in (losses[max(0, at - SMOOTHED) : at + 1] for at in range(len(losses)))
        ]
        axes.plot(range(1, len(losses) + 1), smooth, color=color, alpha=0.4, label=f"{name}, training")
        steps, values = zip(*result["curve"], strict=True)
        axes.plot(steps, values, "o-", color=color, label=f"{name}, validation ({values[-1]:.3f})")
    axes.set_xlabel(f"step ({training.batch * training.length} tokens per worker)")
    axes.set_ylabel("loss, nats per token")
    axes.set_title("The same model, data and seed, with and without Engram")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    plt.close(figure)
