"""Gradients by packed keys and values, against autograd."""

import pytest
import torch

from headq_ao.statistics.fisher import row_gradients
from headq_ao.statistics.importance import RECENT, attention

T, SINKS = 160, 4


def by_autograd(grad, q, k, v, scaling, n_sink, window, sinks, softcap):
    """Leaves of zeros, added where a key is packed."""
    dk, dv = torch.zeros_like(k, requires_grad=True), torch.zeros_like(v, requires_grad=True)
    groups = q.shape[1] // k.shape[1]
    age = torch.arange(T)[:, None] - torch.arange(T)
    packed = (age >= min(RECENT, T // 4)) & (torch.arange(T) >= n_sink)

    def wide(x):
        return x.repeat_interleave(groups, 1)

    s = scaling * (q @ wide(k).mT + (q @ wide(dk).mT) * packed)
    hidden = (age < 0) if window is None else (age < 0) | (age >= window)
    s = s.masked_fill(hidden, float("-inf"))
    a = attention(s.unflatten(1, (k.shape[1], groups)), sinks, softcap).flatten(1, 2)
    out = a @ wide(v) + (a * packed) @ wide(dv)
    return torch.autograd.grad(out, (dk, dv), grad)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_are_autograds(window, sinks, softcap):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, T, 16), torch.randn(2, 2, T, 16), torch.randn(2, 2, T, 8)
    grad, logits = torch.randn(2, 4, T, 8), torch.randn(4) if sinks else None
    found = row_gradients(grad, q, k, v, 0.5, n_sink=SINKS, window=window, sinks=logits, softcap=softcap)
    wanted = by_autograd(grad.double(), *(x.double() for x in (q, k, v)), 0.5, SINKS, window, logits, softcap)
    for got, want in zip(found, wanted, strict=True):
        assert want.abs().max() > 0.1
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_what_is_never_read_as_codes_has_none():
    """Sinks, and keys that are newer than the window of every query."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, T, 16), torch.randn(1, 2, T, 16), torch.randn(1, 2, T, 16)
    recent = min(RECENT, T // 4)
    for got in row_gradients(torch.randn(1, 2, T, 16), q, k, v, 0.25, n_sink=SINKS, window=None):
        assert not got[:, :, :SINKS].any() and not got[:, :, T - recent :].any()
        assert got[:, :, SINKS : T - recent].abs().amin((0, 1)).amax(-1).min() > 0
