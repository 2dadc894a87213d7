"""A shard that answers late costs no time where there is something to compute meanwhile; it does where there is not.

The shards delay every lookup behind real gRPC streams, and some layers of the model take long, as they would on a device
that leaves the host idle. Medians of steps taken in turn are compared, so what else the machine does falls on both.
"""

import dataclasses
import statistics
import time

import numpy as np
import pytest

from engrid.addressing.hashing import NgramHasher
from engrid.client import MemoryClient
from engrid.control.tables import create_tables
from engrid.model.generate import Decoder, Memory
from engrid.model.transformer import Transformer
from engrid.shard.service import ShardService
from engrid.worker.rows.remote import RemoteRows
from engrid.worker.rows.tables import table_name, table_specs
from tests.model.conftest import small_config, small_spec
from tests.model.test_transformer import Identity
from tests.shards import local_shards

pytestmark = pytest.mark.e2e

LAYERS = 0.15
"""Seconds that the slow layers take together."""
DELAY = 0.12
"""Seconds a lookup takes; less than the layers."""
ROUNDS = 5
IDS = np.random.default_rng(0).integers(0, 40, (1, 20))


class LateService(ShardService):
    """Answers each lookup late."""

    delay = 0.0

    def lookup(self, request, deadline, cancelled):
        time.sleep(self.delay)
        return super().lookup(request, deadline, cancelled)


class AtOnce:
    """A row source that waits for the rows as soon as they are asked for."""

    def __init__(self, source):
        self.source = source

    def prefetch(self, lookups):
        pending = self.source.prefetch(lookups)
        return Arrived({layer: pending.rows(layer) for layer in {each.layer for each in lookups}})


@dataclasses.dataclass
class Arrived:
    by_layer: dict

    def rows(self, layer):
        return self.by_layer[layer]


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setattr("engrid.shard.grpc.server.ShardService", LateService)
    with local_shards(tmp_path / "run", 2), MemoryClient(f"file:{tmp_path / 'run'}") as client:
        yield client


def slow_model(client, *, engram, slow):
    """A model with an Engram before the layer `engram`, whose layers `slow` take long; and its rows in the shards."""
    spec = small_spec(layers=(engram,))
    model = Transformer(small_config(engram=spec)).eval()
    for layer in slow:
        model.blocks[layer].register_forward_pre_hook(lambda *_: time.sleep(LAYERS / len(slow)))
    hasher = NgramHasher(spec, 40, 0)
    create_tables(client, list(table_specs("late", hasher).values()))
    rows = RemoteRows(client, spec, {engram: table_name("late", engram)})
    return model, Memory(Identity(40), hasher, rows)


def lengthened(monkeypatch, work):
    """How many times as long the work takes where the shards answer late."""
    seconds = {0.0: [], DELAY: []}
    for _ in range(ROUNDS):
        for delay, taken in seconds.items():
            monkeypatch.setattr(LateService, "delay", delay)
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
    return statistics.median(seconds[DELAY]) / statistics.median(seconds[0.0])


def test_delay_shorter_than_the_layers_before_does_not_lengthen_the_step(shards, monkeypatch):
    model, memory = slow_model(shards, engram=2, slow=(0, 1))
    assert lengthened(monkeypatch, lambda: Decoder(model, memory).step(IDS)) < 1.25


def test_the_same_delay_awaited_at_once_does(shards, monkeypatch):
    model, memory = slow_model(shards, engram=2, slow=(0, 1))
    memory = dataclasses.replace(memory, source=AtOnce(memory.source))
    assert lengthened(monkeypatch, lambda: Decoder(model, memory).step(IDS)) > 1.4


def test_layers_before_the_engram_layer_are_what_hides_it(shards, monkeypatch):
    model, memory = slow_model(shards, engram=1, slow=(2, 3))
    assert lengthened(monkeypatch, lambda: Decoder(model, memory).step(IDS)) > 1.4


def test_delay_of_a_chunk_is_hidden_behind_the_chunk_before(shards, monkeypatch):
    """Only the first of five is waited for: 1 + 0.12 / 0.75 = 1.16."""
    model, memory = slow_model(shards, engram=0, slow=(1,))
    assert lengthened(monkeypatch, lambda: list(Decoder(model, memory).read(IDS, 4))) < 1.35


def test_chunks_asked_for_one_by_one_are_all_waited_for(shards, monkeypatch):
    model, memory = slow_model(shards, engram=0, slow=(1,))

    def one_by_one():
        decoder = Decoder(model, memory)
        for first in range(0, 20, 4):
            decoder.step(IDS[:, first : first + 4])

    assert lengthened(monkeypatch, one_by_one) > 1.4
