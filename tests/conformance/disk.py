"""What every disk does while nothing fails. A test module subclasses DiskConformance and gives a fixture `disk`."""

import errno

import numpy as np
import pytest

from engrid.storage.disk import Disk


def write_file(disk: Disk, path: str, *pieces: bytes) -> None:
    file = disk.create(path)
    file.write(pieces)
    file.sync()
    file.close()


class DiskConformance:
    def test_a_new_disk_is_empty_and_has_room(self, disk: Disk) -> None:
        assert disk.names("") == []
        assert disk.free_bytes() > 1 << 20

    def test_pieces_are_appended_end_to_end(self, disk: Disk) -> None:
        file = disk.create("a")
        file.write([b"one", bytearray(b"two"), memoryview(np.arange(3, dtype="<i8")), b""])
        file.write([])
        assert (file.path, file.size) == ("a", 30)
        file.write([b"x" * 3] * 5000)
        file.sync()
        file.close()
        file.close()
        assert disk.size("a") == 15030
        assert disk.read("a") == b"onetwo" + np.arange(3, dtype="<i8").tobytes() + b"x" * 15000

    def test_what_was_written_is_read_before_it_is_synced(self, disk: Disk) -> None:
        file = disk.create("a")
        file.write([b"abc"])
        assert disk.read("a") == b"abc"
        file.close()

    def test_slices_of_a_file(self, disk: Disk) -> None:
        write_file(disk, "a", b"0123456789")
        assert disk.read("a", 3) == b"3456789"
        assert disk.read("a", 3, 4) == b"3456"
        assert disk.read("a", 8, 4) == b"89"
        assert disk.read("a", 20, 4) == b""
        assert disk.read("a", 20) == b""

    def test_open_appends(self, disk: Disk) -> None:
        write_file(disk, "a", b"abc")
        file = disk.open("a")
        assert file.size == 3
        file.write([b"d"])
        file.close()
        assert disk.read("a") == b"abcd"

    def test_what_is_written_after_a_cut_follows_it(self, disk: Disk) -> None:
        file = disk.create("a")
        file.write([b"abcdef"])
        file.truncate(2)
        assert file.size == 2
        file.write([b"X"])
        file.close()
        assert disk.read("a") == b"abX"

    def test_a_name_is_made_once(self, disk: Disk) -> None:
        write_file(disk, "a", b"abc")
        with pytest.raises(FileExistsError, match="a"):
            disk.create("a")
        assert disk.read("a") == b"abc"

    def test_folders(self, disk: Disk) -> None:
        disk.make_folder("log")
        disk.make_folder("log")
        disk.make_folder("log/deep")
        write_file(disk, "log/b", b"")
        write_file(disk, "log/a", b"")
        assert disk.names("") == ["log"]
        assert disk.names("log") == ["a", "b", "deep"]
        assert disk.exists("log")
        assert disk.exists("log/a")
        assert not disk.exists("log/c")
        disk.sync_folder("log")
        disk.sync_folder("")
        with pytest.raises(OSError, match="log") as failed:
            disk.remove("log")
        assert failed.value.errno == errno.ENOTEMPTY
        for name in ("a", "b", "deep"):
            disk.remove(f"log/{name}")
        disk.remove("log")
        assert disk.names("") == []

    def test_rename_replaces_a_file(self, disk: Disk) -> None:
        disk.make_folder("log")
        write_file(disk, "log/a", b"new")
        write_file(disk, "log/b", b"old")
        disk.rename("log/a", "log/b")
        assert disk.names("log") == ["b"]
        assert disk.read("log/b") == b"new"

    def test_rename_of_a_folder_takes_its_content_along(self, disk: Disk) -> None:
        disk.make_folder("new")
        write_file(disk, "new/a", b"abc")
        disk.make_folder("old")
        disk.rename("new", "old")
        assert disk.names("") == ["old"]
        assert disk.read("old/a") == b"abc"
        disk.make_folder("third")
        with pytest.raises(OSError, match="old") as failed:
            disk.rename("third", "old")
        assert failed.value.errno == errno.ENOTEMPTY

    def test_an_open_file_outlives_its_name(self, disk: Disk) -> None:
        file = disk.create("a")
        disk.rename("a", "b")
        file.write([b"abc"])
        assert disk.read("b") == b"abc"
        disk.remove("b")
        file.write([b"def"])
        file.sync()
        file.close()
        assert disk.names("") == []

    @pytest.mark.parametrize("operation", ["names", "size", "read", "open", "remove", "sync_folder"])
    def test_what_is_missing_is_named(self, disk: Disk, operation: str) -> None:
        with pytest.raises(FileNotFoundError, match="missing"):
            getattr(disk, operation)("missing")
        with pytest.raises(FileNotFoundError, match="missing"):
            getattr(disk, operation)("missing/deeper")

    def test_nothing_is_made_in_a_missing_folder(self, disk: Disk) -> None:
        with pytest.raises(FileNotFoundError, match="missing"):
            disk.create("missing/a")
        with pytest.raises(FileNotFoundError, match="missing"):
            disk.make_folder("missing/a")
        with pytest.raises(FileNotFoundError, match="missing"):
            disk.rename("missing", "other")
