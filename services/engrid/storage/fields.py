"""What the JSON of a checkpoint may say: it lies in a folder that others may write, so nothing in it is taken on trust."""

from __future__ import annotations

import re
from collections.abc import Mapping

MAX_TEXT = 512
"""Characters of a name."""
MAX_PATH = 1024
"""Bytes of a path within a checkpoint."""
_HEX = re.compile(r"[0-9a-f]{64}")


def check_text(field: str, value: object) -> None:
    """Raise ValueError, naming the field, unless `value` is a short text that UTF-8 can say."""
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise ValueError(f"{field} is {_shown(value)}; give a text of at most {MAX_TEXT} printable characters")


def check_path(field: str, value: object) -> None:
    """Raise ValueError unless `value` is a path that stays in the folder it is relative to."""
    if not isinstance(value, str) or not value.isprintable() or len(value.encode()) > MAX_PATH:
        raise ValueError(f"{field} is {_shown(value)}; give a path within the checkpoint")
    for part in value.split("/"):
        if part in ("", ".", "..") or len(part.encode()) > 255:
            raise ValueError(f"{field} is {_shown(value)}; give a path within the checkpoint")


def check_hex(field: str, value: object) -> None:
    """Raise ValueError unless `value` is a sha256 in hex."""
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        raise ValueError(f"{field} is {_shown(value)}; give 64 hex digits")


def check_list(field: str, value: object) -> None:
    """Raise ValueError unless `value` is a JSON array."""
    if not isinstance(value, list):
        raise ValueError(f"{field} is {_shown(value)}; give a JSON array")  # noqa: TRY004 - one error for bad JSON


def check_object(field: str, value: object) -> None:
    """Raise ValueError unless `value` is a JSON object."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{field} is {_shown(value)}; give a JSON object")  # noqa: TRY004 - one error for bad JSON


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
