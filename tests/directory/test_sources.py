"""A path is never read as a URL, nor a URL as a path; what might be either is refused."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrid.directory import FileDirectory, ShardSource, folder_source, masked, open_directory, read_source, redis_url
from engrid.directory.sources import FolderSource, RedisSource
from tests.conformance.directory import record

HOSTILE = [
    "a#1", "q?x", "a%20b", "a b", "%2e%2e", "localhost:6379", "redis:x", "file:x", ".hidden", "~", "~root", "-x", "a@b",
    "ü", "\u202e", "a\nb", "a\tb", " a ", "a\\b", "[x]", "a;b", "a&b=c", "*", "'", '"', "\udcff",
]  # fmt: skip
NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..")
)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_folder_is_met_under_its_own_name_whatever_that_is(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    open_directory(folder_source(folder)).register(record())
    assert [os.fsencode(each.name) for each in tmp_path.iterdir()] == [os.fsencode(name)]
    for source in (folder, f"file:{folder}", str(folder)):
        assert open_directory(source).shards() == {"s0": record()}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_relative_path_object_is_that_folder(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    open_directory(Path(name)).register(record())
    assert open_directory(folder_source(Path(name))).shards() == {"s0": record()}
    assert (tmp_path / name / "directory.json").exists()


@given(st.lists(NAMES, min_size=1, max_size=4))
def test_every_path_comes_back_from_the_text_made_of_it(names: list[str]) -> None:
    path = Path("/", *names)
    assert read_source(folder_source(path)) == FolderSource(path)
    assert read_source(f"file:{path}") == read_source(path) == FolderSource(path)


@pytest.mark.parametrize("source", [None, 7, b"/run/x", ["/run/x"]])
def test_what_is_neither_text_nor_a_path_is_refused(source: Any) -> None:
    with pytest.raises(TypeError, match="give a path object or text, not"):
        read_source(source)


def test_two_slashes_at_the_start_are_one() -> None:
    assert folder_source(Path("//tmp/x")) == "file:/tmp/x"


@pytest.mark.parametrize("text", ["/run/x", "./x", "../x", "runs/x", "./localhost:6379", ".", ".x/y", "runs/a:b"])
def test_a_plain_path_is_a_folder(text: str) -> None:
    assert read_source(text) == FolderSource(Path(text))


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert read_source("~/x") == FolderSource(Path("/home/someone/x"))


@pytest.mark.parametrize("text", ["localhost:6379", "10.0.0.1:1", "[::1]:7000", "memory-0.svc.local:65535"])
def test_an_address_is_a_shard_to_a_client_and_no_directory(text: str) -> None:
    assert read_source(text) == ShardSource(text)
    with pytest.raises(ValueError, match=r"is an address: give redis://.* for Redis, or \./"):
        open_directory(text)


@pytest.mark.parametrize("text", ["redis://h", "redis://:pw@h:1/3?prefix=x", "rediss://h:1", "unix:///run/r.sock?db=1"])
def test_a_url_of_redis_is_redis(text: str) -> None:
    assert read_source(text) == RedisSource(text)
    assert redis_url(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "name", "localhost", "localhost:", ":6379", "localhost:0", "localhost:70000", "localhost:6379/0", "a:b/c",
        "me:pw@localhost:6379", "http://host/x", "https://h", "file:", "file://host/x", "file:///x", "//host/x", "Redis://h",
        "redis:h", "redis:/h:1", "redis//h", "ipv4:1.2.3.4:5", "dns:///h:1", "unix:/x", "::1:7000", "a\0b", "/a\0b",
        "local host:1", "localhost:6379\n", " redis://h", "redis://", "redis:///0", "redis://h:x", "redis://h:0",
        "redis://h/db", "redis://h/0/1", "redis://h#1", "redis://h\n", "redis://h?prefix=", "redis://h?x", "unix://",
        "redis://:a#b@h", "redis://:a/b@h:1",
    ],
)  # fmt: skip
def test_what_is_neither_is_refused(text: str) -> None:
    for read in (read_source, open_directory):
        with pytest.raises(ValueError, match=r"give|write"):
            read(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("unix://run/r.sock", "three slashes"),
        ("redis://my host:1", "names no host"),
        ("redis://a,b:1", "names no host"),
        ("redis://${REDIS}", "names no host"),
        ("redis://h?db=1&db=2", "twice"),
        ("redis://h/1?db=2", "two databases"),
        ("redis://h?db=", "is no number"),
        ("redis://h?db=-1", "is no number"),
        ("redis://h?host=other", "host is no option"),
        ("redis://h?port=1", "port is no option"),
        ("redis://h?socket_timeout=0", "number of seconds"),
        ("redis://h?socket_timeout=nan", "number of seconds"),
    ],
)
def test_a_url_that_redis_py_would_take_for_another_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        redis_url(text)
    with pytest.raises(ValueError, match=words):
        read_source(text)


@pytest.mark.parametrize("text", ["", "name", "/run/x", "file:/run/x", "./localhost:6379", "localhost", "http://h:1"])
def test_an_option_for_redis_takes_no_folder(text: str) -> None:
    with pytest.raises(ValueError, match=r"names no Redis: give redis://HOST:PORT"):
        redis_url(text)


def test_an_option_for_redis_takes_an_address_as_redis() -> None:
    assert redis_url("localhost:6379") == "redis://localhost:6379"
    assert redis_url("[::1]:6379") == "redis://[::1]:6379"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@h:1/0", "redis://***@h:1/0"),
        ("redis://me:secret@h:1?prefix=x", "redis://***@h:1?prefix=x"),
        ("rediss://:se@cret@h", "rediss://***@h"),
        ("redis://h?password=secret&prefix=x", "redis://h?password=***&prefix=x"),
        ("unix:///s?db=1&password=secret", "unix:///s?db=1&password=***"),
        ("me:secret@h:1", "***@h:1"),
        ("redis://h:1/0?prefix=x", "redis://h:1/0?prefix=x"),
        ("file:/a@b", "file:/a@b"),
    ],
)
def test_a_password_is_not_shown(url: str, shown: str) -> None:
    assert masked(url) == shown


@pytest.mark.parametrize(
    "url", ["redis://:secret#@h:1", "redis://:secret@h:x", "redis://:secret@h/db", "redis://:secret@", "me:secret@h:1",
            "redis://:secret/@h", "redis://h:1?password=secret&foo=1", "redis://:secret@h?socket_timeout=x"]
)  # fmt: skip
def test_a_refusal_shows_no_password(url: str) -> None:
    with pytest.raises(ValueError, match=r"give|write|does not take") as refused:
        open_directory(url)
    assert "secret" not in str(refused.value)


def test_a_file_directory_is_opened_for_a_folder(tmp_path: Path) -> None:
    assert isinstance(open_directory(tmp_path), FileDirectory)
