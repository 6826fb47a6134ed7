"""Nearest codes of rotated rows: the levels of each form, and what of the statistics counts."""

import pytest
import torch

from headq_ao import headq_config
from headq_ao.codecs.affine import affine_codec, base_codec, rotated_value_codec
from headq_ao.codecs.base import GAUSSIAN_STEP
from headq_ao.codecs.linalg import rotation_matrix
from tests.codecs.states import AFFINE, randn


@pytest.mark.parametrize("bits", [2, 3])
def test_levels_of_keys(bits):
    """Without a zero as far apart as a Gaussian's are, with one a scale apart."""
    mean = randn(2, 3, 32)
    for zero, step in ((False, GAUSSIAN_STEP[bits]), (True, 1.0)):
        codec = base_codec(headq_config(**AFFINE, k_bits=bits, k_zero_point=zero), mean)
        assert codec.symmetric is not zero and codec.has_zero is zero and codec.bits == (bits,) * 32
        assert torch.equal(codec.step, torch.full((1, 1, 32), step, dtype=torch.float64)) and codec.mean is mean
        assert torch.equal(codec.encode[0, 0], rotation_matrix(32).double()) and codec.read is codec.encode


def test_codes_of_a_row_by_hand():
    """Two bits without a rotation: the nearest of four levels around the mean."""
    config = headq_config(**AFFINE, rank=0, rotation=False, unbiased_scale=False)
    codec = base_codec(config, torch.full((1, 1, 16), 5.0, dtype=torch.float64))
    row = torch.tensor([-1.5, -0.6, 0.4, 1.7] * 4, dtype=torch.float64)
    codes, scale, zero = codec.quantize(5.0 + row.expand(1, 1, 16, 16), config.unbiased_scale)
    assert codes[0, 0, 0].tolist() == [0, 1, 2, 3] * 4 and zero is None
    assert float(scale[0, 0, 0]) == pytest.approx(float(row.square().mean().sqrt()), rel=1e-3)


@pytest.mark.parametrize("centred", [True, False])
def test_a_mean_that_is_not_to_be_subtracted_is_zero(centred):
    rows = randn(1, 2, 64, 32) + 3
    c_q = torch.eye(32, dtype=torch.float64).expand(1, 2, 32, 32)
    codec = affine_codec(headq_config(**AFFINE, subtract_key_mean=centred), c_q, rows.mean(-2), rows)
    assert torch.equal(codec.mean, rows.mean(-2) if centred else torch.zeros(1, 2, 32, dtype=torch.float64))
    assert codec.side_encode.shape == (1, 2, 32, headq_config(**AFFINE).side_rank(32))


@pytest.mark.parametrize(("group", "size"), [(None, 32), (16, 16)])
def test_groups_of_values(group, size):
    """A scale of each group, or one of the row; a step only where rows have no zero."""
    codec = rotated_value_codec(headq_config(value_codec="affine", v_bits=3, v_group_size=group), 32)
    assert (codec.group_size, codec.step, codec.bits) == (size, GAUSSIAN_STEP[3], 3)
    assert codec.quantize(randn(1, 2, 32, 32))[1].shape == (1, 2, 32, 32 // size)
    with_zero = rotated_value_codec(headq_config(value_codec="affine", v_zero_point=True, v_group_size=group), 32)
    assert with_zero.step == 0.0 and with_zero.has_zero
