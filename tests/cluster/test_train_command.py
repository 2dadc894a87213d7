"""`engrid train` and `engrid generate` over a worker and shards that the test started itself, without Ray."""

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from engrid.cluster.config import Record
from engrid.worker.saved_model import open_checkpoint
from tests.clusters import engrid, start_engrid, succeeded
from tests.shards import shard_process
from tests.worker.conftest import finish, local_worker, make_out, tiny_config


@pytest.fixture
def cluster(tmp_path):
    """(run directory, the shards' processes): what `engrid up` would have written down of two shards and a worker."""
    folder = tmp_path / "run"
    with ExitStack() as stack:
        shards = {name: stack.enter_context(shard_process(folder, name)) for name in ("s0", "s1")}
        worker = stack.enter_context(local_worker(folder))
        addresses = {name: address for name, (_, address) in shards.items()}
        record = Record(
            identity="x", directory=f"file:{folder}", shards=addresses, workers={"w0": worker.address}, ready=True
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


def said_of(folder, *options):
    """What `engrid generate` says, and the model that it names."""
    done = succeeded(engrid("generate", "def add(", "--max-new-tokens", 8, "--run-dir", folder, *options))
    return re.search(r"model (\S+)", done)[1]


def test_what_is_published_and_taken_back_is_what_is_generated_with(cluster, tmp_path):
    folder, _ = cluster
    models = []
    for seed in (1, 2):
        out = make_out(tmp_path / f"out-{seed}")
        finish(tiny_config(out, steps=2, seed=seed), folder=folder)
        models.append(open_checkpoint(out / "checkpoint").model_name)
    refused = engrid("generate", "x", "--run", "demo", "--run-dir", folder)
    assert refused.returncode == 1
    assert "no version of run 'demo' is published; publish one (engrid publish)" in refused.stderr
    for seed in (1, 2):
        succeeded(engrid("publish", tmp_path / f"out-{seed}" / "checkpoint", "--run-dir", folder))
        assert said_of(folder, "--run", "demo") == models[seed - 1]
    assert said_of(folder, "--checkpoint", tmp_path / "out-1" / "checkpoint") == models[0]
    assert said_of(folder, "--run", "demo") == models[1]
    succeeded(engrid("versions", "--rollback", "demo", "--run-dir", folder))
    assert said_of(folder, "--run", "demo") == models[0]
    (tmp_path / "out-1").rename(tmp_path / "moved")
    refused = engrid("generate", "x", "--run", "demo", "--run-dir", folder)
    assert refused.returncode == 1
    assert "of run demo was published from" in refused.stderr
    assert "which is not there any more, so its dense weights are lost" in refused.stderr.replace("\n", " ")
    both = engrid("generate", "x", "--run", "demo", "--checkpoint", tmp_path, "--run-dir", folder)
    assert "not both" in both.stderr


def test_rows_alone_are_published_and_not_generated_with(cluster, tmp_path):
    folder, _ = cluster
    finish(tiny_config(make_out(tmp_path / "out"), steps=2), folder=folder)
    succeeded(engrid("checkpoint", "save", "--run", "demo", "--folder", tmp_path / "rows", "--run-dir", folder))
    published = succeeded(engrid("publish", tmp_path / "rows", "--run-dir", folder))
    assert "of run demo is current" in published
    refused = engrid("generate", "x", "--run", "demo", "--run-dir", folder)
    assert refused.returncode == 1
    assert "cannot be generated with: checkpoint step-00000002 holds rows alone, no model" in refused.stderr


def test_two_prompts_at_once_are_each_continued_by_their_own_model(cluster, tmp_path):
    folder, _ = cluster
    models = {}
    for seed in (1, 2, 3):
        out = make_out(tmp_path / f"out-{seed}")
        finish(tiny_config(out, steps=2, seed=seed, memory="off"))
        models[out / "checkpoint"] = open_checkpoint(out / "checkpoint").model_name
    command = [sys.executable, "-m", "engrid.cluster.cli", "generate", "def", "--run-dir", str(folder), "--checkpoint"]
    running = [
        subprocess.Popen([*command, str(checkpoint)], stdout=subprocess.PIPE, encoding="utf-8", env=None)
        for checkpoint in models
    ]
    printed = [each.communicate(timeout=100)[0] for each in running]
    assert [re.search(r"model\s+(\S+)", each)[1] for each in printed] == list(models.values())
