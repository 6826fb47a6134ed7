"""Rotated copies of queries and keys."""

import torch

from headq_ao.statistics.rope_shift import RopeShift


def test_pairs_turn_by_each_angle():
    """``x_i cos + x_{partner(i)} sin``: complex numbers times ``exp(i p θ)``; the last coordinates may stay."""
    g = torch.Generator().manual_seed(0)
    theta, positions = torch.rand(4, generator=g).double(), torch.tensor([0, 1, 50])
    angle = positions[:, None] * torch.cat([-theta, theta, torch.zeros(2)])
    partner = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3, 8, 9])
    x = torch.randn(2, 3, 10, generator=g, dtype=torch.float64)
    found = RopeShift(angle.cos(), angle.sin(), partner).shifted(x)
    assert len(found) == 3
    for p, y in zip(positions, found, strict=True):
        want = torch.complex(x[..., :4], x[..., 4:8]) * torch.exp(1j * p * theta)
        torch.testing.assert_close(torch.complex(y[..., :4], y[..., 4:8]), want)
        assert torch.equal(y[..., 8:], x[..., 8:])


def test_copies_keep_their_dtype():
    shift = RopeShift(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([1, 0]))
    x = torch.tensor([1.5, -2.0]).bfloat16()
    (found,) = shift.shifted(x)
    assert found.dtype == torch.bfloat16 and torch.equal(found, x)
