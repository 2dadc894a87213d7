"""What the commands print on: text as it is, whatever a path, a token or a message holds."""

from __future__ import annotations

from typing import Any, TextIO

from rich.console import Console


class Terminal(Console):
    """No [brackets] are taken for markup, no :word: for a picture; a line is not broken, for it may be typed again."""

    def __init__(self, *, stderr: bool = False, file: TextIO | None = None, width: int | None = None) -> None:
        super().__init__(stderr=stderr, file=file, width=width, markup=False, emoji=False, highlight=False)

    def print(self, *objects: Any, **how: Any) -> None:
        """As rich's, with text on lines of any length; tables fit the terminal."""
        how.setdefault("soft_wrap", all(isinstance(each, str) for each in objects))
        super().print(*objects, **how)
