import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engrid.model.kernels import cuda, reference
from tests.model.kernels.every_pair import every_pair

# The interpreter computes in numpy, which warns where a GPU is silent: infinity, and NaN out of infinity times zero.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def same_bits(left, right):
    nan = left.isnan()
    bits = TYPES[left.dtype]
    return torch.equal(nan, right.isnan()) and torch.equal(left.view(bits)[~nan], right.view(bits)[~nan])


@pytest.mark.parametrize("dtype", TYPES)
def test_every_value_with_every_scale(dtype):
    raw = every_pair()
    inverse = torch.arange(len(raw))[:, None]
    assert same_bits(cuda.dequantise(raw, inverse, dtype), reference.dequantise(raw, inverse, dtype))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 20),
    tokens=st.integers(0, 6),
    heads=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_scatter(rows, tokens, heads, seed, data):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows, 264), dtype=torch.uint8, generator=generator)
    inverse = torch.randint(-1, max(rows, 0), (tokens, heads), generator=generator)
    if data.draw(st.booleans()):
        inverse = inverse.T.contiguous().T
    dtype = data.draw(st.sampled_from(list(TYPES)))
    out = cuda.dequantise(raw, inverse, dtype)
    assert out.shape == (tokens, heads, 256)
    assert same_bits(out, reference.dequantise(raw, inverse, dtype))
    assert (out[inverse == -1].view(TYPES[dtype]) == 0).all(), "positive zeros"


@pytest.mark.parametrize("dtype", TYPES)
def test_an_index_outside_the_rows_is_nan_never_zeros(dtype):
    raw = torch.zeros(3, 264, dtype=torch.uint8)
    out = cuda.dequantise(raw, torch.tensor([[0, 3, -2, -1, 2**40]]), dtype)[0]
    assert out.isnan().all(1).tolist() == [False, True, True, False, True]
    assert not out.isnan()[[0, 3]].any()


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="float16"):
        cuda.dequantise(torch.zeros(1, 264, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int64), torch.float16)
