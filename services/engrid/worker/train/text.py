"""The training text as files: which there are, what was passed over, and the documents in them.

A folder is searched for files by their endings. Only what is a regular file and can be read counts: links that lead
nowhere, folders named like files, pipes and unreadable files are passed over and counted. A file that is named itself is
not passed over: what is wrong with it is an error.
"""

from __future__ import annotations

import codecs
import collections
import hashlib
import json
import os
import stat
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SUFFIXES = (".py", ".txt", ".md", ".jsonl")
"""Of text files; a line of the last holds a JSON object with a "text"."""

MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"} | {
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""What a file may begin with to say how its text is written; UTF-32's first, whose mark begins as UTF-16's. None: UTF-8."""

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
"""Folders that are not searched."""


@dataclass(frozen=True)
class TextFile:
    """A file as it was when it was found."""

    path: Path
    name: str
    """Its path below the folder that was searched, with slashes; for a file that was named itself, its name."""
    size: int
    sha256: str


@dataclass
class Text:
    """The files found, each content once, in the order of the roots and of their names."""

    roots: tuple[Path, ...]
    suffixes: tuple[str, ...]
    files: list[TextFile] = field(default_factory=list)
    passed_over: collections.Counter[str] = field(default_factory=collections.Counter)
    """Number of files that are not trained on, by reason."""
    mended: int = 0
    """Files of `files` with bytes that are no UTF-8, each of which is read as U+FFFD."""

    @property
    def digest(self) -> str:
        """sha256 of names, sizes and contents: equal texts have equal ones, wherever they lie."""
        entries = [[file.name, file.size, file.sha256] for file in self.files]
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()

    def describe(self) -> str:
        """What was looked for, where, and what was found."""
        size = sum(file.size for file in self.files)
        found = f"{len(self.files)} files with {size:,} bytes of text"
        passed = ", ".join(f"{count} {reason}" for reason, count in sorted(self.passed_over.items()) if count)
        looked = f"{', '.join(self.suffixes)} in {', '.join(map(str, self.roots))}"
        mended = f"; {self.mended} with bytes that are no UTF-8 and read as U+FFFD" if self.mended else ""
        return f"looked for {looked}: {found}{mended}" + (f"; passed over: {passed}" if passed else "")


def standard_library() -> Path:
    """The folder of this interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def find_text(roots: Sequence[Path], check: Callable[[], None] = lambda: None) -> Text:
    """All text below the roots, which are folders or files; none: the *.py of the standard library.

    check: called now and then, to raise. Raises ValueError for a root that is not there or cannot be read.
    """
    text = Text(tuple(root.expanduser().absolute() for root in roots), SUFFIXES)
    if not roots:
        text = Text((standard_library().resolve(),), (".py",))
    seen: set[str] = set()
    for root in text.roots:
        for path, name in _candidates(root, text):
            check()
            _take(path, name, text, seen, named=path == root)
    return text


def _candidates(root: Path, text: Text) -> Iterator[tuple[Path, str]]:
    if not root.exists():
        raise ValueError(f"{root} is not there; name a folder or a file of text ({', '.join(text.suffixes)})")
    if not root.is_dir():
        if root.suffix.lower() not in text.suffixes:
            raise ValueError(
                f"{root} is no text file that we know; give one of {', '.join(text.suffixes)}, or a folder"
            )
        yield root, root.name
        return
    if not os.access(root, os.R_OK | os.X_OK):
        raise ValueError(f"{root} cannot be read; change its rights, or name another folder")
    yield from sorted(_below(root, text), key=lambda found: found[1])


def _below(root: Path, text: Text) -> Iterator[tuple[Path, str]]:
    """Paths of what has the name of a text file, and what they are below the root."""

    def unreadable(_: OSError) -> None:
        text.passed_over["unreadable folders"] += 1

    for folder, folders, files in os.walk(root, onerror=unreadable):
        skipped = sorted(SKIPPED & set(folders))
        text.passed_over.update(f"folders named {name}" for name in skipped)
        text.passed_over["links to folders"] += sum(Path(folder, name).is_symlink() for name in folders)
        for name in folders:
            if name not in SKIPPED and name.lower().endswith(text.suffixes):
                text.passed_over["folders named like files"] += 1
        folders[:] = [name for name in folders if name not in skipped]
        for name in files:
            if name.lower().endswith(text.suffixes):
                path = Path(folder, name)
                yield path, path.relative_to(root).as_posix()


def _take(path: Path, name: str, text: Text, seen: set[str], *, named: bool) -> None:
    try:
        contents = read_regular(path)
    except OSError as error:
        if named:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
        text.passed_over["not regular readable files"] += 1
        return
    sha256 = hashlib.sha256(contents).hexdigest()
    if not contents.strip():
        text.passed_over["empty"] += 1
    elif sha256 in seen:
        text.passed_over["with contents seen before"] += 1
    elif _is_binary(contents):
        if named:
            raise ValueError(f"{path} holds zero bytes and is no text; give text in UTF-8, unpacked")
        text.passed_over["no text (zero bytes in it)"] += 1
    else:
        seen.add(sha256)
        text.mended += not _is_sound(contents)
        text.files.append(TextFile(path, name, len(contents), sha256))


def _encoding(contents: bytes) -> str | None:
    return next((encoding for mark, encoding in MARKS.items() if contents.startswith(mark)), None)


def _is_binary(contents: bytes) -> bool:
    return b"\0" in contents and _encoding(contents) in (None, "utf-8-sig")


def _is_sound(contents: bytes) -> bool:
    try:
        contents.decode(_encoding(contents) or "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def read_regular(path: Path) -> bytes:
    """The whole file. Raises OSError at once for anything but a regular file that can be read, a pipe too."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(0, "not a regular file", str(path))
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(0, "not a regular file", str(path))
        return file.read()


def documents(file: TextFile) -> Iterator[tuple[str, str]]:
    """Name and text of each document: the file, or each line of a .jsonl. Text is UTF-8 unless a mark at its start says
    UTF-16 or UTF-32; bytes that are none are replaced.

    Raises ValueError where the file is not what was found, or a line holds no text.
    """
    try:
        contents = read_regular(file.path)
    except OSError as error:
        raise ValueError(f"{file.path} cannot be read any more: {error.strerror or error}") from error
    if hashlib.sha256(contents).hexdigest() != file.sha256:
        raise ValueError(f"{file.path} has changed while it was read; start again when it is complete")
    text = contents.decode(_encoding(contents) or "utf-8", errors="replace")
    if file.path.suffix.lower() != ".jsonl":
        yield file.name, text
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{file.name}:{number}", _text_of(line, f"{file.path}, line {number}")


def _text_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise ValueError(f'{where} has no "text" that is a string; give each line as {{"text": "..."}}')  # noqa: TRY004
    # JSON can spell half of a surrogate pair, which no UTF-8 holds.
    return str(value["text"]).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
