"""Where a demo writes: beside the results of the one before it, whose place it takes only when it has finished."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from engrid.worker.saved_model import FOLDER

UNFINISHED = "unfinished"
OLD = ".old-checkpoint"
RESULT = "result.json"


def begin(out: Path) -> Path:
    """An empty folder for a new demo, but for the corpora that are there already."""
    work = out / UNFINISHED
    shutil.rmtree(work, ignore_errors=True)  # of a demo that was cut off
    work.mkdir(parents=True)
    for corpus in out.glob("corpus-*"):
        shutil.copytree(corpus, work / corpus.name, copy_function=_link)
    return work


def settle(work: Path, out: Path) -> Path:
    """Puts a finished demo's checkpoint in the place of the one before; returns the folder of its checkpoints."""
    _keep_corpora(work, out)
    shutil.rmtree(out / OLD, ignore_errors=True)
    if (out / FOLDER).exists():
        (out / FOLDER).rename(out / OLD)
    (work / FOLDER).rename(out / FOLDER)
    (work / RESULT).replace(out / RESULT)
    shutil.rmtree(out / OLD, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)
    return out / FOLDER


def give_up(out: Path) -> None:
    """Removes what a demo that was cut off has written; what the one before it left stays, and a corpus is kept."""
    work = out / UNFINISHED
    _keep_corpora(work, out)
    shutil.rmtree(work, ignore_errors=True)


def _keep_corpora(work: Path, out: Path) -> None:
    for corpus in work.glob("corpus-*"):
        if not (out / corpus.name).exists():
            corpus.rename(out / corpus.name)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target
