"""Tokens, and what an Encoder takes."""

import pytest
import torch


@pytest.fixture
def case(randn, orthogonal):
    """Tokens, and what an Encoder takes; ``own`` gives each sequence its own mean and side basis."""

    def make(
        symmetric, head_dim=16, batch=1, heads=2, tokens=16, base_bits=2, rank=0, side_bits=2, own=False, feedback=False
    ):
        mine = batch if own else 1
        rotation = orthogonal(1, 1, head_dim)
        args = {
            "k": randn(batch, heads, tokens, head_dim) * (1 + randn(1, heads, 1, head_dim).abs()),
            "mean": randn(mine, heads, head_dim),
            "encode": rotation,
            "read": rotation,
            "step": torch.ones(1, 1, head_dim, dtype=torch.float64),
            "symmetric": symmetric,
            "bits": [base_bits] * head_dim + [side_bits] * rank,
        }
        if symmetric:
            args["step"] = 0.5 + randn(1, 1, head_dim).abs() / 2
        if feedback:
            seen = randn(mine, heads, head_dim, head_dim // 2)
            args["metric"] = seen @ seen.mT + 0.1 * torch.eye(head_dim, dtype=torch.float64)
        if rank:
            args["side_encode"] = orthogonal(mine, heads, head_dim)[..., :rank]
            args["side_step"] = 0.1 + randn(mine, heads, rank).abs() / 2
        return args

    return make
