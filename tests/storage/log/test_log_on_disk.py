"""The log on a real file system: kill -9, a file system that is full or read-only."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engrid.rpc.errors import DiskFullError
from engrid.storage.disk import LocalDisk
from engrid.storage.log.log import Log, LogFailedError
from tests.conformance.directory import start_python

APPENDER = """
import threading
from pathlib import Path
from engrid.storage.disk import LocalDisk
from engrid.storage.log.log import Log

log = Log(LocalDisk(Path(arguments[0])), "log", segment_bytes=200_000)
for number, payload in log.recover():
    assert bytes(payload[:40]).split()[0] == b"%d" % (len(payload) % 1000), number
printing = threading.Lock()

def work(worker):
    index = 0
    while True:
        size = (worker * 7919 + index * 104729) % 5000 + 40
        number = log.append([b"%d " % (size % 1000), b"x" * (size - len(b"%d " % (size % 1000)))])
        log.wait_durable(number)
        with printing:
            print(number, size, flush=True)
        index += 1

threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def opened(folder: Path, **options) -> Log:
    log = Log(LocalDisk(folder), "log", **options)
    for _ in log.recover():
        pass
    return log


def fill(log: Log, taken: dict[int, int]) -> None:
    for size in range(30_000, 1_000_000, 1000):
        taken[log.append([bytes(size)])] = size


def sizes(folder: Path) -> dict[int, int]:
    return {number: len(payload) for number, payload in Log(LocalDisk(folder), "log").recover()}


def test_kill_9_takes_nothing_that_was_acknowledged(tmp_path):
    chance = random.Random(5)
    acknowledged: dict[int, int] = {}
    for _ in range(8):
        with start_python(APPENDER, str(tmp_path)) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            time.sleep(chance.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            lines = [first, *process.stdout.read().splitlines()]
        new = dict(map(int, line.split()) for line in lines if len(line.split()) == 2)
        assert new
        assert not acknowledged.keys() & new.keys()
        acknowledged |= new
        found = sizes(tmp_path)
        assert list(found) == list(range(1, len(found) + 1))
        assert acknowledged.items() <= found.items()
    assert len(acknowledged) > 50


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a file system here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_file_system_refuses_and_goes_on_once_there_is_room(small_disk):
    log = opened(small_disk, segment_bytes=200_000)
    (small_disk / "ballast").write_bytes(bytes(300_000))
    taken: dict[int, int] = {}
    with pytest.raises(DiskFullError, match=r"no room for .*No space left on device"):
        fill(log, taken)
    with pytest.raises(DiskFullError, match="make room"):
        log.append([bytes(90_000)])
    log.sync()
    assert len(taken) > 10
    (small_disk / "ballast").unlink()
    taken[log.append([bytes(100_000)])] = 100_000
    log.sync()
    log.close()
    assert sizes(small_disk) == taken


def test_room_is_made_by_shortening_the_log(small_disk):
    log = opened(small_disk, segment_bytes=200_000)
    with pytest.raises(DiskFullError):
        fill(log, {})
    log.truncate_before(log.last)
    number = log.append([bytes(50_000)])
    log.wait_durable(number)
    log.close()
    assert max(sizes(small_disk)) == number


def test_a_read_only_file_system_is_named(small_disk):
    log = opened(small_disk)
    log.append([b"x"])
    log.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(LogFailedError, match=f"cannot be recovered: .*Read-only file system: '{small_disk}/log"):
        opened(small_disk)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert opened(small_disk).append([b"y"]) == 2
