"""Shards in processes that are killed and started again on the same port, and pushes whose sums are exact."""

from __future__ import annotations

import random
import socket
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np

from engrid.client import Attempt, MemoryClient, TrainingRun
from engrid.client.config import ClientConfig
from engrid.rpc.errors import UnavailableError
from engrid.tables import decode_rows
from tests.shards import shard_process, table

SPEC = table(rows=600, init_std=0.0)
"""Its rows begin at zero, so plain SGD with a rate of 1 leaves in them the negated sum of all gradients, exactly."""


def free_port(host="127.0.0.1"):
    """A port that nobody listens on now, nor is given by chance to whoever asks for any: it lies below those."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


class MortalShard:
    """One shard with a state folder. `kill` is SIGKILL; `start` brings it back under the same address."""

    def __init__(self, folder, name="s0", *more, state=None):
        self._folder, self.name = folder, name
        self.state = state or folder / f"state-{name}"
        self.port = free_port()
        self._options = ["--listen", f"127.0.0.1:{self.port}", "--state", str(self.state), *more]
        self._stack = ExitStack()
        self.process = None

    def start(self):
        self.process, _ = self._stack.enter_context(
            shard_process(self._folder, self.name, *self._options),
        )

    def kill(self):
        """Returns once it is gone, and waited for."""
        self._stack.close()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.kill()


class Pushers:
    """Workers that push whole-numbered gradients step by step, all at once; `sum` is what was acknowledged."""

    def __init__(self, folder, workers=2, *, durable, seed, rows=40, push_timeout=60.0, tries=1, attempt=1):
        """Begins at the step where the shards stand, with no sum. tries: how often the same push is tried where it fails for want of an answer."""
        self._stack = ExitStack()
        begun = Attempt("r", attempt, uuid.uuid4().hex)
        config = ClientConfig(push_timeout=push_timeout)
        self._pool = self._stack.enter_context(ThreadPoolExecutor(workers))
        self.clients = [
            self._stack.enter_context(MemoryClient(f"file:{folder}", config=config)) for _ in range(workers)
        ]
        self._rng = np.random.default_rng(seed)
        self._rows, self._tries = rows, tries
        self.sum = np.zeros((SPEC.rows, SPEC.width))
        self.failed = 0
        self.runs = []
        for rank, client in enumerate(self.clients):
            self.runs.append(
                self._trying(
                    lambda client=client, rank=rank: TrainingRun(
                        client, run="r", attempt=begun, worker=rank, workers=workers, tables=["t"], durable=durable
                    )
                )
            )
        self.step = self.runs[0].step

    def push(self):
        """One step; returns when every worker's push was acknowledged. A row comes twice now and then."""
        self._parts = []
        for _ in self.runs:
            ids = self._rng.integers(0, SPEC.rows, self._rows)
            values = self._rng.integers(-8, 9, (self._rows, SPEC.width)).astype(np.float32)
            self._parts.append((ids, values))
        self.push_again()

    def push_again(self):
        """The same step, where `push` raised."""
        step, parts = self.step + 1, self._parts

        def send(run, part):
            self._trying(lambda: run.push({"t": part}, step=step, learning_rate=1.0))

        list(self._pool.map(send, self.runs, parts))
        self.step = step
        for ids, values in parts:
            np.add.at(self.sum, ids, values)

    def push_through(self, refusal):
        """As `push`, and the same step again for as long as it is refused so."""
        deadline, call = time.monotonic() + 30, self.push
        while True:
            try:
                return call()
            except refusal:
                assert time.monotonic() < deadline
                call = self.push_again
                time.sleep(0.01)

    def _trying(self, call):
        for left in reversed(range(self._tries)):
            try:
                return call()
            except UnavailableError:
                self.failed += 1
                if not left:
                    raise
        raise AssertionError

    def rows(self):
        """All rows as the shards hold them; waits for a shard that is being started."""
        deadline = time.monotonic() + 30
        while True:
            try:
                raw = self.clients[0].lookup("t", np.arange(SPEC.rows), step=self.step)
                return decode_rows(np.ascontiguousarray(raw), SPEC.row_format, SPEC.width)
            except UnavailableError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def check(self):
        """What was acknowledged is in the rows, once, and nothing else is."""
        wrong = np.flatnonzero((self.rows() != -self.sum).any(axis=1))
        assert not len(wrong), f"step {self.step}: rows {wrong[:10].tolist()} hold other sums than were acknowledged"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stack.close()


def push_while(pushers, work):
    """Pushes until `work`, in a thread, is done; raises what it raised."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        while not done.done():
            pushers.push()
        done.result()
