"""What the worker's tests share: a small text, a run trained on it, workers and stores on free ports."""

import json
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from engrid.addressing.canonical import CanonicalVocabulary
from engrid.addressing.hashing import NgramHasher
from engrid.client import MemoryClient
from engrid.model.generate import Memory
from engrid.model.rows import InProcessTables
from engrid.model.transformer import Transformer
from engrid.rpc.channel import open_channel
from engrid.tables import RowTable
from engrid.v1 import compute_pb2 as pb
from engrid.v1 import compute_pb2_grpc
from engrid.v1 import memory_pb2 as memory_pb
from engrid.worker.config import TrainConfig, WorkerConfig
from engrid.worker.dense import load_model
from engrid.worker.saved_model import open_checkpoint
from engrid.worker.server import WorkerServer
from engrid.worker.train.corpus import prepare
from engrid.worker.train.run import Place, train
from tests.model.conftest import small_config, small_spec
from tests.shards import local_shards

VOCABULARY = 300
"""256 bytes and 42 merges: too few for a character of three bytes to be one token."""
LINE = "# " + "".join(chr(0x4E00 + 97 * each) for each in range(30)) + "🙂é🚀ñ\n"
CODE = "def add(a, b):\n    return a + b\n"

WORKER = """
import sys
from engrid.worker.config import WorkerConfig
from engrid.worker.server import WorkerServer
server = WorkerServer(WorkerConfig(name=arguments[0], directory=arguments[1], threads=1))
print(server.address, flush=True)
sys.stdin.read()
server.stop(0)
"""


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make_out(folder):
    """A run's folder with its text beside: thirty files, mostly of characters that take several tokens each."""
    (folder / "text").mkdir(parents=True)
    for index in range(30):
        (folder / "text" / f"f{index}.py").write_text(f"# {index}\n" + LINE * 6 + CODE * (index % 3), encoding="utf-8")
    return folder


@pytest.fixture
def out(tmp_path):
    """The folder of a run."""
    return make_out(tmp_path / "out")


def copy_of(folder, to):
    shutil.copytree(folder, to)
    return to


def corpus_of(config):
    return prepare(Path(config.out), vocab_size=VOCABULARY, roots=list(map(Path, config.text)))


def tiny_model(**changes):
    base = {"vocab_size": VOCABULARY, "layers": 2, "context": 512, "engram": small_spec(layers=(0, 1))}
    return small_config(**{**base, **changes})


def tiny_config(out, **changes):
    """Eight steps of a tiny model."""
    base = {"run": "demo", "model": tiny_model(), "steps": 8, "batch": 4, "length": 24, "warmup": 2, "evaluations": 1}
    return TrainConfig(**{"out": str(out), "text": (str(Path(out) / "text"),), "replace": True, **base, **changes})


def finish(config, place=None, folder=None):
    """Trains to the end over the store in `folder`; returns the result."""
    place = place or Place(identity=f"{config.run}-1")
    return list(train(config, place, lambda: MemoryClient(f"file:{folder}"), "cpu"))[-1].result


def everything(out):
    """Rows, their state, dense weights and their optimizer after the last step of a run with Adam."""
    saved = open_checkpoint(out / "checkpoint")
    found = {name: saved.read_file(name) for name in ("model.safetensors", "optimizer.safetensors")}
    for spec in saved.tables.values():
        arrays = {
            "rows": np.empty((spec.rows, spec.row_bytes), np.uint8),
            "exp_avg": np.empty((spec.rows, spec.width), np.float32),
            "exp_avg_sq": np.empty((spec.rows, spec.width), np.float32),
        }
        saved.checkpoints.restore_arrays(list(saved.chain), spec.name, 0, spec.rows, arrays)
        found |= {f"{spec.name}.{name}": array.tobytes() for name, array in arrays.items()}
    return found | {"step": saved.step}


def hasher_of(config, canonical):
    return NgramHasher(config.engram, canonical.size, int(canonical.of[config.engram.pad_token_id]))


@pytest.fixture
def folder(tmp_path):
    """Of the directory that shards register in."""
    return tmp_path / "run"


@pytest.fixture
def store(folder):
    """Two shards and a client to them."""
    with local_shards(folder, 2), MemoryClient(f"file:{folder}") as client:
        yield client


def table_bytes(client, spec, step=0):
    """All rows of a table as they are served."""
    return client.lookup(spec.name, np.arange(spec.rows), step=step)


def within(seconds, is_so):
    """Whether it is so by then."""
    until = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


@dataclass
class Counted:
    lookups: int
    rows: int


def counted(client):
    """Lookups and rows all shards have served."""
    stubs = [client.connections.transport(shard).stub for shard in client.placement.shards]
    replies = [stub.Stats(memory_pb.StatsRequest()) for stub in stubs]
    return Counted(sum(each.lookups for each in replies), sum(each.rows for each in replies))


@dataclass
class Trained:
    """A finished run: its checkpoint, and the same model over tables in this process."""

    out: Path
    result: dict
    rows: dict
    """Of each layer, as the shards served them after the last step."""

    @property
    def checkpoint(self):
        return self.out / "checkpoint" / "step-00000090"

    @property
    def saved(self):
        return open_checkpoint(self.checkpoint)

    @property
    def tokenizer(self):
        return Tokenizer.from_file(str(self.checkpoint / "tokenizer.json"))

    def model_in_process(self) -> tuple[Transformer, Memory]:
        model, tokenizer = load_model(self.saved, "cpu")
        canonical = CanonicalVocabulary(tokenizer)
        tables = {layer: RowTable(spec) for layer, spec in self.saved.tables.items()}
        for layer, rows in self.rows.items():
            tables[layer].load(0, rows)
        return model, Memory(canonical, hasher_of(model.config, canonical), InProcessTables(tables))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run long enough to know the text by heart. Not to be changed: copy it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    out = make_out(folder / "out")
    config = tiny_config(out, steps=90, length=32, warmup=5, learning_rate=1e-2)
    with local_shards(folder / "run", 2), MemoryClient(f"file:{folder / 'run'}") as client:
        result = finish(config, folder=folder / "run")
        specs = open_checkpoint(out / "checkpoint").tables
        rows = {layer: table_bytes(client, spec, step=90) for layer, spec in specs.items()}
    return Trained(out, result, rows)


@contextmanager
def local_worker(folder, name="w0", **config):
    """A worker in this process; yields the stub to it. `stub.address` is where it listens."""
    server = WorkerServer(WorkerConfig(name=name, directory=f"file:{folder}", threads=1, **config))
    try:
        with worker_stub(server.address) as stub:
            yield stub
    finally:
        server.stop(0)


@contextmanager
def worker_stub(address):
    with open_channel(address) as channel:
        stub = compute_pb2_grpc.ComputeServiceStub(channel)
        stub.address, stub.channel = address, channel
        yield stub


@contextmanager
def worker_process(folder, name="w1"):
    """A worker in its own process; yields (process, a function that waits until it serves and returns its address)."""
    script = f"import sys; sys.path[:] = {sys.path!r}; arguments = {[name, f'file:{folder}']!r}\n{WORKER}"
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, encoding="utf-8")
    try:
        yield process, lambda: process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def train_request(config, **more):
    """config: a TrainConfig, or its JSON as a dict."""
    values = config.to_json() if isinstance(config, TrainConfig) else config
    return pb.TrainRequest(config=json.dumps(values), **{"identity": f"{values['run']}-2", "workers": 1, **more})


@contextmanager
def refused(code, *words):
    """The call within must fail with this status, its message holding the words."""
    with pytest.raises(grpc.RpcError) as failed:
        yield
    assert failed.value.code() == code, failed.value.details()
    for word in words:
        assert word in failed.value.details()


@pytest.fixture
def worker(folder, store):
    """A worker over two shards."""
    with local_worker(folder) as stub:
        yield stub


def describe(worker):
    return worker.Describe(pb.WorkerDescribeRequest(), timeout=5)


def load(worker, checkpoint):
    return worker.LoadModel(pb.LoadModelRequest(checkpoint=str(checkpoint)), timeout=30)


def ask(worker, prompt="# ", tokens=3, model=None):
    """model: as LoadModel named it; None: the one used last."""
    model = model or (describe(worker).models or [""])[-1]
    return list(worker.Generate(pb.GenerateRequest(prompt=prompt, max_new_tokens=tokens, model=model), timeout=30))
