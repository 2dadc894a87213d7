"""Rows decoded on a device are those decoded by numpy, bit for bit, and buffers are not reused under a copy."""

import numpy as np
import pytest
import torch

from engrid.tables import decode_rows
from engrid.worker.rows.device import MOST_BUFFERS, CudaRows, HostRows, decode

FORMATS = [("float32", 8, 32), ("bfloat16", 8, 16), ("fp8_e4m3_ue8m0", 256, 264)]


def some_rows(row_bytes, shape=(7, 3)):
    return np.random.default_rng(0).integers(0, 256, (*shape, row_bytes)).astype(np.uint8)


def same(ours, theirs):
    return np.array_equal(ours.view(torch.int32).cpu().numpy(), theirs.view(np.int32))


@pytest.mark.parametrize(("row_format", "width", "row_bytes"), FORMATS)
def test_values_are_those_of_the_format(row_format, width, row_bytes):
    raw = some_rows(row_bytes)
    if row_format == "fp8_e4m3_ue8m0":
        raw[..., 256:] = raw[..., 256:] % 100 + 60  # NaN has many bit patterns
        raw[..., :256][raw[..., :256] & 0x7F == 0x7F] = 0
    expected = decode_rows(raw.reshape(-1, row_bytes), row_format, width).reshape(7, 3, width)
    assert same(decode(torch.from_numpy(raw), row_format), expected)
    buffer = HostRows().buffer(raw.shape)
    buffer[...] = raw
    assert same(HostRows().values(buffer, row_format, width), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("row_format", "width", "row_bytes"), FORMATS)
def test_many_copies_under_way_hold_their_own_rows(row_format, width, row_bytes):
    rows, sent = CudaRows(torch.device("cuda")), []
    for index in range(3 * MOST_BUFFERS):
        raw = some_rows(row_bytes, (64, 1 + index % 4)) // 2
        buffer = rows.buffer(raw.shape)
        buffer[...] = raw
        sent.append((raw, rows.values(buffer, row_format, width)))
    for raw, values in sent:
        expected = decode_rows(raw.reshape(-1, row_bytes), row_format, width).reshape(*raw.shape[:2], width)
        assert same(values, expected)
