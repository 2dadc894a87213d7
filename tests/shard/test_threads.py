"""Threads of a shard that meet what nobody foresaw: who waits for them is told, and they serve the next."""

import contextlib
import logging
import threading

import numpy as np
import pytest

from engrid.rpc.stalls import StallWatch
from engrid.shard.ops import checkpointing
from engrid.shard.rows import sealed
from engrid.shard.rows.sealed import SealedRows
from engrid.v1 import memory_pb2 as pb
from tests.shard.shells import push, rows_of, shell
from tests.shards import table


def test_a_call_that_cannot_be_ended_does_not_keep_others_from_being_watched():
    watch, ended = StallWatch(0.02), threading.Event()

    def fails():
        raise RuntimeError("a fault of gRPC's")

    with contextlib.ExitStack() as calls:
        for cancel in (fails, ended.set):
            calls.enter_context(watch.over(cancel, 0.01)).waits()
        assert ended.wait(5)
    watch.close()


@pytest.mark.parametrize("fails", ["collapse", "start"])
def test_rows_for_which_no_huge_pages_are_made_are_served(monkeypatch, caplog, fails):
    def no(*arguments):
        raise RuntimeError("can't start new thread")

    if fails == "collapse":
        monkeypatch.setattr(sealed, "collapse", no)
    rows = SealedRows(table("s@1", rows=4, width=1, optimizer=None), 0, 4)
    rows.write(0, np.arange(4, dtype=np.float32).tobytes())
    with caplog.at_level(logging.WARNING):
        with monkeypatch.context() as patched:
            if fails == "start":
                patched.setattr(threading.Thread, "start", no)
            rows.seal()
        for thread in threading.enumerate():
            if thread.name == "engrid huge pages":
                thread.join(5)
    assert "small pages" in caplog.text
    assert (rows.raw(0, 4).view(np.float32)[:, 0] == np.arange(4)).all()


def test_rows_that_cannot_be_mapped_can_be_sent_again(monkeypatch):
    rows = SealedRows(table("s@1", rows=4, width=1, optimizer=None), 0, 4)
    raw = np.arange(4, dtype=np.float32).tobytes()
    rows.write(0, raw)
    with monkeypatch.context() as patched:
        patched.setattr(sealed, "mapped", lambda *_: (_ for _ in ()).throw(OSError(12, "Cannot allocate memory")))
        with pytest.raises(OSError, match="Cannot allocate"):
            rows.seal()
    assert not rows.loaded
    rows.write(0, raw)
    rows.seal()
    assert rows.loaded


def test_a_save_that_fails_gives_back_what_it_held(tmp_path, monkeypatch):
    """Its snapshots, which pushes pay for, and its turn."""
    with shell(None, checkpoints=(tmp_path,)) as service:
        push(service)
        (tmp_path / "p" / "tables").mkdir(parents=True)
        request = pb.CheckpointRequest(
            run="r", attempt=1, step=1, tables=["t"], folder=str(tmp_path), partial="p", wait=5
        )
        with monkeypatch.context() as patched:
            patched.setattr(checkpointing, "save_snapshot", lambda *_, **__: (_ for _ in ()).throw(MemoryError("none")))
            messages = service.checkpointing.save(request, lambda end: True)
            assert next(messages).begun
            with pytest.raises(MemoryError):
                next(messages)
        assert rows_of(service).snapshot is None
        messages = service.checkpointing.save(request, lambda end: True)
        assert next(messages).begun
        assert len(next(messages).partitions) == 2
        messages.close()
        assert not service.saving.locked()
