"""The training text as tokens, and a small BPE learned from it.

Whole documents are kept for validation, chosen by a hash of their name, so that no line of one is trained on; files with
identical contents count once. If that leaves nothing on one side (a single file), each document is cut in two instead:
nine tenths are trained on. All is a function of the files and the size asked for, so two workers make the same.

A corpus is kept in a folder named after what the files held, so another text is never taken for it; and what is kept is
checked against its sums when it is read, and made anew where it is damaged.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engrid.tables import check_int, check_keys
from engrid.worker.tokenizer import tokenizer_of

from .stopping import Stopping
from .text import Text, documents, find_text

PAD, END = "<pad>", "<end>"
"""Ids 0 and 1: the pad before a text starts, the end of a document."""

VALIDATION_SHARE = 10
"""One document in this many is for validation."""

FILES = ("tokenizer.json", "train.npy", "validation.npy")
ABOUT = "about.json"
BATCH_DOCUMENTS = 256
"""Encoded at a time."""
LOCK_POLL_SECONDS = 0.05

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Corpus:
    """Text as token ids, documents end to end, each closed by the END token."""

    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens
    files: tuple[int, int]
    """Number of training and validation documents."""
    text_bytes: int
    digest: str
    """sha256 of tokenizer and tokens, of what was read: workers of one run must have the same."""
    text: Text

    @property
    def about_text(self) -> dict[str, Any]:
        """What a checkpoint says of the files: enough to tell later whether and how they have changed."""
        return {"digest": self.text.digest, "files": len(self.text.files), "bytes": self.text_bytes}


def prepare(folder: Path, *, vocab_size: int, roots: Sequence[Path] = (), stopping: Stopping | None = None) -> Corpus:
    """The corpus of the text as it is now, kept in `folder` and made first where it is not there or damaged.

    vocab_size: BPE entries, at most 65,536. roots: folders and files of text; none: the standard library. Raises
    ValueError where there is too little text, CancelledError once `stopping` says so.
    """
    if not 300 <= vocab_size <= 1 << 16:
        raise ValueError(f"vocab_size {vocab_size}: give 300 to 65536")
    stopping = stopping or Stopping()
    text = find_text(roots, stopping.check)
    if not text.files:
        raise ValueError(f"no text to train on: {text.describe()}")
    kept = kept_folder(folder, vocab_size, text.digest)
    found = _load(kept, text)
    if found is None:
        with _one_at_a_time(folder, stopping):
            found = _load(kept, text)
            if found is None:
                _make(kept, vocab_size, text, stopping)
                found = _load(kept, text)
    if found is None:
        raise OSError(0, "the corpus does not hold what was just written into it; is the disk sound?", str(kept))
    return found


def kept_folder(folder: Path, vocab_size: int, text_digest: str) -> Path:
    """Where the corpus of a text is kept."""
    return folder / f"corpus-{vocab_size}-{text_digest[:16]}"


def changes_since(folder: Path, vocab_size: int, text_digest: str, text: Text) -> str:
    """How `text` differs from the text of that digest, as far as its corpus is still kept; "" where it is not."""
    about = _read_about(kept_folder(folder, vocab_size, text_digest))
    if about is None:
        return ""
    before: dict[str, str] = about["text"]
    now = {file.name: file.sha256 for file in text.files}
    parts = {
        "changed": [name for name in now if name in before and before[name] != now[name]],
        "added": [name for name in now if name not in before],
        "gone": [name for name in before if name not in now],
    }
    return "; ".join(
        f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in parts.items()
        if names
    )


def _load(kept: Path, text: Text) -> Corpus | None:
    """None where it is not there, or not as it was written."""
    about = _read_about(kept)
    if about is None:
        return None
    contents = {}
    for name in FILES:
        try:
            contents[name] = (kept / name).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(contents[name]).hexdigest() != about["sha256"][name]:
            return None
    return Corpus(
        tokenizer_of(contents["tokenizer.json"].decode(), str(kept / "tokenizer.json")),
        np.load(io.BytesIO(contents["train.npy"]), allow_pickle=False),
        np.load(io.BytesIO(contents["validation.npy"]), allow_pickle=False),
        (about["train_documents"], about["validation_documents"]),
        sum(file.size for file in text.files),
        hashlib.sha256(b"".join(hashlib.sha256(contents[name]).digest() for name in FILES)).hexdigest(),
        text,
    )


def _read_about(kept: Path) -> dict[str, Any] | None:
    """What a corpus says of itself; None where that is missing or not of this version."""
    try:
        about: dict[str, Any] = json.loads((kept / ABOUT).read_text(encoding="utf-8"))
        check_keys("corpus", about, {"train_documents", "validation_documents", "text", "sha256"})
        for name in ("train_documents", "validation_documents"):
            check_int(name, about[name], 0, 2**63)
        check_keys("sha256", about["sha256"], set(FILES))
        if not isinstance(about["text"], dict):
            return None
    except (OSError, ValueError):
        return None
    return about


def split_documents(text: Text) -> tuple[Callable[[], Iterator[str]], Callable[[], Iterator[str]]]:
    """The documents to train on and to validate with, each time read anew."""
    sides = set()
    for name, _ in _all(text):
        sides.add(_is_validation(name))
        if len(sides) == 2:
            break
    if len(sides) == 2:
        return (
            lambda: (each for name, each in _all(text) if not _is_validation(name)),
            lambda: (each for name, each in _all(text) if _is_validation(name)),
        )
    return (
        lambda: (each[: _cut(each)] for _, each in _all(text)),
        lambda: (each[_cut(each) :] for _, each in _all(text)),
    )


def _all(text: Text) -> Iterator[tuple[str, str]]:
    for file in text.files:
        yield from documents(file)


def _is_validation(name: str) -> bool:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8]) % VALIDATION_SHARE == 0


def _cut(document: str) -> int:
    """Where to cut a document in two: after a line, if there is one in its last fifth."""
    at = len(document) - len(document) // VALIDATION_SHARE
    line = document.rfind("\n", len(document) * 4 // 5, at)
    return line + 1 if line >= 0 else at


def _make(kept: Path, vocab_size: int, text: Text, stopping: Stopping) -> None:
    train, validation = split_documents(text)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".corpus-") as made:
        aside = Path(made) / "corpus"
        aside.mkdir()
        learned = _learn_bpe(_checked(train(), stopping), vocab_size)
        if learned.get_vocab_size() < vocab_size:
            raise ValueError(
                f"too little text for a vocab_size of {vocab_size}: it gives {learned.get_vocab_size()}; {text.describe()}"
            )
        learned.save(str(aside / "tokenizer.json"))
        tokenizer = tokenizer_of((aside / "tokenizer.json").read_bytes().decode(), "the tokenizer learned")
        counts = {}
        for name, side in (("train", train), ("validation", validation)):
            tokens, counts[name] = _encode(tokenizer, _checked(side(), stopping))
            if len(tokens) < 2:
                raise ValueError(f"too little text: {len(tokens)} tokens of {name}; {text.describe()}")
            np.save(aside / f"{name}.npy", tokens)
        about = {
            "train_documents": counts["train"],
            "validation_documents": counts["validation"],
            "text": {file.name: file.sha256 for file in text.files},
            "sha256": {name: hashlib.sha256((aside / name).read_bytes()).hexdigest() for name in FILES},
        }
        (aside / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        if kept.exists():
            shutil.rmtree(kept)  # damaged
        aside.rename(kept)


def _checked(documents: Iterator[str], stopping: Stopping) -> Iterator[str]:
    for each in documents:
        stopping.check()
        yield each


@contextmanager
def _one_at_a_time(folder: Path, stopping: Stopping) -> Iterator[None]:
    """Workers that share a folder wait for the first to make the corpus instead of making it too."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".corpus.lock").open("wb") as lock:
        while not _try_lock(lock.fileno()):
            stopping.wait(LOCK_POLL_SECONDS)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _learn_bpe(documents: Iterator[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _encode(tokenizer: Tokenizer, documents: Iterator[str]) -> tuple[Tokens, int]:
    """The tokens, and the number of documents."""
    end, pieces, count = tokenizer.token_to_id(END), [np.empty(0, np.uint16)], 0
    while batch := list(itertools.islice(documents, BATCH_DOCUMENTS)):
        count += len(batch)
        encodings = tokenizer.encode_batch(batch, add_special_tokens=False)
        pieces += [np.array([*encoding.ids, end], np.uint16) for encoding in encodings]
    return np.concatenate(pieces), count
