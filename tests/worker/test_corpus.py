"""The corpus is a function of its files: whole files on either side, each content once, the same on every worker."""

import hashlib
import random
import subprocess
import sys

import numpy as np
import pytest

from engrid.worker.corpus import END, prepare, split_files
from engrid.worker.trainer import Batches
from tests.worker.conftest import tiny_config

WORDS = [
    f"{first}{second}" for first in ("al", "be", "cu", "do", "em") for second in ("ra", "ti", "no", "sk", "pu", "é世")
]

MAKER = """
from pathlib import Path
from engrid.worker.corpus import prepare
folder, root = arguments
print("ready", flush=True)
input()
corpus = prepare(Path(folder), vocab_size=320, root=Path(root))
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


def relative(root, paths):
    return [path.relative_to(root).as_posix() for path in paths]


def texts_of(corpus, tokens):
    """The files, cut at the END tokens and decoded."""
    end = corpus.tokenizer.token_to_id(END)
    ends = np.flatnonzero(tokens == end)
    assert ends[-1] == len(tokens) - 1, "the last file is closed too"
    pieces = np.split(tokens.astype(int), ends + 1)[:-1]
    return [corpus.tokenizer.decode(piece[:-1].tolist(), skip_special_tokens=False) for piece in pieces]


def test_whole_files_are_chosen_by_the_hash_of_their_path_alone(root):
    train, validation = (relative(root, paths) for paths in split_files(root))
    assert sorted(train + validation) == sorted(NAMES)
    assert validation == sorted(name for name in NAMES if is_validation(name))
    assert 0 < len(validation) < len(NAMES) / 4

    elsewhere = write(root.parent / "other", {name: source(-len(name)) + name for name in [*NAMES, "more.py"]})
    again = relative(elsewhere, split_files(elsewhere)[1])
    assert [name for name in again if name != "more.py"] == validation, "neither contents nor other files count"


def test_tests_and_installed_packages_are_left_out(root):
    left_out = ["test/a.py", "sub/tests/b.py", "site-packages/c.py", "__pycache__/d.py", "notes.txt", "sub/e.pyc"]
    write(root, {name: source(name) for name in left_out} | {"test_f.py": source("f"), "empty.py": " \n\n"})
    found = [name for paths in split_files(root) for name in relative(root, paths)]
    assert sorted(found) == sorted([*NAMES, "test_f.py"])


def test_identical_contents_count_once_even_across_the_two_sides(root):
    one, other = next(name for name in NAMES if is_validation(name)), next(n for n in NAMES if not is_validation(n))
    write(root, {f"zz/{index}.py": (root / name).read_bytes() for name in (one, other) for index in range(30)})
    write(root, {f"aa/{index}.py": b"same = 1\n" for index in range(30)})
    train, validation = split_files(root)
    contents = [path.read_bytes() for path in train + validation]
    assert len(set(contents)) == len(contents) == len(NAMES) + 1


def test_files_lie_end_to_end_each_closed_by_the_end_token(root, tmp_path):
    corpus = prepare(tmp_path / "out", vocab_size=400, root=root)
    train, validation = split_files(root)
    assert texts_of(corpus, corpus.train) == [path.read_text() for path in train]
    assert texts_of(corpus, corpus.validation) == [path.read_text() for path in validation]
    assert corpus.files == (len(train), len(validation))
    assert corpus.text_bytes == sum((root / name).stat().st_size for name in NAMES)
    assert corpus.tokenizer.get_vocab_size() == 400
    assert corpus.train.max() < 400


def test_no_window_of_the_validation_files_is_trained_on(root, tmp_path):
    corpus = prepare(tmp_path / "out", vocab_size=400, root=root)
    seen = {window.tobytes() for window in np.lib.stride_tricks.sliding_window_view(corpus.train, 24)}
    windows = np.lib.stride_tricks.sliding_window_view(corpus.validation, 24)
    assert not any(window.tobytes() in seen for window in windows)
    learned = prepare(tmp_path / "more", vocab_size=400, root=root)
    assert learned.tokenizer.to_str() == corpus.tokenizer.to_str()


def test_tokenizer_is_learned_from_training_files_alone(root, tmp_path):
    before = prepare(tmp_path / "before", vocab_size=400, root=root)
    name = next(name for name in NAMES if is_validation(name))
    write(root, {name: "zygote quixotic " * 500})
    after = prepare(tmp_path / "after", vocab_size=400, root=root)
    assert after.tokenizer.to_str() == before.tokenizer.to_str()
    assert np.array_equal(after.train, before.train)
    assert not np.array_equal(after.validation, before.validation)


def test_text_that_spells_a_special_token_is_text(root, tmp_path):
    """END stands for the end of a file, not for the five characters in its middle."""
    write(root, {"marks.py": 'PAD, END = "<pad>", "<end>"\n' + source("marks")})
    corpus = prepare(tmp_path / "out", vocab_size=400, root=root)
    files = sum(corpus.files)
    ends = sum(int((tokens == corpus.tokenizer.token_to_id(END)).sum()) for tokens in (corpus.train, corpus.validation))
    assert ends == files
    assert not (corpus.train == 0).any(), "nor is pad in the text"


def test_bytes_that_are_no_text_are_replaced(root, tmp_path):
    write(root, {"latin.py": "naïve = 1\n".encode("latin-1") + source("latin").encode()})
    corpus = prepare(tmp_path / "out", vocab_size=400, root=root)
    both = texts_of(corpus, corpus.train) + texts_of(corpus, corpus.validation)
    assert sum(text.startswith("na\ufffdve = 1") for text in both) == 1


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


def test_corpus_made_twice_is_the_same_bytes(root, tmp_path):
    first, second = (prepare(tmp_path / name, vocab_size=400, root=root) for name in "ab")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert first.digest == second.digest
    moved = write(tmp_path / "moved", {name: (root / name).read_bytes() for name in reversed(NAMES)})
    assert prepare(tmp_path / "c", vocab_size=400, root=moved).digest == first.digest
    write(root, {NAMES[0]: source("another")})
    assert prepare(tmp_path / "d", vocab_size=400, root=root).digest != first.digest


def test_corpus_kept_is_read_and_other_sizes_and_texts_are_made_beside_it(root, tmp_path):
    out = tmp_path / "out"
    first = prepare(out, vocab_size=400, root=root)
    other = write(tmp_path / "other", {name: source(name * 2) for name in NAMES})
    assert prepare(out, vocab_size=350, root=root).tokenizer.get_vocab_size() == 350
    assert prepare(out, vocab_size=400, root=other).digest != first.digest
    for path in root.rglob("*.py"):
        path.unlink()
    kept = prepare(out, vocab_size=400, root=root)
    assert kept.digest == first.digest
    assert np.array_equal(kept.train, first.train)


@pytest.mark.parametrize("vocab_size", [0, 299, 65_537])
def test_vocabulary_out_of_bounds_is_refused_by_name(root, tmp_path, vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size {vocab_size}: give 300 to 65536"):
        prepare(tmp_path / "out", vocab_size=vocab_size, root=root)


def test_too_few_files_are_refused_with_their_number(tmp_path):
    lone = write(tmp_path / "lone", {next(name for name in NAMES if not is_validation(name)): source(1)})
    with pytest.raises(ValueError, match="holds 1 training and 0 validation files"):
        prepare(tmp_path / "out", vocab_size=300, root=lone)
    with pytest.raises(ValueError, match="holds 0 training and 0 validation files"):
        prepare(tmp_path / "out", vocab_size=300, root=tmp_path / "nowhere")
    assert not list((tmp_path / "out").glob("corpus-*")), "nothing is left behind"


def test_too_little_text_for_the_vocabulary_is_refused(tmp_path):
    """A model of 4,096 ids over a tokenizer of fewer draws ids that nothing spells."""
    tiny = write(tmp_path / "tiny", {name: f"x = {index}\n" for index, name in enumerate(NAMES)})
    with pytest.raises(ValueError, match="vocab"):
        prepare(tmp_path / "out", vocab_size=4096, root=tiny)


def test_text_shorter_than_a_window_is_refused_with_its_size(tmp_path):
    short = write(tmp_path / "short", {name: source(name, 1) for name in NAMES[:40]})
    corpus = prepare(tmp_path / "out", vocab_size=300, root=short)
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
    makers = [subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, text=True) for _ in range(4)]
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
    alone = prepare(tmp_path / "alone", vocab_size=320, root=root)
    assert set(said) == {f"{alone.digest} {len(alone.train)} 320\n"}
    assert len(list(out.glob("corpus-*"))) == 1
    assert files_of(out) == files_of(tmp_path / "alone")
    assert not list(out.glob(".corpus-*")), "no half-made corpus is left"
