import fcntl
import os
import signal
from pathlib import Path

import pytest

from engrid.directory import (
    EMPTY_PLACEMENT,
    CorruptDirectoryError,
    DirectoryUnavailableError,
    FileDirectory,
    OtherHostError,
    ShardRecord,
    open_directory,
    this_host,
    with_shards,
)
from engrid.directory import file as file_module
from tests.conformance.directory import DirectoryConformance, full_placement, record, start_python

KILLED_BEFORE_RENAME = """
import os, signal, sys
from engrid.directory import open_directory, with_shards

def kill(event, arguments):
    if event == "os.rename":
        os.kill(os.getpid(), signal.SIGKILL)

directory = open_directory(arguments[0])
placement = directory.placement()
sys.addaudithook(kill)
directory.publish(with_shards(placement, {**placement.shards, "s9": "h:9"}), expected_epoch=placement.epoch)
"""

WRITER = """
from engrid.directory import EMPTY_PLACEMENT, open_directory, with_shards
directory = open_directory(arguments[0])
placement = EMPTY_PLACEMENT
while True:
    expected = placement.epoch or None
    placement = with_shards(placement, {f"s{index}": f"h:{placement.epoch}" for index in range(200)})
    directory.publish(placement, expected_epoch=expected)
"""


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file:{tmp_path}/run"


class TestFileDirectory(DirectoryConformance):
    pass


def test_a_writer_killed_before_the_rename_leaves_the_old_content(url: str, tmp_path: Path) -> None:
    directory = open_directory(url)
    directory.publish(full_placement(), expected_epoch=None)
    with start_python(KILLED_BEFORE_RENAME, url) as process:
        assert process.wait(timeout=30) == -signal.SIGKILL
    left = tmp_path / "run" / "directory.json.tmp"
    assert b"s9" in left.read_bytes()
    assert directory.placement() == full_placement()
    directory.publish(with_shards(full_placement(), full_placement().shards), expected_epoch=2)
    assert not left.exists()


def test_a_torn_file_beside_is_never_read(url: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    beside = tmp_path / "run" / "directory.json.tmp"
    beside.write_text('{"host": null, "sha' + "x" * 10_000)
    directory = open_directory(url)
    assert directory.placement() is None
    directory.register(record())
    assert directory.shards() == {"s0": record()}


def test_readers_without_a_lock_see_whole_placements(url: str) -> None:
    directory = open_directory(url)
    with start_python(WRITER, url) as process:
        epochs: set[int] = set()
        while len(epochs) < 50:
            assert process.poll() is None
            placement = directory.placement()
            if placement is not None:
                assert set(placement.shards.values()) == {f"h:{placement.epoch - 1}"}
                epochs.add(placement.epoch)
        process.kill()


def test_a_change_is_durable_before_and_after_it_is_visible(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        done.append(f"fsync {target.name} of {target.stat().st_size if target.is_file() else 0} bytes")

    def replace(source: Path, target: Path) -> Path:
        done.append(f"rename {source.name} to {target.name}")
        return real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    open_directory(url).register(record())
    size = (tmp_path / "run" / "directory.json").stat().st_size
    assert done == [
        f"fsync directory.json.tmp of {size} bytes",
        "rename directory.json.tmp to directory.json",
        "fsync run of 0 bytes",
    ]


def test_a_shard_on_another_host_is_refused(url: str) -> None:
    directory = open_directory(url)
    away = ShardRecord(name="s1", address="10.0.0.2:5000", host="elsewhere/1234", pid=1)
    for _ in range(2):
        with pytest.raises(OtherHostError, match=r"shard s1 is on elsewhere/1234 .* use --redis for several hosts"):
            directory.register(away)
        directory.register(record())
    assert directory.shards() == {"s0": record()}


def test_a_file_of_another_host_is_refused_until_it_is_cleared(url: str, tmp_path: Path) -> None:
    directory = open_directory(url)
    directory.register(record())
    path = tmp_path / "run" / "directory.json"
    path.write_text(path.read_text().replace(this_host(), "elsewhere/1234"))
    with pytest.raises(OtherHostError, match=r"serves one host, elsewhere/1234, .* --redis .* or clear the directory"):
        directory.register(record("s1"))
    directory.clear()
    directory.register(record("s1"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no directory: Expecting value"),
        (b"\xff\xfe", "is no directory"),
        (b"[]", "give a JSON object"),
        (b'{"host": null, "shards": {}, "placement": null, "leases": {}}', r"unknown keys \['leases'\]"),
        (b'{"host": null, "shards": 3, "placement": null}', "is no directory"),
        (b'{"host": null, "shards": {"s0": {"name": "s0"}}, "placement": null}', "shard has missing keys"),
        (b'{"host": null, "shards": {}, "placement": {}}', "placement has missing keys"),
    ],
)
def test_a_file_that_is_no_directory_is_named_and_can_be_cleared(
    url: str, tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "run" / "directory.json"
    path.parent.mkdir()
    path.write_bytes(content)
    directory = open_directory(url)
    for call in (directory.placement, directory.shards, lambda: directory.register(record())):
        with pytest.raises(CorruptDirectoryError, match=rf"directory\.json is no directory.*{message}|{message}"):
            call()
    assert path.read_bytes() == content
    directory.clear()
    assert directory.placement() is None


def test_a_lock_held_too_long_is_an_error_that_names_it(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "_LOCK_SECONDS", 0.1)
    directory = open_directory(url)
    directory.register(record())
    with (tmp_path / "run" / "directory.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DirectoryUnavailableError, match=r"run/directory\.lock was held for 0\.1 s"):
            directory.register(record("s1"))
        assert directory.shards().keys() == {"s0"}
    directory.register(record("s1"))


def test_a_folder_that_cannot_be_made_or_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(DirectoryUnavailableError, match=r"taken/directory\.lock"):
        FileDirectory(tmp_path / "taken").register(record())
    (tmp_path / "run" / "directory.json").mkdir(parents=True)
    with pytest.raises(DirectoryUnavailableError, match=r"cannot read .*run/directory\.json"):
        FileDirectory(tmp_path / "run").shards()


def test_a_full_disk_leaves_the_old_content(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = open_directory(url)
    directory.register(record())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DirectoryUnavailableError, match=r"cannot write .*directory\.json: .* No space left"):
        directory.publish(with_shards(EMPTY_PLACEMENT, {}), expected_epoch=None)
    assert directory.placement() is None
    assert directory.shards() == {"s0": record()}
