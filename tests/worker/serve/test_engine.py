"""Text from a worker over real shards is the text of the same model over tables in this process."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest

from engrid.client import MemoryClient
from engrid.model.generate import Decoder, generate
from engrid.v1 import compute_pb2 as pb
from tests.model.conftest import small_spec
from tests.shards import local_shards
from tests.worker.conftest import (
    LINE,
    Trained,
    counted,
    finish,
    local_worker,
    make_out,
    tiny_config,
    tiny_model,
    within,
)


@dataclass
class Served:
    """A worker that has loaded the trained run and reads each row over gRPC, and the run itself."""

    stub: Any
    client: MemoryClient
    trained: Trained

    def ask(self, prompt, *, tokens=40, **more):
        model = self.trained.saved.model_name
        request = pb.GenerateRequest(prompt=prompt, max_new_tokens=tokens, model=model, **more)
        return list(self.stub.Generate(request, timeout=30))

    def token_ids(self, prompt, tokens=40, **more):
        """What the same model says over tables in this process."""
        model, memory = self.trained.model_in_process()
        ids = self.trained.tokenizer.encode(prompt, add_special_tokens=False).ids
        return list(generate(model, memory, ids, max_new_tokens=tokens, **more))


@pytest.fixture(scope="module")
def served(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with ExitStack() as stack:
        stack.enter_context(local_shards(folder, 2))
        stub = stack.enter_context(local_worker(folder, shared_memory=False, cache_bytes=0))
        client = stack.enter_context(MemoryClient(f"file:{folder}"))
        reply = stub.LoadModel(pb.LoadModelRequest(checkpoint=str(trained.checkpoint)))
        assert (reply.run, reply.step, reply.model) == ("demo", 90, trained.saved.model_name)
        yield Served(stub, client, trained)


def text_of(replies):
    return "".join(reply.text for reply in replies)


def ids_of(replies):
    return [token for reply in replies for token in reply.token_ids]


PROMPTS = [LINE[:5], LINE[:20], LINE + LINE[:9], "def add(", "# 7\n", "é", "\n"]


@pytest.mark.parametrize("prompt", PROMPTS, ids=ascii)
def test_text_is_that_of_the_model_over_tables_in_process(served, prompt):
    replies = served.ask(prompt)
    expected = served.token_ids(prompt)
    assert ids_of(replies) == expected
    decode = served.trained.tokenizer.decode
    assert text_of(replies) == decode(expected, skip_special_tokens=False).rstrip("\ufffd")


WAYS = {
    "mapped": ({"cache_bytes": 0}, 0.0),
    "cached": ({"shared_memory": False}, 0.5),
    "cache of a few sets": ({"shared_memory": False, "cache_bytes": 4096}, 1.0),
}
"""How a worker is configured, and the most it then fetches over the wire of what a worker without either does."""


@pytest.mark.parametrize(("config", "most"), WAYS.values(), ids=WAYS.keys())
def test_text_is_the_same_by_every_way_to_the_rows(served, trained, tmp_path, config, most):
    with local_shards(tmp_path / "run", 2), local_worker(tmp_path / "run", **config) as stub:
        stub.LoadModel(pb.LoadModelRequest(checkpoint=str(trained.checkpoint)))
        fetched = of_all = 0
        for prompt in (*PROMPTS, *PROMPTS):
            replies, expected = Served(stub, served.client, trained).ask(prompt), served.ask(prompt)
            assert ids_of(replies) == ids_of(expected)
            fetched += replies[-1].totals.rows_fetched
            of_all += expected[-1].totals.rows_fetched
    assert fetched <= most * of_all
    assert replies[-1].totals.rows_here > 0


def test_what_was_learned_by_heart_is_continued(served):
    text = text_of(served.ask(LINE[:5], tokens=60))
    assert len(text) > 20, "every character takes several tokens"
    assert (LINE[5:] + LINE).startswith(text)


def test_text_comes_in_whole_characters_as_soon_as_they_are_whole(served):
    replies = served.ask(LINE[:5], tokens=60)
    assert sum(len(reply.token_ids) > 1 for reply in replies) > 10, "characters of several tokens"
    assert all("\ufffd" not in reply.text for reply in replies)
    assert len(replies) > 15, "the text is streamed"
    seen, text = [], ""
    for reply in replies:
        seen += reply.token_ids
        text += reply.text
        assert text == served.trained.tokenizer.decode(seen, skip_special_tokens=False).rstrip("\ufffd")


def test_sampling_is_that_of_the_seed(served):
    first, again, other = (served.ask("# ", temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert ids_of(first) == ids_of(again) != ids_of(other)
    assert ids_of(first) == served.token_ids("# ", temperature=1.5, seed=1)
    assert ids_of(first) != ids_of(served.ask("# "))


def test_drafts_change_no_token_and_each_accepted_one_saves_a_pass(served):
    drafted = accepted = 0
    for prompt in [LINE + LINE[:9], "def add(a, b):\n    return a", "# 7\n"]:
        before = counted(served.client).lookups
        plain = served.ask(prompt)
        between = counted(served.client).lookups
        replies = served.ask(prompt, draft_tokens=4)
        totals = replies[-1].totals
        assert ids_of(replies) == ids_of(plain) == served.token_ids(prompt)
        assert text_of(replies) == text_of(plain)
        per_pass = (between - before) / 40
        assert counted(served.client).lookups - between == per_pass * (40 - totals.accepted_tokens)
        assert (plain[-1].totals.drafted_tokens, plain[-1].totals.accepted_tokens) == (0, 0)
        drafted, accepted = drafted + totals.drafted_tokens, accepted + totals.accepted_tokens
    assert 0 < accepted < drafted


def test_drafts_are_off_where_tokens_are_sampled(served):
    replies = served.ask("# ", temperature=1.5, seed=1, draft_tokens=4)
    assert ids_of(replies) == served.token_ids("# ", temperature=1.5, seed=1)
    assert replies[-1].totals.drafted_tokens == 0


def test_totals_count_what_was_read_and_fetched(served):
    prompt, before = LINE[:12], counted(served.client)
    replies = served.ask(prompt, tokens=7)
    totals = replies[-1].totals
    assert not any(reply.HasField("totals") for reply in replies[:-1])
    assert totals.prompt_tokens == len(served.trained.tokenizer.encode(prompt).ids)
    assert totals.new_tokens == 7 == len(ids_of(replies))
    assert totals.rows_fetched == counted(served.client).rows - before.rows > 0
    assert totals.bytes_fetched == 32 * totals.rows_fetched
    assert 0 < totals.exposed_wait < totals.prefill_time + totals.decode_time
    assert totals.decode_time > 0


def test_no_limit_fills_the_context(served):
    replies = served.ask("# " + LINE * 6, tokens=0)
    totals = replies[-1].totals
    assert totals.prompt_tokens + totals.new_tokens == 512


def test_concurrent_generations_do_not_mix(served):
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(served.ask, PROMPTS[:4]))
    for prompt, replies in zip(PROMPTS, together, strict=False):
        assert ids_of(replies) == served.token_ids(prompt)


def assert_explained(served, prompt, trace):
    """Per token and layer: the hasher's row ids, the n-gram as text, the gates of a plain forward pass."""
    model, memory = served.trained.model_in_process()
    tokenizer = served.trained.tokenizer
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    gates = {}
    Decoder(model, memory).step(np.array([ids]), gates)
    hasher = memory.hasher
    rows = {layer: hasher.row_ids(memory.canonical.map(np.array([ids])), layer)[0] for layer in hasher.layers}
    assert [(each.token, each.layer) for each in trace] == [
        (tokenizer.decode([token], skip_special_tokens=False), layer) for token in ids for layer in (0, 1)
    ]
    for index, each in enumerate(trace):
        at, layer = divmod(index, 2)
        assert [ngram.order for ngram in each.ngrams] == [2, 3]
        assert [len(ngram.row_ids) for ngram in each.ngrams] == [2, 2]
        assert [row for ngram in each.ngrams for row in ngram.row_ids] == rows[layer][at].tolist()
        assert list(each.gates) == pytest.approx(gates[layer][0, at].tolist(), abs=1e-6)
        for ngram in each.ngrams:
            window = ids[max(0, at + 1 - ngram.order) : at + 1]
            assert ngram.text == tokenizer.decode(window, skip_special_tokens=False)


@pytest.mark.parametrize("prompt", ["def add(a, b)", LINE[:6], "a"])
def test_explain_gives_rows_and_gates_of_every_prompt_token_in_the_first_reply(served, prompt):
    replies = served.ask(prompt, tokens=5, explain=True)
    assert_explained(served, prompt, replies[0].trace)
    assert not any(reply.trace for reply in replies[1:])
    assert ids_of(replies) == served.token_ids(prompt, 5)
    assert not any(reply.trace for reply in served.ask(prompt, tokens=2)), "only when asked for"


def test_explain_answers_where_no_whole_character_follows(served):
    """The one new token is the first byte of a character."""
    decode = served.trained.tokenizer.decode
    prompt = next(LINE[:size] for size in range(3, 20) if not decode(served.token_ids(LINE[:size], 1)).strip("\ufffd"))
    replies = served.ask(prompt, tokens=1, explain=True)
    assert text_of(replies) == ""
    assert_explained(served, prompt, replies[0].trace)


def prompt_of(served, tokens):
    """A prompt of just so many tokens."""
    encode = served.trained.tokenizer.encode
    prompt = next(text for text in ((LINE * 12)[:size] for size in range(600)) if len(encode(text).ids) >= tokens - 3)
    prompt += "".join(["1", "2", "3"][: tokens - len(encode(prompt).ids)])
    assert len(encode(prompt).ids) == tokens
    return prompt


def test_prompt_as_long_as_the_context_is_explained_and_counted(served):
    prompt = prompt_of(served, 512)
    replies = served.ask(prompt, explain=True)
    totals = replies[-1].totals
    assert (totals.prompt_tokens, totals.new_tokens) == (512, 0)
    assert_explained(served, prompt, replies[0].trace)
    assert totals.rows_fetched > 0
    assert totals.prefill_time > 0


def test_explain_of_a_prompt_longer_than_a_chunk(tmp_path):
    """Prompts are read 4,096 tokens at a time."""
    out = make_out(tmp_path / "out")
    model = tiny_model(layers=1, context=4200, engram=small_spec(layers=(0,)))
    with local_shards(tmp_path / "run", 1), local_worker(tmp_path / "run") as stub:
        finish(tiny_config(out, model=model, steps=1), folder=tmp_path / "run")
        loaded = stub.LoadModel(pb.LoadModelRequest(checkpoint=str(out / "checkpoint")))
        request = pb.GenerateRequest(prompt="1+" * 2060, max_new_tokens=1, explain=True, model=loaded.model)
        trace = [each for reply in stub.Generate(request, timeout=60) for each in reply.trace]
    assert len(trace) == 4120
    assert all(len(each.gates) == 1 for each in trace)


def test_empty_prompt_is_refused_by_name(served):
    with pytest.raises(grpc.RpcError) as refused:
        served.ask("")
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "prompt is empty" in refused.value.details()


def test_prompt_longer_than_the_context_is_refused_by_name(served):
    with pytest.raises(grpc.RpcError) as refused:
        served.ask(prompt_of(served, 513))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "prompt has 513 tokens, the model's context is 512" in refused.value.details()


def test_temperature_that_is_no_number_is_refused_by_name(served):
    with pytest.raises(grpc.RpcError) as refused:
        served.ask("# ", tokens=3, temperature=float("nan"))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "temperature" in refused.value.details()


def test_smallest_temperature_is_greedy(served):
    assert ids_of(served.ask("# ", tokens=3, temperature=1e-40)) == served.token_ids("# ", 3)


def test_cancelling_stops_the_work_and_the_next_call_is_answered(served):
    before = counted(served.client).lookups
    served.ask("# ", tokens=20)
    per_token = (counted(served.client).lookups - before) / 20
    before = counted(served.client).lookups
    call = served.stub.Generate(pb.GenerateRequest(prompt="# ", model=served.trained.saved.model_name))
    next(call)
    call.cancel()

    def is_still():
        seen = counted(served.client).lookups
        time.sleep(0.2)
        return counted(served.client).lookups == seen

    assert within(10, is_still)
    assert counted(served.client).lookups - before < 400 * per_token, "the context holds 510 more tokens"
    assert ids_of(served.ask("# ", tokens=5)) == served.token_ids("# ", 5)
