"""The shards as a row source: the same rows, bit for bit, as tables in this process, and so the same logits."""

import itertools

import numpy as np
import pytest
import torch

from engrid.addressing.hashing import NgramHasher
from engrid.addressing.lookup import DEAD, Lookup
from engrid.client import ClientConfig, MemoryClient
from engrid.control.tables import create_tables
from engrid.model.generate import Decoder, Memory
from engrid.model.rows import InProcessTables
from engrid.model.transformer import Transformer
from engrid.rpc.errors import BadRequestError, RowOutOfRangeError
from engrid.tables import RowTable
from engrid.worker.rows.remote import RemoteRows
from engrid.worker.rows.tables import table_name, table_specs
from tests.conformance.row_source import RowSourceConformance, Tables
from tests.model.conftest import small_config, small_spec
from tests.model.test_transformer import Identity
from tests.shards import load_initial, local_shards, table
from tests.worker.conftest import counted


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    with local_shards(folder, 2), MemoryClient(f"file:{folder}") as client:
        yield client


class TestRemoteRows(RowSourceConformance):
    @pytest.fixture
    def tables(self, shards):
        spec = table(rows=800, buckets=(400, 400))
        create_tables(shards, [spec], replace=True)
        parts = shards.placement.partitions["t"]
        assert len({part.primary for part in parts}) == 2, "both shards hold rows of the table"
        engram = small_spec(layers=(1,), max_ngram=3, vocab_size=(400, 400), row_width=spec.width)
        return Tables(RemoteRows(shards, engram, {1: "t"}), spec, RowOutOfRangeError, BadRequestError)


VERSIONS = itertools.count()
WAYS = {
    "wire": ClientConfig(shared_memory=False, cache_bytes=0),
    "cached": ClientConfig(shared_memory=False),
    "cache of one set": ClientConfig(shared_memory=False, cache_bytes=3000),
    "mapped": ClientConfig(),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
class TestSealedRows(RowSourceConformance):
    @pytest.fixture
    def tables(self, shards, way):
        spec = table(f"t@{next(VERSIONS)}", rows=800, buckets=(400, 400), optimizer=None)
        load_initial(shards, spec)
        engram = small_spec(layers=(1,), max_ngram=3, vocab_size=(400, 400), row_width=spec.width)
        with MemoryClient(shards.placement.shards["s0"], way) as client:
            yield Tables(RemoteRows(client, engram, {1: spec.name}), spec, RowOutOfRangeError, BadRequestError)
            assert bool(client.shared.reason(spec.name)) is False


def both(client, spec, run):
    """The same tables in the shards and in this process."""
    hasher = NgramHasher(spec, 40, 0)
    specs = table_specs(run, hasher, trained=spec.row_format != "fp8_e4m3_ue8m0")
    create_tables(client, list(specs.values()), partitions_per_shard=2, replace=True)
    remote = RemoteRows(client, spec, {layer: table_name(run, layer) for layer in specs})
    return hasher, remote, InProcessTables({layer: RowTable(each) for layer, each in specs.items()})


FORMATS = [("float32", 8), ("bfloat16", 8), ("fp8_e4m3_ue8m0", 256)]


@pytest.mark.parametrize(("row_format", "width"), FORMATS)
def test_remote_rows_are_bit_equal_to_tables_in_process(shards, row_format, width):
    spec = small_spec(row_format=row_format, row_width=width)
    hasher, remote, local = both(shards, spec, f"equal-{row_format}")
    for seed in range(12):
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, 40, (rng.integers(1, 4), rng.integers(1, 60)))
        ids[rng.random(ids.shape) < 0.2] = DEAD
        lookups, _ = hasher.lookups(ids, hasher.start(len(ids)))
        ours, theirs = remote.prefetch(lookups), local.prefetch(lookups)
        for layer in rng.permutation(list(hasher.layers)):
            rows = ours.rows(layer)
            assert rows.dtype == torch.float32
            assert torch.equal(rows, theirs.rows(layer))
            assert (rows[torch.from_numpy(ids.reshape(-1) == DEAD)] == 0).all()
            assert (rows[torch.from_numpy(ids.reshape(-1) != DEAD)] != 0).any(-1).all(), "no row came back empty"


@pytest.mark.parametrize(("row_format", "width"), FORMATS)
def test_logits_are_bit_equal_whichever_way_the_rows_come(shards, row_format, width):
    spec = small_spec(row_format=row_format, row_width=width)
    hasher, remote, local = both(shards, spec, f"logits-{row_format}")
    model = Transformer(small_config(engram=spec)).eval()
    ids = np.random.default_rng(0).integers(0, 40, (3, 40))
    ids[0, 7], ids[2, 0] = -1, -1
    decoders = [Decoder(model, Memory(Identity(40), hasher, source), 3) for source in (remote, local)]
    for chunk in (ids[:, :30], ids[:, 30:31], ids[:, 31:]):
        ours, theirs = (decoder.step(chunk) for decoder in decoders)
        assert torch.equal(ours, theirs)
    assert not torch.equal(
        decoders[0].step(ids[:, :1]), Decoder(model, Memory(Identity(40), hasher, local), 3).step(ids[:, :1])
    )


def test_traffic_counts_what_the_shards_served_and_equal_ngrams_once(shards):
    hasher, remote, _ = both(shards, small_spec(), "traffic")
    before = counted(shards).rows
    ids = np.random.default_rng(0).integers(0, 6, (2, 50))
    lookups, _ = hasher.lookups(ids, hasher.start(2))
    pending = remote.prefetch(lookups)
    for layer in hasher.layers:
        pending.rows(layer)
    distinct = sum(len(np.unique(each.keys)) * each.row_ids.shape[1] for each in lookups)
    assert remote.traffic.rows == counted(shards).rows - before == distinct < 100 * 8, "each n-gram's rows once"
    assert remote.traffic.bytes == distinct * 32
    assert remote.tokens == 100
    other = RemoteRows(shards, small_spec(), {})
    assert other.traffic.rows == 0, "each source counts its own"


def test_lookup_of_a_layer_without_a_table_is_named(shards):
    _, remote, local = both(shards, small_spec(), "layers")
    lookup = Lookup(layer=7, order=2, keys=np.zeros(1, np.int64), row_ids=np.zeros((1, 2), np.int64))
    for source in (local, remote):
        with pytest.raises((ValueError, BadRequestError), match="layer 7"):
            source.prefetch([lookup])
