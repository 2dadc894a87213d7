"""The demo's tables and picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from engrid.v1 import compute_pb2 as pb
from engrid.worker.config import TrainConfig

SMOOTHED = 10
"""Steps the training curve is averaged over."""


def result_table(result: dict[str, Any]) -> Table:
    """What was measured, and what each figure is."""
    engram, plain = result["engram"], result["plain"]
    table = Table(title=f"engrid demo: {engram['steps']} steps of each model, {result['seconds']:.0f} s in all")
    table.add_column("measured")
    table.add_column("value", justify="right")
    table.add_column("unit")
    gain = plain["validation_loss"] - engram["validation_loss"]
    rows: list[tuple[str, str, str]] = [
        ("validation loss, with Engram", f"{engram['validation_loss']:.4f}", "nats per token"),
        (
            "validation loss, same model without",
            f"{plain['validation_loss']:.4f}",
            f"nats per token; Engram gains {gain:.4f}",
        ),
        (
            "weights: dense + in the tables",
            f"{engram['parameters'] / 1e6:.2f} + {engram['table_values'] / 1e6:.1f} M",
            f"without Engram {plain['parameters'] / 1e6:.2f} M",
        ),
        (
            "training",
            f"{engram['tokens_per_second']:,.0f}",
            f"tokens/s; without Engram {plain['tokens_per_second']:,.0f}",
        ),
        ("prefill", f"{result['prefill_tokens_per_second']:,.0f}", "tokens/s, one prompt"),
        ("decoding", f"{result['decode_tokens_per_second']:,.1f}", "tokens/s, one sequence"),
        ("fetched in training", f"{engram['rows_per_token']:.2f}", "rows per token, after dedup by key"),
        ("", f"{engram['bytes_per_token']:,.0f}", "bytes per token"),
        (
            "exposed wait",
            f"{1e3 * engram['exposed_wait']:.2f}",
            f"ms per step ({engram['exposed_wait_share']:.1%} of it)",
        ),
        ("pushing gradients", f"{1e3 * engram['push_seconds']:.2f}", "ms per step"),
        ("remote memory / in-process tables", f"{result['remote_over_in_process']:.3f}", "of the tokens/s in training"),
    ]
    for found in engram["collisions"]:
        rows += [
            (f"{found['order']}-grams of the text, distinct", f"{found['ngrams']:,}", ""),
            ("  share a row in one head", f"{found['one_head']:.1%}", "of them, mean over heads"),
            ("  share a row in every head", f"{found['all_heads']:.2%}", "of them"),
            ("  share all K rows with one other", f"{found['same_in_all']:.4%}", "of them: told apart by nothing"),
        ]
    for row in rows:
        table.add_row(*row)
    return table


def trace_table(prompt: str, traces: Sequence[pb.TokenTrace]) -> Table:
    """Each token's n-grams, their K row ids, and how far the Engram let them in."""
    table = Table(title=f'"{prompt}": what the Engram layers looked up', show_lines=True)
    for column in ("token", "layer", "n-gram", "row ids", "gate"):
        table.add_column(column, justify="right" if column in ("layer", "gate") else "left")
    for trace in traces:
        table.add_row(
            repr(trace.token),
            str(trace.layer),
            "\n".join(repr(ngram.text) for ngram in trace.ngrams),
            "\n".join(" ".join(map(str, ngram.row_ids)) for ngram in trace.ngrams),
            " ".join(f"{gate:.3f}" for gate in trace.gates),
        )
    return table


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
