"""What every command shares: where it prints, how it ends, which run directory it means."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from engrid.cluster import interrupts

from .terminal import Terminal

console = Terminal()
errors = Terminal(stderr=True)


@contextmanager
def report_errors() -> Iterator[None]:
    """Our errors in one red line, exit code 1; Ctrl-C is 130. Anything else is a bug and keeps its traceback."""
    from engrid.cluster.config import ClusterError
    from engrid.directory import DirectoryError
    from engrid.rpc.errors import EngridError

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


def run_directory(run_dir: Path | None) -> Path:
    """The run directory asked for, or the default."""
    from engrid.cluster.config import default_run_dir

    return run_dir or default_run_dir()
