"""The torch reference, against the numpy decoder that shards and in-process tables use, and what it refuses."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engrid.model.kernels import reference
from engrid.tables import decode_rows
from tests.model.kernels.every_pair import every_pair


def test_every_value_with_every_scale_is_what_the_tables_decode():
    raw = every_pair()
    ours = reference.dequantise(raw, torch.arange(256)[:, None], torch.float32)[:, 0].numpy()
    theirs = decode_rows(raw.numpy(), "fp8_e4m3_ue8m0", 256)
    nan = np.isnan(theirs)
    assert np.array_equal(np.isnan(ours), nan)
    assert np.array_equal(ours.view(np.int32)[~nan], theirs.view(np.int32)[~nan])
    magnitudes = np.abs(ours[~nan & (ours != 0)])
    assert magnitudes.min() == 2.0**-136, "subnormal, not flushed"
    assert magnitudes.max() == np.inf
    assert nan.sum() == 2 * 256 + 256 - 2, "two codes with any scale, scale 255 with any code"


@pytest.mark.parametrize("bad", [-2, 3])
def test_an_index_outside_the_rows_is_refused(bad):
    raw = torch.zeros(3, 264, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"{bad}.* -1 to 2|-1 to {bad}: give -1 to 2"):
        reference.dequantise(raw, torch.tensor([[-1, bad]]), torch.float32)


def test_default_eps_of_a_norm_in_bfloat16_is_float32_s():
    """What kernels/gate.py takes for granted of torch."""
    small = torch.full((1, 64), 1e-3, dtype=torch.bfloat16)
    float32 = F.rms_norm(small, (64,), eps=torch.finfo(torch.float32).eps)
    assert torch.equal(F.rms_norm(small, (64,)), float32)
    assert not torch.equal(F.rms_norm(small, (64,), eps=torch.finfo(torch.bfloat16).eps), float32)
