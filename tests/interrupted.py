"""The demo, cut off by Ctrl-C or SIGTERM at a chosen point."""

from __future__ import annotations

import os
import signal
import time
import uuid

from engrid.cluster.config import Record
from tests.clusters import engrid_processes, start_engrid


def interrupt_demo(out, stage, number=signal.SIGINT):
    """Starts `engrid demo`, waits until `stage(its Record or None)`, and presses Ctrl-C as a terminal does, or ends
    the demo's own process by the signal given.

    Fails unless the demo ends by itself with code 130 and takes all it started with it.
    """
    mark = uuid.uuid4().hex  # others on this machine may start Rays meanwhile
    demo = start_engrid("demo", "--out", out, "--steps", 100_000, env={"STARTED_BY_TEST": mark})
    try:
        until = time.monotonic() + 120
        while not stage(record_of(out)):
            assert demo.poll() is None, demo.communicate()
            assert time.monotonic() < until, "the stage did not come"
            time.sleep(0.02)
        started = record_of(out) is not None
        if number == signal.SIGINT:
            os.killpg(demo.pid, number)
        else:
            os.kill(demo.pid, number)
        out_text, said = demo.communicate(timeout=60)
        # Before its handlers are set, Python dies of the signal itself; nothing of ours is started then.
        assert demo.returncode == 130 or (demo.returncode == -number and not started), (
            f"exit code {demo.returncode}: {out_text}{said}"
        )
        assert "Traceback" not in said or not started, "while it is importing, Python shows one: " + said
    finally:
        demo.kill()
        demo.communicate()
    assert engrid_processes(f"STARTED_BY_TEST={mark}") == set()
    assert record_of(out) is None, "nothing is left to take down"


def record_of(out):
    try:
        return Record.load(out / "run")
    except ValueError:
        return None  # being written
