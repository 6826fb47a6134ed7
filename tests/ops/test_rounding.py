"""Scales as they are stored, and the levels of codes."""

import pytest
import torch

from headq_ao.ops.rounding import (
    LEAST_SHORT,
    MOST_SHORT,
    half,
    half_signed,
    highest_codes,
    scale_by_gain,
    scale_of,
    scale_of_byte,
    scale_to_byte,
    stored_scale,
    unbiased_scale,
)

LEAST, MOST = 2.0**-24, 65504.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_are_never_zero_nor_infinite(dtype):
    x = torch.tensor([0.0, 1e-30, LEAST, 0.1, 1.0, 65519.0, 1e30, float("inf")], dtype=dtype)
    found = half(x)
    assert found.dtype == dtype
    assert found.tolist() == [LEAST, LEAST, LEAST, float(torch.tensor(0.1).half()), 1.0, MOST, MOST, MOST]


def test_a_byte_has_256_scales_in_equal_parts_of_octaves():
    scales = scale_of_byte(torch.arange(256, dtype=torch.uint8))
    octaves, parts = torch.arange(256) // 32, torch.arange(256) % 32
    assert scales.dtype == torch.float16
    assert torch.equal(scales.double(), 2.0 ** (octaves - 4.0) * (1 + parts / 32))
    assert (float(scales[0]), float(scales[-1])) == (LEAST_SHORT, MOST_SHORT)
    assert torch.equal(scale_to_byte(scales), torch.arange(256, dtype=torch.uint8))
    assert scale_of(scales) is scales and torch.equal(scale_of(torch.arange(256, dtype=torch.uint8)), scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_scale_of_a_byte_is_stored(dtype):
    """Of all fp16 numbers: none is nearer, a tie goes up, and what is out of range to the nearest end."""
    x = torch.arange(0x7C01, dtype=torch.int16).view(torch.float16).to(dtype)  # with zero and infinity
    found, scales = stored_scale(x, 8), scale_of_byte(torch.arange(256, dtype=torch.uint8)).to(dtype)
    bounded = x.clamp(LEAST_SHORT, MOST_SHORT)
    assert found.dtype == dtype and torch.isin(found, scales).all()
    upper = torch.searchsorted(scales, bounded).clamp(max=255)
    lower = (upper - 1).clamp(min=0)
    nearer = torch.where(bounded - scales[lower] < scales[upper] - bounded, scales[lower], scales[upper])
    assert torch.equal(found, nearer)
    assert torch.equal(stored_scale(found, 8), found) and torch.equal(stored_scale(x, 16), half(x))
    assert torch.equal(scale_of_byte(scale_to_byte(found)).to(dtype), found)


def test_signed_numbers_may_be_zero():
    x = torch.tensor([0.0, -1e-30, -0.1, -1e30, 1e30])
    assert half_signed(x).tolist() == [0.0, 0.0, -float(torch.tensor(0.1).half()), -MOST, MOST]


def test_a_scale_grows_by_its_gain_or_stays():
    """Where the gain is not positive, or is none, the scale is kept."""
    scale = torch.tensor([2.0, 2.0, 2.0, 2.0])
    wanted, got = torch.tensor([3.0, -3.0, 0.0, float("nan")]), torch.tensor([2.0, 2.0, 2.0, 2.0])
    assert scale_by_gain(scale, wanted, got).tolist() == [3.0, 2.0, 2.0, 2.0]


def test_an_unbiased_scale_gives_the_norm_back():
    y = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y_hat = y.round() * 0.7
    scale = unbiased_scale(torch.full((5, 1), 0.7, dtype=torch.float64), y, y_hat)
    got = (y * (y_hat / 0.7 * scale)).sum(-1) / y.square().sum(-1)
    torch.testing.assert_close(got, torch.ones(5, dtype=torch.float64), rtol=2**-11, atol=0)


def test_highest_codes():
    found = highest_codes((2, 2, 8, 1, 1, 3), torch.empty(0, dtype=torch.float64))
    assert found.tolist() == [3, 3, 255, 1, 1, 7] and found.dtype == torch.float64
