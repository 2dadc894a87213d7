"""What every directory does. A test module subclasses DirectoryConformance and gives a fixture `url`."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from engrid.directory import (
    EMPTY_PLACEMENT,
    Directory,
    DirectoryChangedError,
    EpochConflictError,
    Placement,
    ShardNameTakenError,
    ShardRecord,
    ShardUnknownError,
    open_directory,
    this_host,
    with_shards,
    with_tables,
)
from engrid.tables import OptimizerSpec, TableSpec

PUBLISHER = """
import random, time
from engrid.directory import EMPTY_PLACEMENT, EpochConflictError, open_directory, with_shards
url, name, last = arguments
directory = open_directory(url)
print("ready", flush=True)
input()
while True:
    published = directory.placement()
    if published is not None and published.epoch >= int(last):
        break
    time.sleep(random.uniform(0, 0.002))
    proposal = with_shards(published or EMPTY_PLACEMENT, {name: f"h:{published.epoch if published else 0}"})
    try:
        directory.publish(proposal, expected_epoch=published.epoch if published else None)
    except EpochConflictError as conflict:
        assert conflict.actual_epoch > (conflict.expected_epoch or 0), conflict
        print("lost", proposal.epoch)
    else:
        print("won", proposal.epoch)
"""

REGISTRAR = """
import os
from engrid.directory import ShardRecord, open_directory, this_host
url, name, count = arguments
directory = open_directory(url)
print("ready", flush=True)
input()
for index in range(int(count)):
    record = ShardRecord(name=f"{name}-{index}", address=f"h:{index + 1}", host=this_host(), pid=os.getpid())
    directory.register(record)
    if index % 2:
        directory.unregister(record.name)
"""


def start_python(script: str, *arguments: str) -> subprocess.Popen[str]:
    """Run `script` with this interpreter and path; it finds `arguments` as a list."""
    prologue = f"import sys; sys.path[:] = {sys.path!r}; arguments = {list(arguments)!r}\n"
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", prologue + script], stdin=pipe, stdout=pipe, text=True)


def run_together(script: str, url: str, names: list[str], argument: str) -> dict[str, list[str]]:
    """Run `script` once per name, all let go at the same time, and return the lines each printed."""
    processes = {name: start_python(script, url, name, argument) for name in names}
    try:
        for process in processes.values():
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes.values():
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        lines = {name: process.communicate(timeout=60)[0].splitlines() for name, process in processes.items()}
        assert [process.returncode for process in processes.values()] == [0] * len(names)
        return lines
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def record(name: str = "s0", port: int = 5000, *, pid: int | None = None) -> ShardRecord:
    return ShardRecord(name=name, address=f"127.0.0.1:{port}", host=this_host(), pid=pid or os.getpid())


def full_placement() -> Placement:
    spec = TableSpec(
        name="engram.1",
        rows=30,
        row_format="bfloat16",
        width=8,
        seed=1,
        layer=1,
        init_std=0.1,
        optimizer=OptimizerSpec(kind="adam", eps=1e-7),
        buckets=(13, 17),
    )
    return with_tables(with_shards(EMPTY_PLACEMENT, {"s0": "127.0.0.1:5000", "s1": "127.0.0.1:5001"}), [spec])


class DirectoryConformance:
    @pytest.fixture
    def directory(self, url: str) -> Iterator[Directory]:
        directory = open_directory(url)
        yield directory
        directory.close()

    def test_a_new_directory_is_empty(self, directory: Directory) -> None:
        assert directory.shards() == {}
        assert directory.placement() is None

    def test_others_see_registered_shards_until_they_are_unregistered(self, directory: Directory, url: str) -> None:
        first, second = record("s0", 5000), record("s1", 5001)
        directory.register(first)
        directory.register(second)
        other = open_directory(url)
        assert other.shards() == {"s0": first, "s1": second}
        other.unregister("s0")
        other.close()
        assert directory.shards() == {"s1": second}
        with pytest.raises(ShardUnknownError, match=r"no shard s0 in .*\['s1'\]"):
            directory.unregister("s0")

    def test_a_name_of_a_living_process_is_not_given_away(self, directory: Directory) -> None:
        with start_python("input()") as process:
            directory.register(record(port=5000, pid=process.pid))
            with pytest.raises(
                ShardNameTakenError, match=rf"s0 is taken .* at 127\.0\.0\.1:5000 by process {process.pid}"
            ):
                directory.register(record(port=6000))
            assert directory.shards()["s0"].address == "127.0.0.1:5000"
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
            directory.register(record(port=6000))
        assert directory.shards()["s0"] == record(port=6000)

    def test_a_name_of_an_ended_process_is_free(self, directory: Directory) -> None:
        with start_python("") as process:
            process.wait()
        directory.register(record(port=5000, pid=process.pid))
        directory.register(record(port=6000))
        assert directory.shards()["s0"] == record(port=6000)

    def test_the_same_address_or_process_may_register_again(self, directory: Directory) -> None:
        with start_python("input()") as process:
            directory.register(record(port=5000, pid=process.pid))
            directory.register(record(port=5000))
            directory.register(record(port=6000))
            assert directory.shards() == {"s0": record(port=6000)}
            process.kill()

    def test_a_placement_is_read_back_equal(self, directory: Directory, url: str) -> None:
        placement = full_placement()
        directory.register(record())
        directory.publish(placement, expected_epoch=None)
        other = open_directory(url)
        assert other.placement() == placement
        assert other.shards() == {"s0": record()}
        other.close()

    def test_publishing_on_another_epoch_is_refused_with_both(self, directory: Directory) -> None:
        first = full_placement()
        with pytest.raises(EpochConflictError, match="holds no placement, not epoch 1;") as conflict:
            directory.publish(with_shards(first, first.shards), expected_epoch=1)
        assert (conflict.value.expected_epoch, conflict.value.actual_epoch) == (1, None)
        directory.publish(first, expected_epoch=None)
        with pytest.raises(EpochConflictError, match="holds epoch 2, not no placement;"):
            directory.publish(first, expected_epoch=None)
        second = with_shards(first, {**first.shards, "s2": "127.0.0.1:5002"})
        directory.publish(second, expected_epoch=2)
        with pytest.raises(EpochConflictError, match="holds epoch 3, not epoch 2;") as conflict:
            directory.publish(with_shards(first, first.shards), expected_epoch=2)
        assert (conflict.value.expected_epoch, conflict.value.actual_epoch) == (2, 3)
        assert directory.placement() == second

    def test_an_epoch_that_does_not_rise_is_refused(self, directory: Directory) -> None:
        placement = full_placement()
        directory.publish(placement, expected_epoch=None)
        with pytest.raises(ValueError, match="placement has epoch 2; give one above the expected epoch 2"):
            directory.publish(placement, expected_epoch=2)

    def test_clear_forgets_everything(self, directory: Directory) -> None:
        directory.register(record())
        directory.publish(full_placement(), expected_epoch=None)
        directory.clear()
        assert directory.shards() == {}
        assert directory.placement() is None
        directory.clear()
        directory.publish(full_placement(), expected_epoch=None)

    def test_clear_of_the_shards_that_were_seen_leaves_others(self, directory: Directory) -> None:
        directory.clear(registered={})
        directory.register(record())
        directory.publish(full_placement(), expected_epoch=None)
        for seen in ({}, {"s0": record(port=6000)}, {"s0": record(), "s1": record("s1", 5001)}):
            with pytest.raises(DirectoryChangedError, match=r"shards s. came to or left .* meanwhile"):
                directory.clear(registered=seen)
        assert directory.shards() == {"s0": record()}
        assert directory.placement() == full_placement()
        directory.clear(registered={"s0": record()})
        assert directory.shards() == {}
        assert directory.placement() is None

    def test_of_concurrent_publishers_exactly_one_wins_each_epoch(self, directory: Directory, url: str) -> None:
        names = ["p0", "p1", "p2", "p3"]
        lines = run_together(PUBLISHER, url, names, "40")
        won = [(int(line.split()[1]), name) for name in names for line in lines[name] if line.startswith("won")]
        assert sorted(epoch for epoch, _ in won) == list(range(1, 41))
        assert sum(line.startswith("lost") for name in names for line in lines[name]) > 10
        last = directory.placement()
        assert last is not None
        assert dict(last.shards) == {max(won)[1]: "h:39"}

    def test_concurrent_registrations_are_all_kept(self, directory: Directory, url: str) -> None:
        names = ["r0", "r1", "r2", "r3"]
        run_together(REGISTRAR, url, names, "20")
        assert directory.shards().keys() == {f"{name}-{index}" for name in names for index in range(0, 20, 2)}
