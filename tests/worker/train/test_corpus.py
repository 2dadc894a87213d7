"""The corpus is a function of its files: whole files on either side, each content once, the same on every worker."""

import fcntl
import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from engrid.rpc.errors import CancelledError
from engrid.worker.train.corpus import END, prepare, split_documents
from engrid.worker.train.stopping import Stopping
from engrid.worker.train.text import documents, find_text
from engrid.worker.train.trainer import Batches
from tests.worker.conftest import tiny_config

WORDS = [
    f"{first}{second}" for first in ("al", "be", "cu", "do", "em") for second in ("ra", "ti", "no", "sk", "pu", "é世")
]

MAKER = """
from pathlib import Path
from engrid.worker.train.corpus import prepare
folder, root = arguments
print("ready", flush=True)
input()
corpus = prepare(Path(folder), vocab_size=320, roots=[Path(root)])
print(corpus.digest, len(corpus.train), corpus.tokenizer.get_vocab_size())
"""


def source(seed, lines=12):
    """Text that no other seed gives."""
    rng = random.Random(seed)
    return "".join(f"{' '.join(rng.choices(WORDS, k=8))} = {rng.random()}\n" for _ in range(lines))


def is_validation(relative):
    return int.from_bytes(hashlib.sha256(relative.encode()).digest()[:8], "big") % 10 == 0


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


NAMES = [f"{folder}{index}.py" for folder in ("", "sub/", "sub/deep/") for index in range(20)]


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "text", {name: source(name) for name in NAMES})


def names_of(root):
    return [file.name for file in find_text([root]).files]


def texts_of(corpus, tokens):
    """The files, cut at the END tokens and decoded."""
    end = corpus.tokenizer.token_to_id(END)
    ends = np.flatnonzero(tokens == end)
    assert ends[-1] == len(tokens) - 1, "the last file is closed too"
    pieces = np.split(tokens.astype(int), ends + 1)[:-1]
    return [corpus.tokenizer.decode(piece[:-1].tolist(), skip_special_tokens=False) for piece in pieces]


def test_whole_files_are_chosen_by_the_hash_of_their_path_alone(root):
    def validation(folder):
        text = find_text([folder])
        chosen = list(split_documents(text)[1]())
        return [file.name for file in text.files if file.path.read_text(encoding="utf-8") in chosen]

    assert names_of(root) == sorted(NAMES)
    chosen = validation(root)
    assert chosen == sorted(name for name in NAMES if is_validation(name))
    assert 0 < len(chosen) < len(NAMES) / 4
    elsewhere = write(root.parent / "other", {name: source(-len(name)) + name for name in [*NAMES, "more.py"]})
    again = validation(elsewhere)
    assert [name for name in again if name != "more.py"] == chosen, "neither contents nor other files count"


def test_tests_installed_packages_and_what_is_no_text_are_left_out_and_counted(root):
    left_out = ["test/a.py", "sub/tests/b.py", "site-packages/c.py", "__pycache__/d.py", "sub/e.pyc", "data.bin"]
    write(root, {name: source(name) for name in left_out} | {"test_f.py": source("f"), "empty.py": " \n\n"})
    text = find_text([root])
    assert sorted(file.name for file in text.files) == sorted([*NAMES, "test_f.py"])
    assert text.passed_over["folders named tests"] == text.passed_over["empty"] == 1
    assert "looked for .py, .txt, .md, .jsonl in" in text.describe()
    assert f"{len(NAMES) + 1} files" in text.describe()


def test_identical_contents_count_once_even_across_the_two_sides(root):
    one, other = next(name for name in NAMES if is_validation(name)), next(n for n in NAMES if not is_validation(n))
    write(root, {f"zz/{index}.py": (root / name).read_bytes() for name in (one, other) for index in range(30)})
    write(root, {f"aa/{index}.py": b"same = 1\n" for index in range(30)})
    contents = [file.path.read_bytes() for file in find_text([root]).files]
    assert len(set(contents)) == len(contents) == len(NAMES) + 1


def test_what_is_no_regular_readable_file_is_passed_over_and_counted(root):
    """A dangling link, a folder named like a file, a pipe, a device, and a file that cannot be read though it is there."""
    (root / ".#a.py").symlink_to("nowhere")
    (root / "loop.py").symlink_to("loop.py")
    write(root / "discord.py", {"inner.py": source("inner")})
    os.mkfifo(root / "pipe.py")
    (root / "null.py").symlink_to("/dev/null")
    (root / "memory.py").symlink_to("/proc/self/mem")
    (root / "around").symlink_to(root)
    text = find_text([root])
    assert [file.name for file in text.files] == sorted([*NAMES, "discord.py/inner.py"])
    assert text.passed_over["not regular readable files"] == 5
    assert text.passed_over["folders named like files"] == text.passed_over["links to folders"] == 1
    assert "5 not regular readable files" in text.describe()
    for name, words in (("pipe.py", "not a regular file"), (".#a.py", "is not there"), ("memory.py", "cannot be read")):
        with pytest.raises(ValueError, match=f"{re.escape(name)} .*{words}"):
            find_text([root / name])


def test_files_of_every_kind_and_lines_of_a_jsonl_are_documents(tmp_path):
    lines = [{"text": source(f"line {index}"), "id": index} for index in range(40)]
    write(
        tmp_path / "text",
        {
            "a.txt": source("a"),
            "b.MD": source("b"),
            "c.py": source("c"),
            "d.jsonl": "\n\n".join(map(json.dumps, lines)),
        },
    )
    corpus = prepare(tmp_path / "out", vocab_size=320, roots=[tmp_path / "text"])
    both = texts_of(corpus, corpus.train) + texts_of(corpus, corpus.validation)
    assert sorted(both) == sorted([*(line["text"] for line in lines), *map(source, "abc")])
    assert corpus.files == (len(texts_of(corpus, corpus.train)), len(texts_of(corpus, corpus.validation)))
    one = prepare(tmp_path / "out", vocab_size=320, roots=[tmp_path / "text" / "d.jsonl", tmp_path / "text" / "a.txt"])
    assert sum(one.files) == 41


@pytest.mark.parametrize(
    ("line", "words"),
    [('{"text": 3}', 'has no "text"'), ("[]", 'has no "text"'), ("{", "is no JSON"), ("{}", "no .text")],
)
def test_a_line_without_text_is_named(tmp_path, line, words):
    write(tmp_path, {"d.jsonl": '{"text": "fine \\ud800 half"}\n' + line})
    with pytest.raises(ValueError, match=f"d.jsonl, line 2 .*{words}"):
        prepare(tmp_path / "out", vocab_size=300, roots=[tmp_path / "d.jsonl"])


def test_a_single_file_is_cut_in_two_at_a_line(tmp_path):
    whole = source("one", 400)
    path = write(tmp_path, {"book.txt": whole}) / "book.txt"
    corpus = prepare(tmp_path / "out", vocab_size=320, roots=[path])
    (train,), (validation,) = texts_of(corpus, corpus.train), texts_of(corpus, corpus.validation)
    assert train + validation == whole
    assert train.endswith("\n")
    assert 0.08 < len(validation) / len(whole) < 0.21


def test_files_lie_end_to_end_each_closed_by_the_end_token(root, tmp_path):
    corpus = prepare(tmp_path / "out", vocab_size=400, roots=[root])
    train, validation = (list(side()) for side in split_documents(find_text([root])))
    assert texts_of(corpus, corpus.train) == train
    assert texts_of(corpus, corpus.validation) == validation
    assert corpus.files == (len(train), len(validation))
    assert corpus.text_bytes == sum((root / name).stat().st_size for name in NAMES)
    assert corpus.tokenizer.get_vocab_size() == 400
    assert corpus.train.max() < 400


def test_no_window_of_the_validation_files_is_trained_on(root, tmp_path):
    corpus = prepare(tmp_path / "out", vocab_size=400, roots=[root])
    seen = {window.tobytes() for window in np.lib.stride_tricks.sliding_window_view(corpus.train, 24)}
    windows = np.lib.stride_tricks.sliding_window_view(corpus.validation, 24)
    assert not any(window.tobytes() in seen for window in windows)
    learned = prepare(tmp_path / "more", vocab_size=400, roots=[root])
    assert learned.tokenizer.to_str() == corpus.tokenizer.to_str()


def test_tokenizer_is_learned_from_training_files_alone(root, tmp_path):
    before = prepare(tmp_path / "before", vocab_size=400, roots=[root])
    name = next(name for name in NAMES if is_validation(name))
    write(root, {name: "zygote quixotic " * 500})
    after = prepare(tmp_path / "after", vocab_size=400, roots=[root])
    assert after.tokenizer.to_str() == before.tokenizer.to_str()
    assert np.array_equal(after.train, before.train)
    assert not np.array_equal(after.validation, before.validation)


def test_text_that_spells_a_special_token_is_text(root, tmp_path):
    """END stands for the end of a file, not for the five characters in its middle."""
    write(root, {"marks.py": 'PAD, END = "<pad>", "<end>"\n' + source("marks")})
    corpus = prepare(tmp_path / "out", vocab_size=400, roots=[root])
    files = sum(corpus.files)
    ends = sum(int((tokens == corpus.tokenizer.token_to_id(END)).sum()) for tokens in (corpus.train, corpus.validation))
    assert ends == files
    assert not (corpus.train == 0).any(), "nor is pad in the text"


def test_bytes_that_are_no_text_are_replaced(root, tmp_path):
    write(root, {"latin.py": "naïve = 1\n".encode("latin-1") + source("latin").encode()})
    corpus = prepare(tmp_path / "out", vocab_size=400, roots=[root])
    both = texts_of(corpus, corpus.train) + texts_of(corpus, corpus.validation)
    assert sum(text.startswith("na\ufffdve = 1") for text in both) == 1


def test_what_is_written_as_utf_16_or_with_a_mark_is_the_text_it_spells(tmp_path):
    marks = {"utf-8-sig", "utf-16", "utf-32"}
    write(tmp_path, {f"{name}.txt": f"{name}: naïve\n".encode(name) for name in marks})
    line = json.dumps({"text": "a line: naïve"}, ensure_ascii=False)
    write(tmp_path, {"lines.jsonl": f"{line}\r\n".encode("utf-16")})
    text = find_text([tmp_path])
    read = {document for file in text.files for _, document in documents(file)}
    assert read == {"a line: naïve"} | {f"{name}: naïve\n" for name in marks}
    assert text.mended == 0


def test_what_is_no_text_is_passed_over_and_what_is_not_utf_8_is_counted(tmp_path):
    packed = gzip.compress(source("packed").encode())
    write(tmp_path, {"packed.txt": packed, "a.txt": "naïve".encode("latin-1"), "b.txt": "naïve".encode()})
    text = find_text([tmp_path])
    assert [file.name for file in text.files] == ["a.txt", "b.txt"]
    assert "1 with bytes that are no UTF-8" in text.describe()
    assert "1 no text (zero bytes in it)" in text.describe()
    with pytest.raises(ValueError, match=r"packed\.txt holds zero bytes and is no text"):
        find_text([tmp_path / "packed.txt"])


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


def test_corpus_made_twice_is_the_same_bytes(root, tmp_path):
    first, second = (prepare(tmp_path / name, vocab_size=400, roots=[root]) for name in "ab")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert first.digest == second.digest
    moved = write(tmp_path / "moved", {name: (root / name).read_bytes() for name in reversed(NAMES)})
    assert prepare(tmp_path / "c", vocab_size=400, roots=[moved]).digest == first.digest
    write(root, {NAMES[0]: source("another")})
    assert prepare(tmp_path / "d", vocab_size=400, roots=[root]).digest != first.digest


def test_corpus_kept_is_read_and_other_sizes_and_texts_are_made_beside_it(root, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = prepare(out, vocab_size=400, roots=[root])
    other = write(tmp_path / "other", {name: source(name * 2) for name in NAMES})
    assert prepare(out, vocab_size=350, roots=[root]).tokenizer.get_vocab_size() == 350
    assert prepare(out, vocab_size=400, roots=[other]).digest != first.digest
    monkeypatch.setattr("engrid.worker.train.corpus._make", lambda *_: pytest.fail("made again"))
    kept = prepare(out, vocab_size=400, roots=[root])
    assert kept.digest == first.digest
    assert np.array_equal(kept.train, first.train)


CHANGES = {
    "another content of the same size": lambda root: flip(root / NAMES[3]),
    "a file more": lambda root: write(root, {"zz/new.py": source("new")}),
    "a file less": lambda root: (root / NAMES[3]).unlink(),
    "a file renamed": lambda root: (root / NAMES[3]).rename(root / "zz.py"),
}


def flip(path):
    contents, times = path.read_bytes(), path.stat()
    path.write_bytes(contents[:-2] + b"7\n")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == len(contents)
    assert path.read_bytes() != contents


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_text_is_never_read_from_what_was_kept(root, tmp_path, change):
    before = prepare(tmp_path / "out", vocab_size=400, roots=[root])
    CHANGES[change](root)
    after = prepare(tmp_path / "out", vocab_size=400, roots=[root])
    fresh = prepare(tmp_path / "fresh", vocab_size=400, roots=[root])
    assert after.text.digest == fresh.text.digest != before.text.digest
    assert after.digest == fresh.digest
    assert np.array_equal(after.train, fresh.train)
    assert np.array_equal(after.validation, fresh.validation)


DAMAGES = {
    "train.npy": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "validation.npy": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
    "tokenizer.json": lambda path: path.unlink(),
    "about.json": lambda path: path.write_text(path.read_text(encoding="utf-8")[:-5], encoding="utf-8"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_kept_corpus_that_is_damaged_is_made_anew(root, tmp_path, name):
    first = prepare(tmp_path / "out", vocab_size=400, roots=[root])
    (kept,) = (tmp_path / "out").glob("corpus-*")
    DAMAGES[name](kept / name)
    again = prepare(tmp_path / "out", vocab_size=400, roots=[root])
    assert again.digest == first.digest
    assert np.array_equal(again.train, first.train)
    assert np.array_equal(again.validation, first.validation)
    assert not list((tmp_path / "out").glob(".corpus-*"))


def test_a_file_that_changes_while_it_is_read_is_named(root):
    text = find_text([root])
    flip(root / NAMES[3])
    with pytest.raises(ValueError, match=f"{NAMES[3]} has changed while it was read"):
        list(split_documents(text)[0]())


def test_making_a_corpus_and_waiting_for_another_maker_can_be_cancelled(root, tmp_path):
    stopping = Stopping()
    stopping.cancel()
    with pytest.raises(CancelledError):
        prepare(tmp_path / "out", vocab_size=400, roots=[root], stopping=stopping)
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".corpus.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stopping = Stopping()
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(prepare, tmp_path / "out", vocab_size=400, roots=[root], stopping=stopping)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.2)
            stopping.cancel()
            with pytest.raises(CancelledError):
                waiting.result(timeout=20)


@pytest.mark.parametrize("vocab_size", [0, 299, 65_537])
def test_vocabulary_out_of_bounds_is_refused_by_name(root, tmp_path, vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size {vocab_size}: give 300 to 65536"):
        prepare(tmp_path / "out", vocab_size=vocab_size, roots=[root])


def test_no_text_is_refused_saying_what_was_looked_for(tmp_path):
    write(tmp_path / "lone", {"a.rst": source(1), "empty.py": "\n"})
    with pytest.raises(ValueError, match=r"no text to train on: looked for \.py, .*/lone: 0 files .* 1 empty"):
        prepare(tmp_path / "out", vocab_size=300, roots=[tmp_path / "lone"])
    with pytest.raises(ValueError, match="nowhere is not there"):
        prepare(tmp_path / "out", vocab_size=300, roots=[tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"a\.rst is no text file that we know; give one of \.py"):
        prepare(tmp_path / "out", vocab_size=300, roots=[tmp_path / "lone" / "a.rst"])
    write(tmp_path / "short", {"a.txt": "x"})
    with pytest.raises(ValueError, match="too little text"):
        prepare(tmp_path / "out", vocab_size=300, roots=[tmp_path / "short"])
    assert not list((tmp_path / "out").glob("corpus-*")), "nothing is left behind"


def test_too_little_text_for_the_vocabulary_is_refused(tmp_path):
    """A model of 4,096 ids over a tokenizer of fewer draws ids that nothing spells."""
    tiny = write(tmp_path / "tiny", {name: f"x = {index}\n" for index, name in enumerate(NAMES)})
    with pytest.raises(ValueError, match="vocab"):
        prepare(tmp_path / "out", vocab_size=4096, roots=[tiny])


def test_text_shorter_than_a_window_is_refused_with_its_size(tmp_path):
    short = write(tmp_path / "short", {name: source(name, 1) for name in NAMES[:40]})
    corpus = prepare(tmp_path / "out", vocab_size=300, roots=[short])
    config = tiny_config(tmp_path / "out")
    cut = type(corpus)(**{**vars(corpus), "train": corpus.train[: config.length]})
    with pytest.raises(ValueError, match=f"has {config.length} tokens, fewer than one window"):
        Batches(config, cut, 0, 1)
    whole = type(corpus)(**{**vars(corpus), "train": corpus.train[: config.length + 1]})
    assert Batches(config, whole, 0, 1).at(1).shape == (4, config.length + 1)


def test_concurrent_makers_make_one_corpus_that_is_whole(root, tmp_path):
    out, pipe = tmp_path / "out", subprocess.PIPE
    arguments = [str(out), str(root)]
    script = f"import sys; sys.path[:] = {sys.path!r}; arguments = {arguments!r}\n{MAKER}"
    makers = [
        subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, encoding="utf-8") for _ in range(4)
    ]
    try:
        for maker in makers:
            assert maker.stdout.readline() == "ready\n"
        for maker in makers:
            maker.stdin.write("go\n")
            maker.stdin.flush()
        said = [maker.communicate(timeout=60)[0] for maker in makers]
        assert [maker.returncode for maker in makers] == [0] * 4
    finally:
        for maker in makers:
            maker.kill()
            maker.communicate()
    alone = prepare(tmp_path / "alone", vocab_size=320, roots=[root])
    assert set(said) == {f"{alone.digest} {len(alone.train)} 320\n"}
    assert len(list(out.glob("corpus-*"))) == 1
    assert files_of(out) == files_of(tmp_path / "alone")
    assert not list(out.glob(".corpus-*")), "no half-made corpus is left"
