"""`engrid train` and `engrid generate` over a worker and shards that the test started itself, without Ray."""

import dataclasses
import json
import re
import signal
import time
from contextlib import ExitStack

import pytest

from engrid.cluster.config import Record
from engrid.cluster.generate import open_model, stream
from engrid.cluster.versions import prune, publish, roll_back
from engrid.model.generate import generate
from engrid.rpc.errors import EngridError
from engrid.worker.dense import load_model
from engrid.worker.saved_model import open_checkpoint
from tests.clusters import engrid, start_engrid, succeeded
from tests.shards import shard_process
from tests.worker.conftest import finish, local_worker, make_out, tiny_config

pytestmark = pytest.mark.e2e


@pytest.fixture
def cluster(tmp_path):
    """(run directory, the shards' processes): what `engrid up` would have written down of two shards and a worker."""
    folder = tmp_path / "run"
    with ExitStack() as stack:
        shards = {name: stack.enter_context(shard_process(folder, name)) for name in ("s0", "s1")}
        worker = stack.enter_context(local_worker(folder))
        addresses = {name: address for name, (_, address) in shards.items()}
        record = Record(
            identity="x",
            directory=f"file:{folder}",
            run_dir=str(folder),
            shards=addresses,
            workers={"w0": worker.address},
            ready=True,
        )
        record.save(folder)
        yield folder, [process for process, _ in shards.values()]


def options_of(out, folder, **changes):
    """Options of `engrid train` for a tiny run in a folder made anew, without a limit of steps."""
    make_out(out)
    path = out.with_suffix(".json")
    path.write_text(
        json.dumps(tiny_config(out, **{"steps": 100_000, "replace": False, **changes}).to_json()), encoding="utf-8"
    )
    return ["--config", path, "--run-dir", folder]


def read_until(process, words):
    """Reads what is printed up to a line with the words."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if words in line:
            return seen
    raise AssertionError(f"{seen} {process.stderr.read()}")


def stepping(out):
    """Whether the run has saved a checkpoint on the way."""
    return list((out / "checkpoint").glob("step-*"))


def wait_for(condition, process):
    until = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def test_the_first_ctrl_c_saves_and_says_how_to_go_on(cluster, tmp_path):
    folder, _ = cluster
    training = start_engrid("train", *options_of(tmp_path / "out", folder, checkpoint_every=1, full_every=1))
    wait_for(lambda: stepping(tmp_path / "out"), training)
    training.send_signal(signal.SIGINT)
    printed, said = training.communicate(timeout=60)
    assert training.returncode == 130, said
    assert "looked for .py, .txt, .md, .jsonl in" in printed
    saved = open_checkpoint(tmp_path / "out" / "checkpoint")
    assert f"stopped after step {saved.step} of 100000; checkpoint in {saved.path}" in printed
    again = re.search("go on with: engrid (.*)", printed)[1].split()
    done = succeeded(engrid(*again, "--steps", saved.step + 2))
    assert f"after {saved.step + 2} steps" in done


def test_the_second_ctrl_c_ends_at_once_and_says_what_is_lost(cluster, tmp_path):
    folder, shards = cluster
    training = start_engrid("train", *options_of(tmp_path / "out", folder, checkpoint_every=1))
    wait_for(lambda: stepping(tmp_path / "out"), training)
    shards[0].send_signal(signal.SIGSTOP)
    training.send_signal(signal.SIGINT)
    read_until(training, "stopping after this step and saving it; Ctrl-C again ends at once")
    training.send_signal(signal.SIGINT)
    _, said = training.communicate(timeout=30)
    assert training.returncode == 130
    step = int(re.search("cut off: steps after (\\d+) are lost; go on from checkpoint step-0", said)[1])
    # One that was all but saved when the shard was stopped may have come after that was said.
    assert 1 <= step <= open_checkpoint(tmp_path / "out" / "checkpoint").step
    assert "Traceback" not in said


def test_ctrl_c_before_the_first_step_ends_at_once(cluster, tmp_path):
    """A shard stands still, so that there never is one."""
    folder, shards = cluster
    shards[0].send_signal(signal.SIGSTOP)
    training = start_engrid("train", *options_of(tmp_path / "out", folder))
    read_until(training, "looked for")
    training.send_signal(signal.SIGINT)
    _, said = training.communicate(timeout=30)
    assert training.returncode == 130
    assert "no checkpoint was saved" in said


def test_a_second_run_of_a_name_is_refused_until_it_may_replace_the_first(cluster, tmp_path):
    folder, _ = cluster
    first = options_of(tmp_path / "first", folder, steps=3)
    succeeded(engrid("train", *first))
    second = options_of(tmp_path / "second", folder, steps=3)
    refused = engrid("train", *second)
    assert refused.returncode == 1
    assert re.search(r"hold rows of run demo-[0-9a-f]{12} .step 3., which would be lost", refused.stderr)
    assert "--replace" in refused.stderr
    succeeded(engrid("train", *first, "--resume", "--steps", 4))
    succeeded(engrid("train", *second, "--replace"))


def model_of(folder, checkpoint=None, run=""):
    """The model that `engrid generate` gets, which has generated with it."""
    with open_model(Record.load(folder), checkpoint, run) as worker:
        assert stream(worker, "def add(", lambda _: None, max_new_tokens=3).new_tokens == 3
        return worker.model


def test_what_is_published_and_taken_back_is_what_is_generated_with(cluster, tmp_path):
    folder, _ = cluster
    models = []
    for seed in (1, 2):
        out = make_out(tmp_path / f"out-{seed}")
        finish(tiny_config(out, steps=2, seed=seed), folder=folder)
        models.append(open_checkpoint(out / "checkpoint").model_name)
    with pytest.raises(EngridError, match="no version of run 'demo' is published; publish one"):
        model_of(folder, run="demo")
    for seed in (1, 2):
        succeeded(engrid("publish", tmp_path / f"out-{seed}" / "checkpoint", "--run-dir", folder))
        assert model_of(folder, run="demo") == models[seed - 1]
    assert model_of(folder, tmp_path / "out-1" / "checkpoint") == models[0]
    assert model_of(folder, run="demo") == models[1]
    succeeded(engrid("versions", "--rollback", "demo", "--run-dir", folder))
    written = succeeded(engrid("generate", "def add(", "--max-new-tokens", 8, "--run", "demo", "--run-dir", folder))
    assert f"model {models[0]}" in written.replace("\n", " ")
    (tmp_path / "out-1").rename(tmp_path / "moved")
    with pytest.raises(EngridError, match=r"of run demo was published from .*out-1.* so its dense weights are lost"):
        model_of(folder, run="demo")
    both = engrid("generate", "x", "--run", "demo", "--checkpoint", tmp_path, "--run-dir", folder)
    assert "not both" in both.stderr


def test_what_is_published_stays_while_training_rotates_its_checkpoints(cluster, tmp_path):
    folder, _ = cluster
    config = tiny_config(make_out(tmp_path / "out"), steps=2, checkpoint_every=1, keep=1)
    checkpoint = tmp_path / "out" / "checkpoint"
    models = []
    for steps in (2, 6, 9, 12):
        finish(dataclasses.replace(config, steps=steps, resume=steps > 2), folder=folder)
        publish(folder, checkpoint)
        models.append(open_checkpoint(checkpoint).model_name)
        prune(folder, "demo")
    finish(dataclasses.replace(config, steps=14, resume=True), folder=folder)
    assert sorted(path.name[:13] for path in checkpoint.glob("step-*")) == [
        "step-00000009",
        "step-00000012",
        "step-00000014",
    ]
    assert model_of(folder, run="demo") == models[-1]
    roll_back(folder, "demo", "")
    assert model_of(folder, run="demo") == models[-2]


def test_rows_alone_are_published_and_not_generated_with(cluster, tmp_path):
    folder, _ = cluster
    finish(tiny_config(make_out(tmp_path / "out"), steps=2), folder=folder)
    succeeded(engrid("checkpoint", "save", "--run", "demo", "--folder", tmp_path / "rows", "--run-dir", folder))
    assert publish(folder, tmp_path / "rows")[0] == "demo"
    with pytest.raises(
        EngridError, match="cannot be generated with: checkpoint step-00000002 holds rows alone, no model"
    ):
        model_of(folder, run="demo")


def test_prompts_at_once_are_each_continued_by_their_own_model(cluster, tmp_path):
    """Three models over a worker that keeps two: each caller gives the worker its own again when it has let go of it."""
    folder, _ = cluster
    models = {}
    for seed in (1, 2, 3):
        out = make_out(tmp_path / f"out-{seed}")
        finish(tiny_config(out, steps=2, seed=seed, memory="off"))
        models[out / "checkpoint"] = open_checkpoint(out / "checkpoint").model_name
    with ExitStack() as stack:
        record = Record.load(folder)
        workers = [stack.enter_context(open_model(record, checkpoint)) for checkpoint in models]
        assert [each.model for each in workers] == list(models.values())
        texts = [[] for _ in workers]
        for _ in range(2):
            for worker, text in zip(workers, texts, strict=True):
                stream(worker, "def", text.append, max_new_tokens=20)
    for checkpoint, text in zip(models, texts, strict=True):
        model, tokenizer = load_model(open_checkpoint(checkpoint), "cpu")
        ids = tokenizer.encode("def", add_special_tokens=False).ids
        expected = tokenizer.decode(list(generate(model, None, ids, max_new_tokens=20)), skip_special_tokens=False)
        assert "".join(text) == expected.rstrip("\ufffd") * 2
