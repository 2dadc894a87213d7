"""The same text gives the same logits however it is cut, and Engram changes nothing of the backbone."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engrid.addressing.canonical import CanonicalVocabulary
from engrid.addressing.hashing import NgramHasher
from engrid.model.attention import Attention, rotary_table
from engrid.model.generate import Decoder, Memory, generate
from engrid.model.moe import MoE
from engrid.model.rows import InProcessTables
from engrid.model.transformer import Transformer
from engrid.tables import RowTable, TableSpec
from tests.model.conftest import small_config


class Identity(CanonicalVocabulary):
    """Every id its own canonical id."""

    def __init__(self, size):
        self.of, self.size = np.arange(size), size


def make(config=None):
    config = config or small_config()
    model = Transformer(config).eval()
    with torch.no_grad():
        for engram in model.engrams.values():
            engram.conv_weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    spec = config.engram
    hasher = NgramHasher(spec, config.vocab_size, 0)
    tables = {
        layer: RowTable(
            TableSpec(
                name=f"engram.{layer}",
                rows=of.rows,
                row_format="float32",
                width=spec.row_width,
                seed=0,
                layer=layer,
                init_std=1.0,
                optimizer=None,
            )
        )
        for layer, of in hasher.layers.items()
    }
    return model, Memory(Identity(config.vocab_size), hasher, InProcessTables(tables))


@pytest.mark.parametrize("cuts", [[1] * 24, [7, 1, 16], [12, 12]])
@pytest.mark.parametrize("dead", [False, True])
def test_any_cutting_gives_the_same_logits(cuts, dead):
    model, memory = make()
    ids = np.random.default_rng(0).integers(0, 40, (2, 24))
    if dead:
        ids[0, 5], ids[1, 23] = -1, -7
    whole = Decoder(model, memory, 2).step(ids)
    decoder, pieces, at = Decoder(model, memory, 2), [], 0
    for cut in cuts:
        pieces.append(decoder.step(ids[:, at : at + cut]))
        at += cut
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5)


def test_training_forward_equals_decoding():
    model, memory = make()
    ids = np.random.default_rng(0).integers(0, 40, (2, 24))
    pending, _ = memory.prefetch(ids)
    assert torch.allclose(model(torch.from_numpy(ids), pending), Decoder(model, memory, 2).step(ids), atol=1e-5)


def test_backbone_weights_do_not_depend_on_engram():
    on, off = Transformer(small_config()), Transformer(small_config(engram=None))
    mine = on.state_dict()
    assert len(mine) > len(off.state_dict())
    for name, value in off.state_dict().items():
        assert torch.equal(value, mine[name]), name


def test_logits_depend_on_rows_only_from_their_position_on():
    model, memory = make()
    ids = np.random.default_rng(0).integers(0, 40, (1, 20))
    other = ids.copy()
    other[0, 10] = (ids[0, 10] + 1) % 40
    a, b = (Decoder(model, memory).step(these) for these in (ids, other))
    assert torch.allclose(a[:, :10], b[:, :10], atol=1e-6)
    assert not torch.allclose(a[:, 10:], b[:, 10:], atol=1e-3)


def test_moe_equals_the_loop_over_tokens():
    config = small_config()
    torch.manual_seed(0)
    moe = MoE(config)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    moe.bias.copy_(torch.tensor([0.3, -0.3, 0.0, 0.1]))
    x = torch.randn(2, 9, 32)
    expected = torch.zeros(18, 32)

    def swiglu(hidden):
        gate, value = hidden.chunk(2, -1)
        return F.silu(gate) * value

    for n, token in enumerate(x.flatten(0, 1)):
        scores = torch.sigmoid(moe.router(token))
        chosen = (scores + moe.bias).topk(2).indices
        for expert in chosen:
            weight = scores[expert] / scores[chosen].sum()
            expected[n] += weight * (swiglu(token @ moe.up[expert]) @ moe.down[expert])
        expected[n] += moe.shared_down(swiglu(moe.shared_up(token)))
    assert torch.allclose(moe(x).flatten(0, 1), expected, atol=1e-5)
    assert moe.load.sum() == 18 * 2


def test_balance_bias_evens_a_skewed_router():
    torch.manual_seed(0)
    moe = MoE(small_config()).train()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
    x = torch.randn(1, 400, 32) + 1
    with torch.no_grad():
        moe.router.weight[0] += 0.02
        moe(x)
        before = float(moe.load.max() / moe.load.mean())
        for _ in range(400):
            moe(x)
            moe.balance(moe.load)
    assert float(moe.load.max() / moe.load.mean()) < 1 + (before - 1) / 3


def test_attention_equals_the_plain_formula():
    config = small_config()
    torch.manual_seed(0)
    attention, x = Attention(config), torch.randn(1, 6, 32)
    out = attention(x, rotary_table(config)[:, :6])
    q, k, v = attention.qkv(x).view(1, 6, 8, 8).transpose(1, 2).split([4, 2, 2], 1)
    angles = torch.arange(6.0)[:, None] * 10_000.0 ** (-torch.arange(0, 8, 2) / 8)

    def turn(heads):
        pairs = torch.complex(heads[..., :4], heads[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], -1)

    q, k, v = turn(q), turn(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    expected = attention.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(1, 6, 32))
    assert torch.allclose(out, expected, atol=1e-5)


def test_greedy_generation_equals_reading_the_result():
    model, memory = make()
    prompt = [3, 1, 4, 1, 5]
    out = list(generate(model, memory, prompt, max_new_tokens=12))
    logits = Decoder(model, memory).step(np.array([prompt + out]))
    assert out == logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
    chunked = list(generate(model, memory, prompt, max_new_tokens=12, prefill_chunk=2))
    assert chunked == out


def test_sampling_is_repeatable_and_stops_at_the_context():
    model, memory = make()
    runs = [list(generate(model, memory, [1] * 60, max_new_tokens=50, temperature=1.0, seed=s)) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert len(runs[0]) == 4


def test_prompt_empty_or_too_long_is_named():
    model, memory = make()
    with pytest.raises(ValueError, match="prompt is empty"):
        list(generate(model, memory, [], max_new_tokens=1))
    with pytest.raises(ValueError, match="65 tokens, the model's context is 64"):
        list(generate(model, memory, [1] * 65, max_new_tokens=1))


def test_rows_are_asked_for_only_at_their_layer():
    model, memory = make()
    asked = []

    class Watched:
        def __init__(self, pending):
            self.pending = pending

        def rows(self, layer):
            asked.append((layer, list(ran)))
            return self.pending.rows(layer)

    ran = []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    ids = np.array([[1, 2, 3]])
    model(torch.from_numpy(ids), Watched(memory.prefetch(ids)[0]))
    assert asked == [(1, [0]), (2, [0, 1])]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"heads": 5}, "heads must divide"),
        ({"top_k": 9}, "top_k"),
        ({"layers": 2}, "engram layers"),
        ({"context": 0}, "context"),
    ],
)
def test_config_errors_name_the_field(change, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(small_config(), **change)


def test_configs_survive_json_and_unknown_keys_are_refused():
    config = small_config()
    assert type(config).from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="wings"):
        type(config).from_json({**config.to_json(), "wings": 2})
