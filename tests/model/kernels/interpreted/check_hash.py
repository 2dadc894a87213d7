import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engrid.addressing.hashing import NgramHasher
from engrid.addressing.spec import PRESETS, EngramSpec
from engrid.model.kernels import cuda, reference

CANONICAL = 99_092


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_equals_reference(data):
    """Ids over the whole vocabulary, whose products reach 2^63; head counts that are no powers of two; shapes that do
    not fill a block, or fill several."""
    orders, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    spec = EngramSpec(
        layers=(data.draw(st.integers(0, 40)),),
        max_ngram=orders + 1,
        heads=heads,
        vocab_size=(data.draw(st.sampled_from([2, 50, 16_000_000])),) * orders,
        row_width=1,
    )
    (of,) = NgramHasher(spec, CANONICAL, 2).layers.values()
    shape = data.draw(st.sampled_from([(0,), (1,), (127,), (129,), (2, 3), (3, 100), (2, 1, 5)]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    grams = torch.randint(0, CANONICAL, (orders + 1, *shape), generator=generator)
    grams[grams % 5 == 0] = CANONICAL - 1
    tensors = [grams, *(torch.from_numpy(each) for each in (of.multipliers, of.primes, of.offsets))]
    assert torch.equal(cuda.row_ids(*tensors), reference.row_ids(*tensors))


def test_strided_grams_of_the_published_shape():
    of = NgramHasher(PRESETS["v41"], CANONICAL, 2).layers[14]
    grams = torch.randint(0, CANONICAL, (40, 4), generator=torch.Generator().manual_seed(0)).T
    tensors = [grams, *(torch.from_numpy(each) for each in (of.multipliers, of.primes, of.offsets))]
    rows = cuda.row_ids(*tensors)
    assert rows.shape == (40, 24)
    assert torch.equal(rows, reference.row_ids(*tensors))
