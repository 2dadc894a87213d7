"""`engrid ids`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import console, report_errors
from .options import path_option


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
    from engrid.cluster.generate import argument_text

    from .ids_table import of_checkpoint, of_preset, print_ids

    with report_errors():
        if checkpoint is not None and (preset is not None or tokenizer is not None):
            raise ValueError(
                "a checkpoint has its own shape and tokenizer: give --checkpoint alone, or --preset and --tokenizer"
            )
        hashing = of_checkpoint(checkpoint) if checkpoint is not None else of_preset(preset or "paper", tokenizer)
        print_ids(argument_text(text), hashing, layer=layer, as_json=as_json, console=console)
