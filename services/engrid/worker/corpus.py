"""The training text: this machine's own Python standard library, and a small BPE learned from it.

Whole files are kept for validation, chosen by a hash of their path, so that no line of a validation file is
trained on; files with identical contents count once. Everything is a function of the files and the sizes asked
for, so two workers on one machine make the same.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, END = "<pad>", "<end>"
"""Ids 0 and 1: the pad before a text starts, the end of a file."""

VALIDATION_SHARE = 10
"""One file in this many is for validation."""

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Corpus:
    """Text as token ids, files end to end, each closed by the END token."""

    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens
    files: tuple[int, int]
    """Number of training and validation files."""
    text_bytes: int
    digest: str
    """sha256 of tokenizer and tokens: workers of one run must have the same."""


def standard_library() -> Path:
    """The folder of this interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def split_files(root: Path) -> tuple[list[Path], list[Path]]:
    """Training and validation files (*.py below root, tests and installed packages left out), in path order."""
    seen: set[bytes] = set()
    train: list[Path] = []
    validation: list[Path] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED & set(relative.parts):
            continue
        contents = path.read_bytes()
        digest = hashlib.sha256(contents).digest()
        if digest in seen or not contents.strip():
            continue
        seen.add(digest)
        name = hashlib.sha256(relative.as_posix().encode()).digest()
        (validation if int.from_bytes(name[:8]) % VALIDATION_SHARE == 0 else train).append(path)
    return train, validation


def prepare(folder: Path, *, vocab_size: int, root: Path | None = None) -> Corpus:
    """The corpus kept in `folder`, made first where it is not there. Complete or absent: made aside and renamed.

    vocab_size: BPE entries, at most 65,536. root: folder of the *.py files; None is the standard library. Raises
    ValueError where there is too little text.
    """
    if not 300 <= vocab_size <= 1 << 16:
        raise ValueError(f"vocab_size {vocab_size}: give 300 to 65536")
    root = (root or standard_library()).resolve()
    name = hashlib.sha256(str(root).encode()).hexdigest()[:8]
    kept = folder / f"corpus-{vocab_size}-{name}"
    if not (kept / "about.json").exists():
        with _one_at_a_time(folder):
            if not (kept / "about.json").exists():
                _make(kept, vocab_size, root)
    about = json.loads((kept / "about.json").read_text())
    return Corpus(
        load_tokenizer(kept / "tokenizer.json"),
        np.load(kept / "train.npy"),
        np.load(kept / "validation.npy"),
        (about["train_files"], about["validation_files"]),
        about["text_bytes"],
        about["digest"],
    )


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer for text in which "<end>" is five characters and not the end."""
    return tokenizer_of(path.read_text())


def tokenizer_of(text: str) -> Tokenizer:
    """The same from what its file holds."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _make(kept: Path, vocab_size: int, root: Path) -> None:
    train, validation = split_files(root)
    if not train or not validation:
        raise ValueError(f"{root} holds {len(train)} training and {len(validation)} validation files; both are needed")
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".corpus-") as made:
        aside = Path(made) / "corpus"
        aside.mkdir()
        learned = _learn_bpe(train, vocab_size)
        if learned.get_vocab_size() < vocab_size:
            raise ValueError(
                f"{root} is too little text for a vocab_size of {vocab_size}: it gives {learned.get_vocab_size()}"
            )
        learned.save(str(aside / "tokenizer.json"))
        tokenizer = load_tokenizer(aside / "tokenizer.json")
        np.save(aside / "train.npy", _encode(tokenizer, train))
        np.save(aside / "validation.npy", _encode(tokenizer, validation))
        about = {
            "train_files": len(train),
            "validation_files": len(validation),
            "text_bytes": sum(path.stat().st_size for path in (*train, *validation)),
            "digest": _digest(aside),
        }
        (aside / "about.json").write_text(json.dumps(about))
        aside.rename(kept)


def _digest(folder: Path) -> str:
    found = hashlib.sha256()
    for name in ("tokenizer.json", "train.npy", "validation.npy"):
        found.update((folder / name).read_bytes())
    return found.hexdigest()


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Workers that share a folder wait for the first to make the corpus instead of making it too."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".corpus.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        yield path.read_text(encoding="utf-8", errors="replace")


def _learn_bpe(paths: list[Path], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_read(paths), trainer, length=len(paths))
    return tokenizer


def _encode(tokenizer: Tokenizer, paths: list[Path]) -> Tokens:
    end = tokenizer.token_to_id(END)
    pieces = [[*encoding.ids, end] for encoding in tokenizer.encode_batch(list(_read(paths)), add_special_tokens=False)]
    return np.concatenate([np.array(piece, np.uint16) for piece in pieces])
