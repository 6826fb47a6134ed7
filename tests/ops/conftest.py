"""Shared by the op tests: seeded tensors and orthogonal matrices."""

import pytest
import torch


@pytest.fixture
def randn():
    """Normal tensors from one seeded stream; float64 unless said."""
    g = torch.Generator().manual_seed(7)
    return lambda *shape, dtype=torch.float64: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


@pytest.fixture
def orthogonal(randn):
    """``orthogonal(*lead, d)``: random rotations ``[*lead, d, d]``."""
    return lambda *shape: torch.linalg.qr(randn(*shape, shape[-1]))[0]
