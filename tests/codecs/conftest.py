"""Anisotropic states, and codecs fitted to them."""

import pytest
import torch

from headq_ao import headq_config
from headq_ao.codecs.affine import rotated_value_codec
from headq_ao.codecs.whitened import (
    whitened_value_codec,
)
from tests.codecs.states import anisotropic, build, randn, second_moment


@pytest.fixture
def statistics():
    """Queries, keys and C_q, each anisotropic in a basis of its own; ``[1, 2, n, D]``."""

    def make(head_dim=64, n=512):
        q = anisotropic(1, 2, n, head_dim, decay=1.5, seed=3)
        k = anisotropic(1, 2, n, head_dim, decay=1.0, seed=5) + randn(1, 2, 1, head_dim, seed=6)
        return q, k, second_moment(q)

    return make


@pytest.fixture
def packed(statistics):
    """A codec, queries, exact keys and their packed tokens."""

    def make(head_dim, dtype=torch.float64, prompt=False, **options):
        config = headq_config(**options)
        q, k, c_q = statistics(head_dim)
        codec = build(config, c_q.to(dtype), k.to(dtype), prompt)
        k = k[:, :, 256:320]
        return codec, q[:, :, :5].repeat_interleave(3, 1), k, codec.quantize(k.to(dtype), config.unbiased_scale)

    return make


@pytest.fixture
def values():
    """``values(v_bits=…)``: a value codec, 256 values ``[1, 2, 256, 64]`` with a mean, and how they are read back."""

    def make(**options):
        config = headq_config(**options)
        v = anisotropic(1, 2, 1024, 64, decay=1.5, seed=21) + randn(1, 2, 1, 64, seed=22)
        if config.value_codec == "affine":
            codec = rotated_value_codec(config, 64)
        else:
            codec = whitened_value_codec(config, v.mean(-2), second_moment(v))

        def coordinates(rows):
            """``ŷ`` of tokens, float64, by hand."""
            codes, scale, zero = codec.quantize(rows)
            scale = scale.double()
            zero = -scale * ((2**codec.bits - 1) / 2) if zero is None else zero.double()
            wide = codes.double().unflatten(-1, (scale.shape[-1], -1))
            return (wide * scale[..., None] + zero[..., None]).flatten(-2)

        return codec, v[:, :, 768:], coordinates

    return make
