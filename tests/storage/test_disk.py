"""The real disk and the simulated one do the same; and what the simulated one loses at a crash."""

import errno
from pathlib import Path

import pytest

from engrid.storage.disk import Disk, LocalDisk
from tests.conformance.disk import DiskConformance, write_file
from tests.simulated_disk import CrashedError, SimulatedDisk


class TestLocalDisk(DiskConformance):
    @pytest.fixture
    def disk(self, tmp_path: Path) -> Disk:
        return LocalDisk(tmp_path / "made" / "by it")

    def test_files_lie_under_the_root(self, tmp_path: Path) -> None:
        write_file(LocalDisk(tmp_path), "a", b"abc")
        assert (tmp_path / "a").read_bytes() == b"abc"
        for path in ("../a", "b/../../a", "/etc/passwd", "..", "a\0"):
            with pytest.raises(OSError, match="leads out"):
                LocalDisk(tmp_path / "inner").read(path)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
    def test_a_failed_write_names_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "full").symlink_to("/dev/full")
        file = LocalDisk(tmp_path).open("full")
        with pytest.raises(OSError, match=str(tmp_path / "full")) as failed:
            file.write([b"abc"])
        assert failed.value.errno == errno.ENOSPC
        file.close()


class TestSimulatedDisk(DiskConformance):
    @pytest.fixture
    def disk(self) -> Disk:
        return SimulatedDisk()


SEEDS = range(300)


def test_what_was_synced_survives_every_crash():
    for seed in SEEDS:
        disk = SimulatedDisk(seed)
        disk.make_folder("log")
        disk.sync_folder("")
        file = disk.create("log/a")
        file.write([b"abc", b"def"])
        file.sync()
        disk.sync_folder("log")
        file.write([b"lost?"])
        after = disk.crash()
        left = after.read("log/a")
        assert left[:6] == b"abcdef"
        assert after.crash().read("log/a") == left


def test_unsynced_writes_survive_in_every_way():
    found = set()
    for seed in SEEDS:
        disk = SimulatedDisk(seed)
        file = disk.create("a")
        disk.sync_folder("")
        file.write([b"ab"])
        file.write([b"cd"])
        found.add(disk.crash().read("a"))
    assert {b"", b"a", b"ab", b"abc", b"abcd", b"\0\0cd", b"\0bcd"} <= found
    assert any(len(left) == 4 and left[2:] == b"cd" and left[:2] not in (b"ab", b"\0\0") for left in found), "noise"


def test_an_unsynced_cut_may_be_undone():
    found = set()
    for seed in SEEDS:
        disk = SimulatedDisk(seed)
        write_file(disk, "a", b"abcdef")
        disk.sync_folder("")
        file = disk.open("a")
        file.truncate(2)
        file.write([b"X"])
        found.add(disk.crash().read("a"))
    assert {b"abcdef", b"ab", b"abX", b"abXdef"} <= found


def test_names_survive_whole_or_not_at_all_and_without_their_content():
    found = set()
    for seed in SEEDS:
        disk = SimulatedDisk(seed)
        write_file(disk, "old", b"old")
        disk.sync_folder("")
        file = disk.create("new")
        file.write([b"new"])
        disk.rename("new", "old")
        disk.create("other")
        after = disk.crash()
        found.add(tuple((name, after.read(name)) for name in after.names("")))
    assert {
        (("old", b"old"),),
        (("old", b""),),
        (("old", b"new"),),
        (("old", b"old"), ("other", b"")),
        (("new", b""), ("old", b"old")),
    } <= found


def test_a_folder_whose_name_was_not_synced_may_vanish_with_all_in_it():
    found = set()
    for seed in SEEDS:
        disk = SimulatedDisk(seed)
        disk.make_folder("log")
        write_file(disk, "log/a", b"abc")
        disk.sync_folder("log")
        after = disk.crash()
        found.add(after.read("log/a") if after.exists("log") else None)
    assert found == {None, b"abc"}


def test_the_same_seed_leaves_the_same():
    def left(seed: int) -> list[bytes]:
        disk = SimulatedDisk(seed)
        for name in "abcdefgh":
            file = disk.create(name)
            file.write([name.encode() * 5])
            file.write([name.encode() * 5])
        after = disk.crash()
        return [after.read(name) for name in after.names("")]

    assert left(1) == left(1)
    assert left(1) != left(2)


def test_after_a_crash_the_old_process_can_do_nothing():
    disk = SimulatedDisk()
    file = disk.create("a")
    disk.crash()
    for operation in (lambda: file.write([b"x"]), file.sync, lambda: disk.read("a"), lambda: disk.create("b")):
        with pytest.raises(CrashedError):
            operation()


def test_a_full_disk_takes_what_fits_and_takes_more_once_there_is_room():
    disk = SimulatedDisk()
    disk.capacity = 10
    write_file(disk, "a", b"1234")
    file = disk.create("b")
    with pytest.raises(OSError, match="b") as failed:
        file.write([b"12345678"])
    assert failed.value.errno == errno.ENOSPC
    assert (file.size, disk.free_bytes()) == (6, 0)
    disk.remove("a")
    file.write([b"78"])
    assert disk.read("b") == b"12345678"


def test_a_read_only_disk_refuses_changes_alone():
    disk = SimulatedDisk()
    write_file(disk, "a", b"1234")
    disk.read_only = True
    assert disk.read("a") == b"1234"
    for change in (disk.create, disk.remove, disk.open, disk.make_folder):
        with pytest.raises(OSError, match="Read-only") as failed:
            change("a" if change != disk.create else "b")
        assert failed.value.errno == errno.EROFS
    assert disk.names("") == ["a"]


def test_the_operation_of_a_number_fails_and_a_hook_sees_each():
    disk = SimulatedDisk()
    seen = []
    disk.before = lambda operation, path: seen.append((operation, path))
    disk.fail[3] = errno.EIO
    file = disk.create("a")
    file.write([b"abc"])
    with pytest.raises(OSError, match="Input/output error"):
        file.sync()
    file.sync()
    assert seen == [("create", "a"), ("write", "a"), ("sync", "a"), ("sync", "a")]
    assert disk.operations == 4


def test_an_ignored_sync_makes_nothing_durable():
    disk = SimulatedDisk()
    write_file(disk, "a", b"abc")
    disk.sync_folder("")
    (sync, folder) = disk.sites
    assert sync.startswith("disk.py:write_file:")
    assert sync.endswith(" sync")
    assert folder.startswith("test_disk.py:")
    assert folder.endswith(" sync_folder")
    lost = 0
    for seed in SEEDS:
        disk = SimulatedDisk(seed)
        disk.ignore = {sync}
        write_file(disk, "a", b"abc")
        disk.sync_folder("")
        lost += disk.crash().read("a") != b"abc"
    assert lost > len(SEEDS) / 4
