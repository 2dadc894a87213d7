"""Paths that clients name: a shard reads and writes in the folders it was given, and nowhere else."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from engrid.client import MemoryClient, TrainingRun
from engrid.control.checkpoints import check_folder
from engrid.control.tables import create_tables
from engrid.directory import FileDirectory, file
from engrid.rpc.errors import BadRequestError
from engrid.shard.config import ShardConfig
from engrid.shard.ops.folders import CheckpointFolders, check_name
from engrid.v1 import memory_pb2 as pb
from engrid.v1 import memory_pb2_grpc
from tests.shards import local_shards, shard_process, table

PROOF = ".shared-" + "0123456789abcdef" * 2


@pytest.fixture
def run(tmp_path):
    """The run directory; beside it lie folders that were not given."""
    for name in ("run", "run/inner", "given", "given/inner", "given2", "outer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / PROOF).write_text("SECRET")
    return tmp_path / "run"


def folders(run, *given):
    return CheckpointFolders(ShardConfig(name="s0", directory=run, checkpoints=given))


@contextmanager
def stub(address):
    with grpc.insecure_channel(address) as channel:
        yield memory_pb2_grpc.MemoryServiceStub(channel)


def test_given_folders_and_what_is_in_them_are_used(run, tmp_path):
    of = folders(run, tmp_path / "given")
    for path in ("run", "run/inner", "given", "given/inner", "outer/../given"):
        assert of.disk(str(tmp_path / path)).root == (tmp_path / path).resolve()


def test_others_are_refused_naming_what_to_do(run, tmp_path):
    of = folders(run, tmp_path / "given")
    for path in ("outer", "given/../outer", "given2", "."):
        with pytest.raises(BadRequestError, match=rf"not given .*{tmp_path / 'given'}.*--checkpoints"):
            of.disk(str(tmp_path / path))


def test_links_are_followed_before_they_are_judged(run, tmp_path):
    (tmp_path / "given" / "link").symlink_to(tmp_path / "outer")
    (tmp_path / "outer" / "back").symlink_to(tmp_path / "given")
    (tmp_path / "given" / "round").symlink_to(tmp_path / "given" / "round")
    (tmp_path / "alias").symlink_to(tmp_path / "given")
    of = folders(run, tmp_path / "alias")
    assert of.disk(str(tmp_path / "outer" / "back")).root == tmp_path / "given"
    for path, within in (("given/link", ""), ("given", "link"), ("given", "link/tables"), ("given/round", "")):
        with pytest.raises(BadRequestError):
            of.disk(str(tmp_path / path), within)


@pytest.mark.parametrize(
    "path", ["", "relative", "run", "/no\0where", "/" + "x" * 5000, "/" + "x" * 300, "/nowhere/here"]
)
def test_what_is_no_folder_is_refused(run, path):
    with pytest.raises(BadRequestError, match=r"s0 finds no folder|not given|absolute path"):
        folders(run).disk(path)


def test_without_others_the_working_folder_is_given_unless_it_is_all(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "given")
    of = folders(run)
    of.disk(str(tmp_path / "given"))
    monkeypatch.chdir("/")
    of = folders(run)
    with pytest.raises(BadRequestError, match="not given"):
        of.disk(str(tmp_path / "given"))


def test_owner_of_the_run_directory_gives_more(run, tmp_path):
    of = folders(run, tmp_path / "given")
    FileDirectory(run).allow_folder(tmp_path / "outer")
    FileDirectory(run).allow_folder(tmp_path / "outer")
    assert (run / "checkpoint-folders").read_text().count("\n") == 1
    of.disk(str(tmp_path / "outer"))
    assert (run / "checkpoint-folders").stat().st_mode & 0o777 == 0o600
    (run / "checkpoint-folders").chmod(0o622)
    with pytest.raises(BadRequestError, match="not given"):
        of.disk(str(tmp_path / "outer"))


def test_folders_that_are_gone_make_room_for_new_ones(run, tmp_path, monkeypatch):
    monkeypatch.setattr(file, "_MOST_FOLDERS", 4)
    for name in ("given", "gone", "gone/a", "gone/b", "outer", "given2"):
        FileDirectory(run).allow_folder(tmp_path / name)
    kept = [tmp_path / name for name in ("given", "outer", "given2")]
    assert FileDirectory(run).allowed_folders() == kept


@pytest.mark.parametrize("damage", ["{", '"/"\n"relative"', "[]\n", '"\\ud800"\n', "\xff"])
def test_damaged_list_gives_nothing(run, tmp_path, damage):
    (run / "checkpoint-folders").write_bytes(damage.encode("latin-1"))
    (run / "checkpoint-folders").chmod(0o600)
    with pytest.raises(BadRequestError, match="not given"):
        folders(run, tmp_path / "given").disk(str(tmp_path / "outer"))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a", "a\0", "x" * 256, "é" * 200])
def test_name_that_could_lead_out_is_refused(name):
    with pytest.raises(BadRequestError):
        check_name("file", name)


@pytest.mark.parametrize("optimize", [False, True])
def test_shard_gives_no_file_but_a_proof_also_without_asserts(run, tmp_path, optimize, monkeypatch):
    if optimize:
        monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    (run / "cluster.json").write_text("SECRET")
    with shard_process(run) as (_, address), stub(address) as shard:
        for folder, file in (
            (run / "inner", f"../../outer/{PROOF}"),
            (run / "inner", str(tmp_path / "outer" / PROOF)),
            (tmp_path / "outer", PROOF),
            (run / ".." / "outer", PROOF),
            (run, "cluster.json"),
            (run, ""),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                shard.CheckFolder(pb.CheckFolderRequest(folder=str(folder), file=file), timeout=10)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not list((tmp_path / "outer").glob("*.s0"))
        answer = shard.CheckFolder(pb.CheckFolderRequest(folder=str(run / "inner"), file=PROOF), timeout=10)
        assert answer.content == b"SECRET"


def test_no_call_reads_or_writes_elsewhere(run, tmp_path):
    outer = tmp_path / "outer"
    (outer / "partial" / "tables").mkdir(parents=True)
    (run / "step-00000001").symlink_to(outer)
    before = sorted(outer.rglob("*"))
    with local_shards(run, 1, checkpoints=(tmp_path / "given",)) as (shard,), MemoryClient(f"file:{run}") as client:
        create_tables(client, [table()])
        TrainingRun(client, run="r", attempt=1, worker=0, workers=1, tables=["t"])
        save = {"run": "r", "attempt": 1, "tables": ["t"], "wait": 1}
        with stub(shard.address) as calls:
            for request in (
                pb.CheckpointRequest(folder=str(outer), partial="partial", **save),
                pb.CheckpointRequest(folder=str(run), partial="../outer/partial", **save),
                pb.CheckpointRequest(folder=str(run), partial="step-00000001/partial", **save),
                pb.CheckpointRequest(folder=str(run), partial="step-00000001", **save),
                pb.CheckpointRequest(folder=str(run), partial="x", base="../outer", **save),
            ):
                with pytest.raises(grpc.RpcError) as refused:
                    list(calls.Checkpoint(request, timeout=10))
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, refused.value.details()
            for folder, name in ((outer, "step-00000001"), (run, "../outer"), (run, "step-00000001"), (run, "")):
                request = pb.RestoreRequest(folder=str(folder), name=name, tables=["t"], attempt=2)
                with pytest.raises(grpc.RpcError) as refused:
                    calls.Restore(request, timeout=10)
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, refused.value.details()
    assert sorted(outer.rglob("*")) == before


def test_client_of_the_run_directory_may_use_any_folder_of_its_user_and_one_without_may_not(run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    with local_shards(run, 1) as (shard,), MemoryClient(f"file:{run}") as client:
        create_tables(client, [table()])
        check_folder(client, elsewhere)
        assert list(elsewhere.iterdir()) == []
        with stub(shard.address) as calls, pytest.raises(grpc.RpcError, match="not given"):
            calls.CheckFolder(pb.CheckFolderRequest(folder=str(tmp_path / "outer"), file=PROOF), timeout=10)


def test_option_of_the_command_is_taken(run, tmp_path):
    options = ("--checkpoints", tmp_path / "given", "--checkpoints", tmp_path / "given2")
    with (
        shard_process(run, "s0", *options) as (
            _,
            address,
        ),
        stub(address) as calls,
    ):
        for folder in ("given", "given2"):
            calls.CheckFolder(pb.CheckFolderRequest(folder=str(tmp_path / folder), file=PROOF), timeout=10)
        with pytest.raises(grpc.RpcError, match="not given"):
            calls.CheckFolder(pb.CheckFolderRequest(folder=str(Path.cwd()), file=PROOF), timeout=10)
    shown = subprocess.run([sys.executable, "-m", "engrid.cli.app", "shard", "--help"], capture_output=True, check=True)
    assert b"--checkpoints" in shown.stdout
