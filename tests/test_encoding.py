"""Every text file of ours is UTF-8, read and written so, whatever the locale says."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shards import local_shards

ROOT = Path(__file__).parents[1]
SOURCES = ("proto", "model", "services", "cluster", "benchmarks")
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

ROUND_TRIP = """
import locale, sys
from pathlib import Path
from engrid.worker.train.corpus import END, prepare, split_documents
from engrid.worker.train.text import find_text
folder = Path(arguments[0])
assert locale.getpreferredencoding(False).lower().replace("-", "") in arguments[1], locale.getpreferredencoding(False)
first = prepare(folder / "out", vocab_size=310, roots=[folder / "text"])
again = prepare(folder / "out", vocab_size=310, roots=[folder / "text"])
for corpus in (first, again):
    for file in find_text([folder / "text"]).files:
        text = file.path.read_bytes().decode()
        ids = corpus.tokenizer.encode(text, add_special_tokens=False).ids
        assert corpus.tokenizer.decode(ids, skip_special_tokens=False) == text, file.name
    whole = "".join(split_documents(corpus.text)[0]())
    end = corpus.tokenizer.token_to_id(END)
    assert corpus.tokenizer.decode(corpus.train[corpus.train != end].tolist(), skip_special_tokens=False) == whole
print(first.digest)
"""


def without_encoding(call):
    """Whether a call reads or writes text in whatever encoding the locale has."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in given:
        return False
    if name == "read_text":
        return not call.args
    if name == "write_text":
        return len(call.args) < 2
    if name == "open":
        modes = [each.value for each in (*call.args, *given.values()) if isinstance(each, ast.Constant)]
        plain = isinstance(call.func, ast.Name)
        return any(re.fullmatch("[rwax]t?[+]?", str(mode)) for mode in modes) or (
            plain and "b" not in "".join(map(str, modes))
        )
    return any(isinstance(given.get(key), ast.Constant) and given[key].value for key in ("text", "universal_newlines"))


@pytest.mark.parametrize("root", SOURCES)
def test_every_text_file_and_pipe_of_ours_names_its_encoding(root):
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / root).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Call) and without_encoding(node)
    ]
    assert not found


@pytest.fixture(scope="module")
def latin(tmp_path_factory):
    """The environment of a locale of one byte a character, made for the test as few machines have it."""
    folder = tmp_path_factory.mktemp("locales")
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "en_US.ISO-8859-1")]
    try:
        made = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        made = False
    if not made and not (folder / "en_US.ISO-8859-1" / "LC_CTYPE").exists():
        pytest.skip("no localedef, or no definition of en_US.ISO-8859-1, on this machine")
    return {"LOCPATH": str(folder), "LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0"}


@pytest.fixture(params=["ascii", "latin"])
def narrow(request):
    """The environment of a locale that is not UTF-8."""
    return {**os.environ, **(ASCII if request.param == "ascii" else request.getfixturevalue("latin"))}


def test_a_tokenizer_learned_and_read_in_a_narrow_locale_spells_every_text(narrow, tmp_path):
    for index in range(30):
        path = tmp_path / "text" / f"f{index}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"x{index} = 'naïve  é 世界 🙂 \u00a0\t {index}'\n".encode() * 20)
    arguments = [str(tmp_path), ["ascii", "ansi_x3.41968", "iso88591"]]
    script = f"import sys; sys.path[:] = {sys.path!r}; arguments = {arguments!r}\n{ROUND_TRIP}"
    command = [sys.executable, "-c", script]
    said = [
        subprocess.run(command, capture_output=True, timeout=100, check=False, env=env, cwd=tmp_path)
        for env in (narrow, {**narrow, "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"})
    ]
    assert said[0].returncode == 0, said[0].stderr.decode()
    assert said[1].stderr.decode().count("AssertionError") == 1, "the child looks at its locale"


def test_the_command_line_prints_what_its_terminal_cannot_show(narrow, tmp_path):
    command = [sys.executable, "-m", "engrid.cli.app"]

    def run(*arguments):
        return subprocess.run(
            [*command, *arguments], capture_output=True, timeout=100, check=False, env={**narrow, "COLUMNS": "60"}
        )

    assert run("--help").returncode == 0
    unspoken = run("generate", "é 世界", "--run-dir", str(tmp_path / "nothing"))
    assert b"no cluster is up" in unspoken.stderr
    missing = run("checkpoint", "list", "--folder", str(tmp_path / "世界"))
    assert missing.returncode == 1
    assert b"is no folder" in missing.stderr
    assert b"Traceback" not in missing.stderr
    with local_shards(tmp_path / "run", 1):
        shown = run("status", "--run-dir", str(tmp_path / "run"))
        assert shown.returncode == 0, shown.stderr.decode("latin-1")
        assert b"s0" in shown.stdout
