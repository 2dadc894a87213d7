import numpy as np
import numpy.typing as npt
import pytest
import torch

from engrid.tables import RowFormat, decode_rows, encode_rows

Floats = npt.NDArray[np.float32]
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38], np.float32)


def assert_same_bits(ours: Floats, theirs: Floats) -> None:
    """Equal bit for bit, signed zeros included; any NaN equals any NaN."""
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])


def fp8_rows(values: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.concatenate([values, scales], axis=1)


def torch_e4m3(codes: npt.NDArray[np.uint8]) -> Floats:
    result: Floats = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    return result


def test_fp8_decodes_all_pairs_of_value_and_scale_as_torch_does() -> None:
    values = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 8, axis=1)
    torch_scales = torch.from_numpy(scales[:, :1].copy()).view(torch.float8_e8m0fnu).float()
    theirs = torch.from_numpy(values).view(torch.float8_e4m3fn).float() * torch_scales
    assert_same_bits(decode_rows(fp8_rows(values, scales), "fp8_e4m3_ue8m0", 256), theirs.numpy())


def test_each_fp8_scale_belongs_to_its_32_values() -> None:
    values = np.full((300, 256), 0x38, np.uint8)  # 1.0
    scales = np.random.default_rng(0).integers(1, 255, (300, 8)).astype(np.uint8)
    expected = np.repeat(2.0 ** (scales.astype(np.float64) - 127), 32, axis=1).astype(np.float32)
    np.testing.assert_array_equal(decode_rows(fp8_rows(values, scales), "fp8_e4m3_ue8m0", 256), expected)


def test_scale_bytes_0_and_255() -> None:
    one = np.full((1, 256), 0x38, np.uint8)
    scales = (np.full((1, 8), byte, np.uint8) for byte in (0, 255))
    smallest, nan = (decode_rows(fp8_rows(one, scale), "fp8_e4m3_ue8m0", 256) for scale in scales)
    assert (smallest == np.float32(2.0**-127)).all()
    assert np.isnan(nan).all()


def test_bfloat16_decodes_all_values_as_torch_does() -> None:
    raw = np.arange(65536, dtype=np.uint16).reshape(1024, 64)
    theirs = torch.from_numpy(raw).view(torch.bfloat16).float().numpy()
    assert_same_bits(decode_rows(raw.view(np.uint8), "bfloat16", 64), theirs)


def test_bfloat16_rounds_to_nearest_even_as_torch_does() -> None:
    rng = np.random.default_rng(1)
    random = rng.integers(0, 2**32, 60_000, dtype=np.uint32).view(np.float32)
    upper = rng.integers(0, 2**16, 3 * 2000, dtype=np.uint32) << 16
    ties = (upper + np.repeat([0x7FFF, 0x8000, 0x8001], 2000).astype(np.uint32)).view(np.float32)
    values = np.concatenate([random, ties, SPECIAL, SPECIAL[:3]])
    values = values[: len(values) // 4 * 4].reshape(-1, 4)
    theirs = torch.from_numpy(values).bfloat16().float().numpy()
    assert_same_bits(decode_rows(encode_rows(values, "bfloat16"), "bfloat16", 4), theirs)


@pytest.mark.parametrize("exponent", [-140, -126, -20, 0, 30, 115])
def test_fp8_rounds_to_nearest_even_as_torch_does(exponent: int) -> None:
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 0x7E, (200, 256)).astype(np.uint8)
    below, above = torch_e4m3(codes).astype(np.float64), torch_e4m3(codes + np.uint8(1)).astype(np.float64)
    middle = below + (above - below) * rng.choice([0.5, 0.499, 0.501, 0.0, 0.25], (200, 256))
    signed = middle * rng.choice([-1.0, 1.0], (200, 256)) * 2.0**exponent
    signed[:, ::32] = 448.0 * 2.0**exponent  # so that every group's scale is 2^exponent, where bytes can say it
    values = signed.astype(np.float32)
    raw = encode_rows(values, "fp8_e4m3_ue8m0")
    assert (raw[:, 256:] == max(exponent + 127, 0)).all()
    scaled = (values.astype(np.float64) / 2.0 ** max(exponent, -127)).astype(np.float32)
    theirs = torch.from_numpy(scaled).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(raw[:, :256], theirs)


def test_fp8_scale_is_the_smallest_that_does_not_overflow() -> None:
    largest = np.array([448, np.nextafter(np.float32(448), np.float32(1e9)), 447, 224, 1, 3.2e38, 0], np.float32)
    values = np.zeros((len(largest), 256), np.float32)
    values[:, 5] = -largest
    raw = encode_rows(values, "fp8_e4m3_ue8m0")
    np.testing.assert_array_equal(raw[:-1, 256].astype(int) - 127, [0, 1, 0, -1, -8, 120])
    decoded = decode_rows(raw, "fp8_e4m3_ue8m0", 256)
    np.testing.assert_allclose(decoded, values, rtol=1 / 16)


def test_fp8_marks_what_is_not_finite_and_keeps_its_neighbours() -> None:
    values = np.full((1, 256), 3.0, np.float32)
    values[0, :3] = [np.nan, np.inf, -np.inf]
    decoded = decode_rows(encode_rows(values, "fp8_e4m3_ue8m0"), "fp8_e4m3_ue8m0", 256)
    assert np.isnan(decoded[0, :3]).all()
    assert (decoded[0, 3:] == 3.0).all()


def test_fp8_values_survive_a_round_trip() -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 256, (500, 256)).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    raw = fp8_rows(codes, rng.integers(20, 240, (500, 8)).astype(np.uint8))
    decoded = decode_rows(raw, "fp8_e4m3_ue8m0", 256)
    assert_same_bits(decode_rows(encode_rows(decoded, "fp8_e4m3_ue8m0"), "fp8_e4m3_ue8m0", 256), decoded)


@pytest.mark.parametrize(("row_format", "width"), [("float32", 5), ("bfloat16", 5), ("fp8_e4m3_ue8m0", 256)])
def test_rows_are_decoded_into_the_array_given(row_format: RowFormat, width: int) -> None:
    values = np.random.default_rng(4).integers(-8, 9, (300, width)).astype(np.float32)
    raw = encode_rows(values, row_format)
    out = np.empty((300, width), np.float32)
    assert decode_rows(raw, row_format, width, out=out) is out
    np.testing.assert_array_equal(out, values)
    np.testing.assert_array_equal(decode_rows(raw, row_format, width), values)
    assert decode_rows(raw[:0], row_format, width).shape == (0, width)
    assert encode_rows(values[:0], row_format).shape == raw[:0].shape
