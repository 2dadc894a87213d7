"""A forked child: what belongs to a client raises at once, and a child that uses none of it notices nothing."""

import subprocess
import sys

import pytest

from engrid.client import MemoryClient
from engrid.control.tables import create_tables
from tests.shards import load_initial, local_shards, table

PARENT = """
import multiprocessing, os, sys, threading, time
import numpy as np
from pathlib import Path
from engrid.client import *
from engrid.control import *
from engrid.control.checkpoints import CheckpointSave, live_states
from engrid.rpc.errors import EngridError
from engrid.tables import TableSpec

client = MemoryClient(sys.argv[1])
ids = np.arange(64)
client.lookup("t", ids)
client.lookup("s@1", ids)
run = TrainingRun(client, run="r", tables=["t"])
pending = client.prefetch([RowLookup("t", ids[:, None])])
export = export_partition(client, "t", 0)
next(export)
stop = threading.Event()

def busy():
    while not stop.is_set():
        client.lookup("t", ids)

threads = [threading.Thread(target=busy) for _ in range(2)]
for thread in threads:
    thread.start()

USES = {
    "lookup": lambda: client.lookup("t", ids),
    "sealed": lambda: client.lookup("s@1", ids),
    "rows": lambda: pending.rows("t"),
    "push": lambda: run.push({}, step=run.step + 1, learning_rate=1.0),
    "run": lambda: TrainingRun(client, run="r", tables=["t"]),
    "claim": lambda: claim_attempt(client, "r", ["t"]),
    "create": lambda: create_tables(client, [TableSpec(name="u", rows=9, width=4)]),
    "open": lambda: MemoryClient(sys.argv[1]),
    "open by address": lambda: MemoryClient(next(iter(client._addresses if False else {"127.0.0.1:1": 0}))),
    "placement": lambda: client.placement,
    "a shard asked": lambda: client.connections.describe("s0"),
    "refresh": lambda: client.connections.refresh(),
    "drop": lambda: drop_tables(client, ["t"]),
    "load": lambda: load_partition(client, "t", 0, [b""], step=1),
    "export": lambda: list(export_partition(client, "t", 0)),
    "export under way": lambda: next(export),
    "pin": lambda: client.pins.of_run("r"),
    "renew": lambda: client.pins.renew(),
    "prune": lambda: prune_versions(client, "r"),
    "states": lambda: live_states(client),
    "save": lambda: CheckpointSave(client, Path(sys.argv[1]), run="r", attempt=1, step=1, tables=["t"]),
}

def use(name):
    began = time.monotonic()
    try:
        USES[name]()
        said = "it worked"
    except EngridError as error:
        said = f"{type(error).__name__}: {error}"
    client.close()
    pending.cancel()
    return said if time.monotonic() - began < 2 else f"{time.monotonic() - began} s: {said}"

def ended(pid):
    until = time.monotonic() + 20
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, 9)
    return "hangs"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    with local_shards(folder, 2), MemoryClient(f"file:{folder}") as admin:
        create_tables(admin, [table()])
        load_initial(admin, table("s@1", optimizer=None))
        yield folder


def run(code, folder):
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PARENT + code, str(folder)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_in_a_child_whatever_uses_a_client_raises_at_once_and_says_what_to_do(folder):
    code = """
for name in USES:
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(write, use(name).encode())
        os._exit(0)
    code = ended(pid)
    os.close(write)
    print(name, code, os.read(read, 10000).decode(), sep="|")
stop.set()
for thread in threads: thread.join()
print(len(client.lookup("t", ids)))
pending.cancel()
client.close()
"""
    *said, last = run(code, folder)
    assert last == "64", "the parent goes on"
    assert len(said) == 21
    for line in said:
        _, code, text = line.split("|", 2)
        assert code == "0", line
        assert text.startswith("ForkedError: process "), line
        assert "spawn" in text, line


def test_a_child_that_uses_no_client_notices_nothing(folder):
    """However it was forked and however it ends: 40 times, while two threads of the parent are in calls."""
    code = """
def nothing(number):
    return sum(range(number))

context = multiprocessing.get_context("fork")
for _ in range(4):
    with context.Pool(4) as pool:
        assert pool.map(nothing, range(16)) == [nothing(number) for number in range(16)]
for number in range(24):
    pid = os.fork()
    if not pid:
        stop.set()
        if number % 2:
            del client, pending, run, USES, busy
            import gc
            gc.collect()
        threads.clear()
        sys.exit(7)
    assert ended(pid) == 7, number
stop.set()
for thread in threads: thread.join()
pending.cancel()
client.close()
print("done")
"""
    assert run(code, folder) == ["done"]


def test_a_spawned_child_has_a_client_of_its_own(folder):
    code = """
import subprocess
child = "import sys; from engrid.client import MemoryClient; print(MemoryClient(sys.argv[1]).lookup('t', [1]).shape)"
print(subprocess.run([sys.executable, "-c", child, sys.argv[1]], capture_output=True, text=True).stdout.strip())
stop.set()
for thread in threads: thread.join()
pending.cancel()
client.close()
"""
    assert run(code, folder) == ["(1, 32)"]


def test_who_forks_before_its_first_client_opens_one_in_the_child(folder):
    code = """
import os, sys
from engrid.client import MemoryClient
pid = os.fork()
if not pid:
    with MemoryClient(sys.argv[1]) as client:
        print(client.lookup("t", [1]).shape, flush=True)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
with MemoryClient(sys.argv[1]) as client:
    print(client.lookup("t", [1]).shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("(1, 32)\n" * 2, "")
