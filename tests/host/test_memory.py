"""What memory a process may take, read from trees of proc and sys as kernels and container engines lay them out."""

from pathlib import Path

import pytest

from engrid.host.memory import Memory, memory
from engrid.shard.config import ShardConfig

GIB = 1 << 30
NONE = 9223372036854771712
"""How version 1 says that there is no limit."""


def machine(root, *, total=64 * GIB, free=60 * GIB, cgroup="", mounts=""):
    """A machine with so much memory; cgroup and mounts: of our process."""
    write(root, "proc/meminfo", f"MemTotal: {total >> 10} kB\nMemFree: 1 kB\nMemAvailable: {free >> 10} kB\n")
    write(root, "proc/self/cgroup", cgroup)
    write(root, "proc/self/mountinfo", mounts)
    return root


def write(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(str(text))


def mount(shown, at, kind, options="rw"):
    return f"35 31 0:32 {shown} {at} rw,relatime shared:9 - {kind} cgroup {options}\n"


def group_1(root, folder, limit, used, cache=0):
    write(root, f"{folder}/memory.limit_in_bytes", f"{limit}\n")
    write(root, f"{folder}/memory.usage_in_bytes", f"{used}\n")
    write(root, f"{folder}/memory.stat", f"cache {cache}\ninactive_file 0\ntotal_inactive_file {cache}\n")


def group_2(root, folder, limit, used, cache=0, high="max"):
    write(root, f"{folder}/memory.max", f"{limit}\n")
    write(root, f"{folder}/memory.high", f"{high}\n")
    write(root, f"{folder}/memory.current", f"{used}\n")
    write(root, f"{folder}/memory.stat", f"anon {used - cache}\nactive_file 5\ninactive_file {cache}\n")


def test_machine_without_groups(tmp_path):
    assert memory(machine(tmp_path)) == Memory(64 * GIB, 60 * GIB)


def test_this_machine():
    here = memory()
    assert 0 < here.free <= here.total


def test_container_of_version_1_sees_its_part_of_the_tree(tmp_path):
    mounts = mount("/docker/1f", "/sys/fs/cgroup/memory", "cgroup", "rw,memory")
    machine(tmp_path, cgroup="5:cpu:/docker/1f\n4:memory:/docker/1f\n0::/\n", mounts=mounts)
    group_1(tmp_path, "sys/fs/cgroup/memory", GIB, 300 << 20, cache=100 << 20)
    assert memory(tmp_path) == Memory(GIB, GIB - (200 << 20))


def test_group_of_version_1_under_one_with_less(tmp_path):
    mounts = mount("/", "/sys/fs/cgroup/cpu,memory", "cgroup", "rw,cpu,memory")
    machine(tmp_path, cgroup="4:cpu,memory:/jobs/one\n", mounts=mounts)
    group_1(tmp_path, "sys/fs/cgroup/cpu,memory", NONE, 50 * GIB)
    group_1(tmp_path, "sys/fs/cgroup/cpu,memory/jobs", 8 * GIB, 6 * GIB)
    group_1(tmp_path, "sys/fs/cgroup/cpu,memory/jobs/one", 16 * GIB, GIB)
    assert memory(tmp_path) == Memory(8 * GIB, 2 * GIB)


def test_group_of_version_2_under_one_with_less(tmp_path):
    machine(tmp_path, cgroup="0::/user.slice/work.scope\n", mounts=mount("/", "/sys/fs/cgroup", "cgroup2"))
    group_2(tmp_path, "sys/fs/cgroup/user.slice", 10 * GIB, 9 * GIB, cache=5 * GIB)
    group_2(tmp_path, "sys/fs/cgroup/user.slice/work.scope", "max", GIB)
    assert memory(tmp_path) == Memory(10 * GIB, 6 * GIB), "page cache that can be dropped is free"


def test_container_of_version_2_with_a_namespace_of_its_own(tmp_path):
    machine(tmp_path, cgroup="0::/\n", mounts=mount("/", "/sys/fs/cgroup", "cgroup2"))
    group_2(tmp_path, "sys/fs/cgroup", 4 * GIB, 3 * GIB, cache=2 * GIB, high=3 * GIB)
    assert memory(tmp_path) == Memory(3 * GIB, 2 * GIB), "beyond memory.high a group is slowed down to nothing"


@pytest.mark.parametrize("ours", ["/../../system.slice/x", "/docker/of-the-host"])
def test_group_that_the_mount_does_not_show(tmp_path, ours):
    machine(tmp_path, cgroup=f"0::{ours}\n", mounts=mount("/../..", "/sys/fs/cgroup", "cgroup2"))
    group_2(tmp_path, "sys/fs/cgroup", 2 * GIB, GIB)
    assert memory(tmp_path) == Memory(2 * GIB, GIB)


def test_both_versions_at_once(tmp_path):
    both = mount("/", "/sys/fs/cgroup/memory", "cgroup", "rw,memory") + mount("/", "/sys/fs/cgroup/unified", "cgroup2")
    machine(tmp_path, cgroup="4:memory:/a\n0::/a\n", mounts=both)
    group_1(tmp_path, "sys/fs/cgroup/memory/a", 3 * GIB, 2 * GIB)
    (tmp_path / "sys/fs/cgroup/unified/a").mkdir(parents=True)
    assert memory(tmp_path) == Memory(3 * GIB, GIB)


def test_group_that_uses_more_than_its_limit_has_nothing_free(tmp_path):
    machine(tmp_path, cgroup="0::/\n", mounts=mount("/", "/sys/fs/cgroup", "cgroup2"))
    group_2(tmp_path, "sys/fs/cgroup", GIB, 2 * GIB)
    assert memory(tmp_path) == Memory(GIB, 0)


@pytest.mark.parametrize("damage", ["", "no colon\n", "4:memory\n", "0::\n", "::::\n"])
def test_what_cannot_be_read_limits_nothing(tmp_path, damage):
    machine(tmp_path, cgroup=damage, mounts=f"{damage}{damage} - \n1 2 3 4 5 - cgroup2\n")
    assert memory(tmp_path) == Memory(64 * GIB, 60 * GIB)


def test_more_memory_than_the_machine_has_is_refused_with_both_numbers():
    total = memory().total
    with pytest.raises(ValueError, match=rf"5000 GiB .* this machine has {total / GIB:.4g} GiB"):
        ShardConfig(name="s", directory=Path("d"), memory_bytes=5000 * GIB)
    ShardConfig(name="s", directory=Path("d"), memory_bytes=total)
