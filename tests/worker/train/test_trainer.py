"""A run with its tables in the shards is the run with its tables in this process: losses, rows and weights."""

import dataclasses
import itertools
import math
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engrid.addressing.canonical import CanonicalVocabulary
from engrid.client import MemoryClient
from engrid.model.generate import Memory
from engrid.model.rows import InProcessTables
from engrid.model.transformer import Transformer
from engrid.rpc.errors import BadRequestError
from engrid.tables import RowTable
from engrid.worker.rows.tables import table_specs
from engrid.worker.train import run
from engrid.worker.train.run import Place, train
from engrid.worker.train.trainer import Batches, Trainer
from tests.model.conftest import small_spec
from tests.shards import made_by
from tests.worker.conftest import (
    corpus_of,
    finish,
    hasher_of,
    table_bytes,
    tiny_config,
    tiny_model,
    within,
)

pytestmark = pytest.mark.e2e


@dataclasses.dataclass
class Reference:
    """The same run, put together here over tables of this process."""

    losses: list
    tables: dict
    model: Transformer
    lookups: list

    @classmethod
    def of(cls, config):
        corpus = corpus_of(config)
        canonical = CanonicalVocabulary(corpus.tokenizer)
        hasher = hasher_of(config.model, canonical)
        tables = {layer: RowTable(spec) for layer, spec in table_specs(config.run, hasher).items()}
        model, rows, batches = Transformer(config.model), InProcessTables(tables), Batches(config, corpus, 0, 1)
        memory = Memory(canonical, hasher, rows)
        trainer = Trainer(config, model, batches, memory=memory, rows=rows, workers=1)
        losses = [step.loss for step in trainer.steps()]
        read = [canonical.map(batches.at(step)[:, :-1]) for step in range(1, config.steps + 1)]
        lookups = [each for ids in read for each in hasher.lookups(ids, hasher.start(len(ids)))[0]]
        return cls(losses, tables, model, lookups)

    @property
    def rows(self):
        return {layer: table.raw(0, table.spec.rows) for layer, table in self.tables.items()}


def assert_weights_equal(out, model):
    saved = load_file(out / "checkpoint" / "step-00000008" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(saved[name], value), name


@pytest.mark.parametrize("row_format", ["float32", "bfloat16"])
def test_remote_training_is_bit_equal_to_training_in_process(store, folder, out, row_format):
    engram = small_spec(layers=(0, 1), row_format=row_format)
    config = tiny_config(out, model=tiny_model(engram=engram), evaluations=2)
    reference = Reference.of(config)
    result = finish(config, folder=folder)
    assert result["losses"] == reference.losses
    assert len(set(result["losses"])) == 8
    for layer, rows in reference.rows.items():
        spec = reference.tables[layer].spec
        assert len({part.primary for part in store.placement.partitions[spec.name]}) == 2
        assert np.array_equal(table_bytes(store, spec, step=8), rows)
        assert not np.array_equal(rows, RowTable(spec).raw(0, spec.rows)), "the rows were trained"
    assert_weights_equal(out, reference.model)


def test_memory_in_process_is_the_same_run(out):
    config = tiny_config(out, memory="in_process")
    reference = Reference.of(config)
    result = finish(config)
    assert result["losses"] == reference.losses
    assert_weights_equal(out, reference.model)


def test_memory_learns_and_the_curve_ends_at_the_loss_reported(trained):
    losses = trained.result["losses"]
    assert np.mean(losses[-5:]) < 0.1 * losses[0]
    assert trained.result["validation_loss"] < 1
    assert trained.result["curve"] == [(90, trained.result["validation_loss"])]


def test_the_last_loss_is_of_no_more_text_than_was_trained_on(out, monkeypatch):
    real, limits = run.validation_loss, []

    def measured(*arguments, limit, **more):
        limits.append(limit)
        return real(*arguments, limit=limit, **more)

    monkeypatch.setattr(run, "validation_loss", measured)
    finish(tiny_config(out, memory="off", steps=3, batch=2, length=10))
    assert limits == [3 * 2 * 10]


def test_run_without_memory_asks_for_no_shards(out):
    def connect():
        raise AssertionError("a run without memory opened a connection")

    steps = list(train(tiny_config(out, memory="off"), Place(identity="off"), connect, "cpu"))
    result = steps[-1].result
    assert len(result["losses"]) == 8
    assert "rows_per_token" not in result


def test_traffic_per_token_is_that_of_distinct_ngrams(store, folder, out):
    config = tiny_config(out)
    result = finish(config, folder=folder)
    distinct = sum(len(np.unique(each.keys)) * each.row_ids.shape[1] for each in Reference.of(config).lookups)
    tokens = config.steps * config.batch * config.length
    assert result["rows_per_token"] == distinct / tokens > 0
    assert result["bytes_per_token"] == 32 * distinct / tokens
    assert result["rows_per_token"] < 8, "8 rows of a token, those of equal n-grams once"


def learning_rates(config):
    corpus = corpus_of(config)
    model = Transformer(dataclasses.replace(config.model, engram=None))
    trainer = Trainer(config, model, Batches(config, corpus, 0, 1), memory=None, rows=None, workers=1)
    return [trainer.learning_rate(step) for step in range(1, config.steps + 1)]


def test_learning_rate_rises_over_the_warmup_and_falls_to_a_tenth(out):
    rates = learning_rates(tiny_config(out, steps=30, warmup=10, learning_rate=0.02))
    assert rates[:10] == pytest.approx([0.002 * step for step in range(1, 11)])
    assert rates[9] == pytest.approx(0.02)
    assert rates[19] == pytest.approx(0.011), "half way down the cosine"
    assert rates[29] == pytest.approx(0.002)
    assert all(after < before for before, after in itertools.pairwise(rates[9:]))
    assert rates[14] == pytest.approx(0.002 + 0.018 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize(("steps", "warmup"), [(5, 0), (5, 5), (3, 10)])
def test_learning_rate_of_odd_warmups_is_positive_and_at_most_the_peak(out, steps, warmup):
    rates = learning_rates(tiny_config(out, steps=steps, warmup=warmup, learning_rate=0.02))
    assert all(0 < rate <= 0.02 for rate in rates)


def test_first_step_moves_rows_by_their_ratio_of_the_dense_rate(out):
    """Adam's first step is the learning rate, whatever the gradient."""
    config = tiny_config(out, steps=1, warmup=2, learning_rate=0.004, table_learning_rate_ratio=3.0)
    reference = Reference.of(config)
    moved = [
        np.abs(
            table.raw(0, table.spec.rows).view(np.float32)
            - RowTable(table.spec).raw(0, table.spec.rows).view(np.float32)
        )
        for table in reference.tables.values()
    ]
    assert max(each.max() for each in moved) == pytest.approx(3 * 0.002, rel=1e-3)
    start = Transformer(config.model).state_dict()
    after = reference.model.state_dict()
    assert float((after["embedding.weight"] - start["embedding.weight"]).abs().max()) == pytest.approx(0.002, rel=0.02)


def test_closing_the_iterator_stops_the_run_and_its_name_can_be_used_again(store, folder, out):
    config, clients = tiny_config(out, steps=10_000), []

    def connect():
        clients.append(MemoryClient(f"file:{folder}"))
        return clients[-1]

    def threads():
        return {thread for thread in threading.enumerate() if thread.name.startswith("engrid shard")}

    before = threads()
    progress = train(config, Place(identity="first"), connect, "cpu")
    for each in progress:
        if each.step is not None and each.step.step == 3:
            break
    assert threads() - before
    progress.close()
    assert within(10, lambda: not threads() - before), "the run's connections are closed"
    states = made_by(store, "demo.engram.0") | made_by(store, "demo.engram.1")
    assert states == {("first", 3)}, "the step under way at the close was the last"

    again = dataclasses.replace(config, steps=8)
    reference = Reference.of(again)
    assert finish(again, Place(identity="second"), folder)["losses"] == reference.losses
    assert made_by(store, "demo.engram.0") == {("second", 8)}


def test_unfit_requests_are_refused_before_anything_is_made(store, folder, out):
    with pytest.raises(ValueError, match="tables in process serve one worker"):
        finish(tiny_config(out, memory="in_process"), Place(identity="x", rank=0, workers=2))
    with pytest.raises(ValueError, match="identity"):
        Place(identity="")
    with pytest.raises(ValueError, match="rank 2 of 2 workers"):
        Place(identity="x", rank=2, workers=2)
    assert not store.connections.epoch


@pytest.mark.parametrize(("staleness", "most"), [(0, 0), (1, 1), (3, 3), (-1, 8)])
def test_rows_lag_by_no_more_steps_than_were_asked_for(store, folder, out, staleness, most):
    config = tiny_config(out, staleness=staleness, evaluations=0, durable=False)
    steps = [
        each.step
        for each in train(config, Place(identity="demo-1"), lambda: MemoryClient(f"file:{folder}"), "cpu")
        if each.step is not None
    ]
    assert [step.step for step in steps] == list(range(1, 9))
    assert all(0 <= step.staleness <= most for step in steps)
    assert made_by(store, "demo.engram.0") == {("demo-1", 8)}
    if staleness == 0:
        assert [step.loss for step in steps] == Reference.of(config).losses


def test_lagging_rows_are_asked_for_before_the_steps_they_lag_by(store, folder, out):
    """A prefetch of a step further ahead than the shards have applied would wait for ever."""
    config = tiny_config(out, staleness=2, steps=3, evaluations=0)
    assert finish(config, folder=folder)["steps"] == 3


def test_durable_steps_need_shards_that_keep_a_log(store, folder, out):
    with pytest.raises(BadRequestError, match="keeps no log"):
        finish(tiny_config(out, durable=True), folder=folder)
