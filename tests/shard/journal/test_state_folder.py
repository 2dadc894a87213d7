"""A state folder belongs to one shard, and to one process at a time: two that write one log would ruin it for both."""

import pytest

from engrid.rpc.errors import BadRequestError
from engrid.shard.config import ShardConfig
from engrid.shard.journal.state_folder import LOCK_FILE, StateFolder, owner_of
from engrid.shard.service import ShardService
from engrid.storage.errors import CheckpointDamagedError
from tests.clusters import engrid, start_engrid
from tests.mortal import MortalShard


def test_a_folder_in_use_is_refused_and_free_once_its_process_is_killed(tmp_path):
    with MortalShard(tmp_path, "s0") as first:
        with pytest.raises(BadRequestError, match=r"state-s0 is in use by a running shard \(s0\)"):
            StateFolder(first.state, "s0", patience_s=0.1)
        with pytest.raises(BadRequestError, match=r"in use by a running shard \(s0\).* a folder of its own"):
            StateFolder(first.state, "s1", patience_s=0.1)
        first.kill()
        first.start()


def test_a_shard_that_cannot_recover_lets_go_of_its_folder(tmp_path):
    config = ShardConfig(name="s0", directory=f"file:{tmp_path}", state=tmp_path / "state")
    ShardService(config).close()
    base = tmp_path / "state" / "base" / f"{1:016d}"
    base.mkdir(parents=True)
    (base / "base.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(CheckpointDamagedError):
            ShardService(config)
    StateFolder(tmp_path / "state", "s0", patience_s=0).close()


def test_another_shard_is_refused_by_name_before_it_reads_anything(tmp_path):
    StateFolder(tmp_path / "state", "s0").close()
    refused = engrid("shard", "--run-dir", tmp_path, "--name", "s1", "--state", tmp_path / "state")
    assert refused.returncode == 1
    assert "is of shard s0, not of s1" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert [path.name for path in (tmp_path / "state").iterdir()] == [LOCK_FILE]


def test_a_shard_started_without_a_name_goes_by_that_of_its_folder(tmp_path):
    StateFolder(tmp_path / "state", "rows-7").close()
    shard = start_engrid("shard", "--run-dir", tmp_path, "--state", tmp_path / "state")
    try:
        assert shard.stdout.readline().startswith("shard rows-7 serves at")
    finally:
        shard.kill()
        shard.communicate()


def test_a_name_that_was_not_written_whole_is_nobodys(tmp_path):
    StateFolder(tmp_path, "a-long-name").close()
    (tmp_path / LOCK_FILE).write_text("a-lo")
    assert owner_of(tmp_path) == ""
    StateFolder(tmp_path, "b").close()
    assert owner_of(tmp_path) == "b"
    assert owner_of(tmp_path / "missing") == ""


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\nb", "a b", "a@b", "-a", "a\0", "a" * 101])
def test_a_shard_has_a_name_that_a_line_and_a_file_can_hold(name):
    """A shard of two lines was refused its own state folder when it was started again."""
    with pytest.raises(ValueError, match="shard name"):
        ShardConfig(name=name, directory="file:/nowhere")
    ShardConfig(name="a" * 100, directory="file:/nowhere")
