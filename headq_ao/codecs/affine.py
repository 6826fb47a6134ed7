"""Nearest codes of rotated rows."""

import torch
from torch import Tensor

from headq_ao.codecs.base import (
    GAUSSIAN_STEP,
    KeyCodec,
    ValueCodec,
)
from headq_ao.codecs.linalg import rotation_matrix
from headq_ao.codecs.side_code import with_side_code
from headq_ao.config import HeadQConfig


def base_codec(config: HeadQConfig, mean: Tensor) -> KeyCodec:
    """The codec without a side code: all but ``mean [B or 1, Hkv, D]`` is constant."""
    head_dim = mean.shape[-1]
    bits = config.key_bits(head_dim)[:head_dim]
    rotation = rotation_matrix(head_dim, config.rotation).to(mean.device, mean.dtype)[None, None]
    ones = mean.new_ones(1, 1, head_dim)
    step = ones if config.k_zero_point else ones * GAUSSIAN_STEP[bits[0]]
    symmetric, in_bytes = not config.k_zero_point, config.byte_scales("k")
    return KeyCodec(mean, rotation, rotation, step, symmetric, None, None, None, bits, byte_scales=in_bytes)


def affine_codec(config: HeadQConfig, c_q: Tensor, mean: Tensor, rows: Tensor) -> KeyCodec:
    """A base with equal bits for each rotated coordinate, and a side code of its error.

    Args:
        config: what to build.
        c_q: ``C_q = E[q qᵀ]``, ``[B or 1, Hkv, D, D]``.
        mean: of the keys, ``[B or 1, Hkv, D]``.
        rows: exact keys to fit steps and ``C_e`` on, ``[B or 1, Hkv, n, D]``, ``n`` a multiple of 16.
    """
    base = base_codec(config, mean if config.subtract_key_mean else torch.zeros_like(mean))
    return with_side_code(config, base, c_q, rows)


def rotated_value_codec(config: HeadQConfig, head_dim: int) -> ValueCodec:
    """Nearest codes in a Hadamard-rotated basis."""
    bits, group = config.v_bits, config.v_group_size
    assert bits is not None
    rotation = rotation_matrix(head_dim, config.rotation)[None, None]
    step = 0.0 if config.v_zero_point else GAUSSIAN_STEP[bits]
    return ValueCodec(rotation, rotation, bits, head_dim if group is None else group, step, config.unbiased_scale)
