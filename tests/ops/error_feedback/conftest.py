"""Rows, a metric and steps; and the operator without its kernel."""

import pytest
import torch

from headq_ao.codecs.base import GAUSSIAN_STEP
from headq_ao.ops.error_feedback import cpu_kernel


@pytest.fixture
def case(randn):
    """``case(batch, heads, tokens, width, own=…)``: rows, a metric of a few strong directions, steps."""

    def make(batch, heads, tokens, width, bits=2, own="head", dtype=torch.float32):
        shape = {"head": (1, heads), "row": (batch, 1), "both": (batch, heads), "none": (1, 1)}[own]
        seen = randn(*shape, width, max(width // 4, 1))
        metric = seen @ seen.mT + 0.2 * torch.eye(width, dtype=torch.float64)
        step = GAUSSIAN_STEP[bits] * (0.8 + 0.4 * randn(*shape, width).sigmoid())
        return [x.to(dtype) for x in (3 * randn(batch, heads, tokens, width), metric, step)]

    return make


@pytest.fixture
def without_kernel(monkeypatch):
    """``without_kernel(f, …)``: what ``f`` gives where there is no compiler."""

    def call(function, *args, **kwargs):
        with monkeypatch.context() as patched:
            patched.setattr(cpu_kernel, "library", lambda: None)
            return function(*args, **kwargs)

    return call
