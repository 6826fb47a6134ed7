"""The trellis against all its rows, theory and its own reference."""

import itertools

import pytest
import torch

from headq_ao.evals.baselines import trellis_kernel
from headq_ao.evals.baselines.trellis_code import (
    Metric,
    decode,
    encode,
    states,
    trained_levels,
    viterbi,
    viterbi_reference,
)


def rows(n, d=64, seed=0):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return x / x.square().mean(-1, keepdim=True).sqrt()


def skewed(d, seed=0):
    a = torch.randn(d, d, generator=torch.Generator().manual_seed(seed)) / d**0.5
    a[:, :4] *= 5
    return a.T @ a + 0.1 * torch.eye(d)


def quadratic(e, h):
    return ((e @ h) * e).sum(-1)


def test_states_are_windows_of_a_circle():
    symbols = torch.tensor([[1, 2, 3, 0, 2]])
    at = states(symbols, 2, 4)
    assert at.tolist() == [[2 * 4 + 1, 1 * 4 + 2, 2 * 4 + 3, 3 * 4 + 0, 0 * 4 + 2]]


@pytest.mark.parametrize(("bits", "window", "d"), [(1, 3, 9), (2, 4, 5)])
def test_the_best_of_all_rows(bits, window, d):
    """Over all starts, Viterbi's rows are those of an exhaustive search."""
    generator = torch.Generator().manual_seed(1)
    levels, x = torch.randn(2**window, generator=generator), torch.randn(6, d, generator=generator)
    every = torch.tensor(list(itertools.product(range(2**bits), repeat=d)), dtype=torch.uint8)
    error = (x[:, None] - levels[states(every, bits, window)]).square().sum(-1)
    classes = 2 ** (window - bits)
    found = []
    for start in range(classes):
        symbols = viterbi_reference(x, levels, bits, start=torch.full((6,), start))
        assert torch.equal(states(symbols, bits, window)[:, -1] % classes, torch.full((6,), start))
        found.append((x - levels[states(symbols, bits, window)]).square().sum(-1))
    torch.testing.assert_close(torch.stack(found).amin(0), error.amin(1))


@pytest.mark.skipif(trellis_kernel.library() is None, reason="no compiler")
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_kernel_is_the_reference(bits, held, weighted):
    x, levels = rows(40, 32), trained_levels(bits)
    start = torch.randint(len(levels) >> bits, (40,), generator=torch.Generator().manual_seed(2)) if held else None
    metric = Metric.of(skewed(32)) if weighted else None
    symbols = viterbi(x, levels, bits, metric, start)
    assert torch.equal(symbols, viterbi_reference(x, levels, bits, metric, start))


@pytest.mark.parametrize(("bits", "most"), [(1, 1.22), (2, 1.27)])
def test_distortion_of_a_normal_row(bits, most):
    """In units of Shannon's ``4^−b``: Lloyd-Max has 1.45 at one bit and 1.88 at two, entropy-coded scalars 1.42."""
    x = rows(1000, seed=bits)
    ratio = (x - decode(encode(x, bits), bits)).square().mean() * 4**bits
    assert 1.0 < ratio < most


def test_a_metric_is_its_factors():
    h = skewed(16)
    metric = Metric.of(h)
    torch.testing.assert_close(metric.factor @ torch.diag(metric.weight) @ metric.factor.T, h, atol=1e-4, rtol=1e-4)
    assert torch.equal(metric.factor, metric.factor.triu())


def test_error_stays_out_of_what_the_metric_weighs():
    x, h = rows(300, 32), skewed(32)
    plain, fed_back = (x - decode(encode(x, 2, metric), 2) for metric in (None, h))
    assert quadratic(fed_back, h).mean() < 0.5 * quadratic(plain, h).mean()
    assert fed_back.square().mean() > plain.square().mean()  # it has gone elsewhere
