"""`engrid generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import console, report_errors, run_directory
from .options import RunDir, number_option, path_option


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
    from engrid.cluster.config import require_cluster
    from engrid.cluster.generate import argument_text, open_model, stream

    with report_errors():
        prompt = argument_text(prompt)
        if run and checkpoint is not None:
            raise ValueError("give --run (what is published) or --checkpoint (that one), not both")
        chosen = None if run else (checkpoint or Path("engrid-run/checkpoint")).expanduser().resolve()
        record = require_cluster(run_directory(run_dir))
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
