"""Speculation by prompt lookup: what followed the last time is guessed to follow again.

    prompt and output   .. def add ( a , b ) : .. def add (          the last three tokens stood there before,
                           ─────────┘ └──────┐    ───────┘           so what followed them is the draft
    one forward pass    ( a , b )        reads the last token and the draft, rows of all in one request
    the model itself      a , b , x      agrees with three; its own fourth is the next token, the rest is forgotten

A text that repeats itself (code, a document that is quoted) costs fewer passes; no other model is needed. The tokens
are the model's own greedy choices whatever the draft says: a wrong draft costs time, never a token.

Two forward passes over different numbers of tokens round differently in the last bits. So the output is that of
decoding one token at a time but where two logits, or two experts' scores, lie closer than that; the same holds of
reading a prompt in chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

ORDERS = (3, 2)
"""Lengths of the n-grams looked for, the longest first. One token alone has too many continuations to guess from."""


@dataclass
class Drafts:
    """What became of the drafts of one generation."""

    drafted: int = 0
    """Tokens."""
    accepted: int = 0
    """Of these, those that the model would have said too."""


class PromptLookup:
    """A text that grows, and where in it each n-gram stood last."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        """Where the token after an n-gram's last occurrence stands."""
        self._source: int | None = None
        """The same of the n-gram the text ends in, before this occurrence."""
        self._extend(tokens)

    def draft(self, new: Iterable[int], count: int) -> list[int]:
        """`count` tokens that may follow once `new` is appended; none where the text has not ended like this before.

        Where it ends in the midst of a repetition, the draft goes on to repeat.
        """
        self._extend(new)
        if self._source is None:
            return []
        since = self._text[self._source :][:count]
        return [since[at % len(since)] for at in range(count)]

    def _extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self._text.append(token)
            grams = [tuple(self._text[-order:]) for order in ORDERS if order <= len(self._text)]
            self._source = next((self._after[gram] for gram in grams if gram in self._after), None)
            self._after.update(dict.fromkeys(grams, len(self._text)))


def agreed(draft: Sequence[int], logits_TV: Tensor) -> list[int]:
    """The greedy tokens of logits over a token and its draft: the part of the draft they agree with, and one more."""
    greedy: list[int] = logits_TV.argmax(-1).tolist()
    same = next((at for at, token in enumerate(draft) if token != greedy[at]), len(draft))
    return greedy[: same + 1]
