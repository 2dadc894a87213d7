import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engrid.model.engram import EngramLayer
from engrid.model.kernels import cuda, reference
from engrid.model.kernels.gate import blocks


def inputs(shape, branches, width, seed=0, *, dead=False):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    h, keys = normal(*shape, branches, width), normal(*shape, branches, width)
    weights = [1 + 0.2 * normal(branches, width) for _ in range(2)]
    return [h, keys, normal(*shape, width), *weights, torch.rand(shape, generator=generator) < 0.4 if dead else None]


def score(h, keys, values, query_weight, key_weight, dead):
    """In float64, straight from the definition."""
    parts = [
        each.double()
        * (each.double().square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()
        * weight
        for each, weight in ((h, query_weight.double()), (keys, key_weight.double()))
    ]
    return (parts[0] * parts[1]).sum(-1) / math.sqrt(h.shape[-1])


def assert_close(ours, theirs, score, values, error):
    """Gates within what a score wrong by `error` explains: the root is steep at 0, so there a wider band."""
    (gates, u), (expected, expected_u) = ours, theirs
    allowed = error + (error / 8 / score.abs().clamp_min(error).sqrt()).float() + (score.abs() < error) * error**0.5
    assert ((gates - expected).abs() <= allowed).all(), float((gates - expected).abs().max())
    assert ((u - expected_u).abs() <= allowed[..., None] * values[..., None, :].abs() + error).all()


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(0,), (1,), (5,), (2, 3), (17,)]),
    branches=st.integers(1, 4),
    width=st.sampled_from([1, 2, 7, 32, 100, 1024, 1500]),
    seed=st.integers(0, 2**32),
    dead=st.booleans(),
    size=st.sampled_from([1e-5, 1.0, 1e5]),
)
def test_equals_reference(shape, branches, width, seed, dead, size):
    """1e-5: where eps decides; widths below, at and beyond a block's columns."""
    given = inputs(shape, branches, width, seed, dead=dead)
    given[0] *= size
    assert_close(cuda.gated(*given), reference.gated(*given), score(*given), given[2], 1e-5)


@pytest.mark.parametrize("size", [1e-2, 1.0])
def test_bfloat16(size):
    """Where eps is taken from the wrong type, 1e-2 shows it."""
    given = [each.bfloat16() for each in inputs((9,), 2, 64)[:5]] + [None]
    given[0] = given[0] * size
    gates, u = cuda.gated(*given)
    assert gates.dtype == u.dtype == torch.bfloat16
    exact = reference.gated(*[each.float() for each in given[:5]], None)
    assert torch.allclose(gates.float(), exact[0], atol=2**-7)
    assert torch.allclose(u.float(), exact[1], atol=2**-6, rtol=2**-6)


def test_scores_at_and_below_the_floor():
    """0 has sign 0 and gate 0.5; what is smaller than the floor counts as the floor with its sign."""
    given = inputs((3,), 1, 32)
    given[0][:] = given[1][:] = 1.0
    given[3][:], given[4][:] = torch.tensor(1e-9), torch.tensor(1.0)
    given[0][1] = 0
    given[0][2] = -1
    gates, _ = cuda.gated(*given)
    root = math.sqrt(reference.SCORE_FLOOR)
    assert gates[1] == 0.5
    assert torch.allclose(gates[[0, 2], 0], torch.sigmoid(torch.tensor([root, -root])), atol=1e-7, rtol=0)
    assert torch.allclose(gates, reference.gated(*given)[0], atol=1e-7, rtol=0)


@pytest.mark.parametrize("poisoned", range(2))
def test_nan_reaches_the_gate(poisoned):
    given = inputs((3,), 2, 32)
    given[poisoned][1, 0, 5] = math.nan
    gates, u = cuda.gated(*given)
    assert gates.isnan().tolist() == [[False, False], [True, False], [False, False]]
    assert u[1, 0].isnan().all()


def test_strided_inputs():
    given = inputs((6, 3), 2, 32, dead=True)
    strided = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in given]
    assert not any(each.is_contiguous() for each in strided)
    for ours, theirs in zip(cuda.gated(*strided), cuda.gated(*given), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("frozen", [(), (0, 3)])
def test_gradients_are_the_reference_s(frozen):
    given = inputs((2, 5), 3, 24, dead=True)
    upstream = [torch.randn(2, 5, 3), torch.randn(2, 5, 3, 24)]

    def gradients(function, used):
        leaves = [each.clone().requires_grad_(at not in frozen) for at, each in enumerate(given[:5])]
        torch.autograd.backward(function(*leaves, given[5])[used:], upstream[used:])
        return [leaf.grad for leaf in leaves]

    for used in (0, 1):  # both outputs, u alone
        for ours, theirs in zip(gradients(cuda.gated, used), gradients(reference.gated, used), strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_nothing_is_kept_in_inference():
    given = inputs((2,), 1, 8)
    given[0].requires_grad_()
    with torch.inference_mode():
        assert not cuda.gated(*given)[1].requires_grad


def test_float64_is_not_narrowed():
    given = [each.double() for each in inputs((4,), 1, 8)[:5]] + [None]
    assert torch.equal(cuda.gated(*given)[1], reference.gated(*given)[1])


def test_layer_with_the_kernel(monkeypatch):
    """The whole layer, trained for a step, as on a GPU and as on a CPU."""
    torch.manual_seed(0)
    layer = EngramLayer(16, 32, 3, branches=2)
    h, rows = torch.randn(2, 5, 2, 16), torch.randn(2, 5, 4, 8)
    dead = torch.rand(2, 5) < 0.3
    results = []
    for module in (reference, cuda):
        monkeypatch.setattr("engrid.model.kernels.on", lambda device, module=module: module)
        layer.zero_grad()
        out, _, gates = layer(h, rows, layer.start(2), dead_BT=dead)
        out.square().sum().backward()
        results.append([out.detach(), gates.detach(), *(each.grad.clone() for each in layer.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("width", [1, 16, 100, 256, 1024, 5120, 8192])
def test_blocks_are_powers_of_two_and_a_tile_at_most(width):
    tokens, columns = blocks(width)
    assert tokens & (tokens - 1) == columns & (columns - 1) == 0
    assert tokens * columns <= 2048
