"""Error feedback against brute force over all codes, and what each part of it brings."""

import importlib
import itertools

import pytest
import torch

from headq_ao.codecs.base import GAUSSIAN_STEP
from headq_ao.ops import feedback_codes
from headq_ao.ops.error_feedback import reference
from headq_ao.ops.error_feedback.op import KEPT, PASSES, SPREADS
from tests.ops.error_feedback.rows import BITS, decoded, seen_error

op = importlib.import_module("headq_ao.ops.error_feedback.op")


def by_the_docstring(y, metric, step, bits, unbiased, scale_bits):
    """One row ``[M]`` in Python numbers: elimination at eight scales, two descents at the best two, the better kept."""
    m, top = len(y), 2**bits - 1
    factor = reference.ldl_factor(metric[None, None])[0, 0].tolist()
    y, metric, step = y.tolist(), metric.tolist(), step.tolist()
    half = lambda x: float(torch.tensor(min(max(x, 2.0**-24), 65504.0), dtype=torch.float64).half())  # noqa: E731
    scales = [2.0 ** (i // 32 - 4) * (1 + i % 32 / 32) for i in range(256)]
    # a tie goes to the larger
    byte = lambda x: min(scales, key=lambda s: (abs(s - half(x)), -s))  # noqa: E731
    stored = half if scale_bits == 16 else byte
    form = lambda a, b: sum(a[i] * metric[i][j] * b[j] for i in range(m) for j in range(m))  # noqa: E731
    nearest = lambda x, width: min(max(round(x / width + top / 2), 0), top)  # noqa: E731
    rms, rounded, best = (sum(x * x for x in y) / m) ** 0.5, [], None
    for spread in (0.7, 0.78, 0.86, 0.94, 1.02, 1.1, 1.18, 1.26):
        scale = stored(rms * spread)
        width, codes, e = [scale * s for s in step], [0] * m, [0.0] * m
        for i in range(m):
            codes[i] = nearest(y[i] + sum(factor[j][i] * e[j] for j in range(i)), width[i])
            e[i] = y[i] - width[i] * (codes[i] - top / 2)
        rounded.append((form(e, e), scale, width, codes, e))
    for _, scale, width, codes, e in sorted(rounded, key=lambda x: x[0])[:2]:
        for _ in range(2):
            for i in range(m):
                others = sum(metric[i][j] * e[j] for j in range(m) if j != i)
                codes[i] = nearest(y[i] + others / metric[i][i], width[i])
                e[i] = y[i] - width[i] * (codes[i] - top / 2)
        y_hat = [a - b for a, b in zip(y, e, strict=True)]
        if unbiased:
            gain = form(y, y) / max(form(y, y_hat), 1e-30)
            kept = stored(scale * gain if gain > 0 and (scale_bits == 16 or scale > scales[0]) else scale)
            y_hat, scale = [x * kept / scale for x in y_hat], kept
        e = [a - b for a, b in zip(y, y_hat, strict=True)]
        if best is None or form(e, e) < best[0]:
            best = form(e, e), codes, scale
    return best[1:]


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_against_a_loop(case, bits, unbiased, scale_bits):
    y, metric, step = case(2, 2, 6, 12, bits, dtype=torch.float64)
    y[0, 0] *= torch.logspace(-3, 2, 6, dtype=torch.float64)[:, None]  # the range of a scale in a byte, and beyond
    codes, scale = feedback_codes(y, metric, step, bits, unbiased=unbiased, scale_bits=scale_bits)
    assert codes.dtype == torch.uint8 and scale.dtype == torch.float16
    for b, h, t in itertools.product(range(2), range(2), range(6)):
        want, sigma = by_the_docstring(y[b, h, t], metric[0, h], step[0, h], bits, unbiased, scale_bits)
        assert codes[b, h, t].tolist() == want
        assert float(scale[b, h, t]) == sigma


@pytest.mark.parametrize(("bits", "width"), [(1, 8), (2, 5), (3, 4)])
@pytest.mark.parametrize("strength", [0.5, 5.0])
def test_near_the_optimum_and_better_than_nearest(randn, bits, width, strength):
    """Over all codes at the chosen scale: never worse than the nearest ones, and near the best of all."""
    y, seen = randn(1, 1, 200, width), randn(1, 1, width, 2)
    metric, step = strength * seen @ seen.mT + torch.eye(width), torch.full((1, 1, width), GAUSSIAN_STEP[bits])
    codes, scale = feedback_codes(y, metric, step, bits, unbiased=False)
    error = seen_error(y, decoded(codes, scale, step, bits), metric)
    every = torch.tensor(list(itertools.product(range(2**bits), repeat=width)))
    y_hat = decoded(every.expand(1, 1, 200, -1, -1), scale[..., None].expand(*scale.shape, len(every)), step, bits)
    least = seen_error(y.unsqueeze(-2), y_hat, metric.unsqueeze(2)).amin(-1)
    width_of = scale.double()[..., None] * step
    nearest = (y / width_of + (2**bits - 1) / 2).round().clamp(0, 2**bits - 1)
    plain = seen_error(y, decoded(nearest, scale, step, bits), metric)
    assert bool((error >= least - 1e-9).all())
    assert bool((error <= plain + 1e-9).all()), "never worse than the nearest codes of the same scale"
    assert error.mean() < 1.15 * least.mean()
    assert (error <= least + 1e-9).double().mean() > 0.6
    assert plain.mean() > (1.02 if strength < 1 else 1.3) * error.mean()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("unbiased", [False, True])
def test_an_identity_metric_gives_the_nearest_codes(case, bits, unbiased):
    """Whose scale is the best of all, and nothing else."""
    y, _, step = case(1, 2, 32, 24, bits, dtype=torch.float64)
    metric = 7 * torch.eye(24, dtype=torch.float64)[None, None]
    codes, scale = feedback_codes(y, metric, step, bits, unbiased=unbiased)
    rms, top = y.square().mean(-1, keepdim=True).sqrt(), 2**bits - 1
    found = []
    for spread in SPREADS:
        sigma = (rms * spread).half().double()
        nearest = (y / (sigma * step.unsqueeze(-2)) + top / 2).round().clamp(0, top)
        y_hat = decoded(nearest, sigma[..., 0], step, bits)
        first = seen_error(y, y_hat, metric)
        if unbiased:
            sigma = (sigma * (y * y).sum(-1, keepdim=True) / (y * y_hat).sum(-1, keepdim=True)).half().double()
        error = seen_error(y, decoded(nearest, sigma[..., 0], step, bits), metric)
        found.append((error, nearest, sigma[..., 0], first))
    errors, firsts = (torch.stack([x[i] for x in found]) for i in (0, 3))
    kept = firsts.sort(dim=0, stable=True).indices[:KEPT]
    best = kept.gather(0, errors.gather(0, kept).argmin(0, keepdim=True))[0]
    for i in range(len(SPREADS)):
        assert torch.equal(codes[best == i], found[i][1][best == i].to(torch.uint8))
        assert torch.equal(scale[best == i].double(), found[i][2][best == i])
    assert len(best.unique()) > 1


def test_the_size_of_a_metric_does_not_matter(case):
    y, metric, step = case(1, 2, 32, 32, dtype=torch.float64)
    small, large = (feedback_codes(y, metric * 2.0**n, step, 2) for n in (-30, 30))
    assert torch.equal(small[0], large[0]) and torch.equal(small[1], large[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", BITS)
def test_unbiased(case, bits, dtype):
    """yᵀMŷ = yᵀMy within the fp16 rounding of the scale; without it, rows shrink."""
    y, metric, step = case(2, 2, 33, 32, bits, dtype=dtype)

    def gain(unbiased):
        codes, scale = feedback_codes(y, metric, step, bits, unbiased=unbiased)
        y_hat, seen = decoded(codes, scale, step, bits), y.double() @ metric.double()
        return (seen * y_hat).sum(-1) / (seen * y.double()).sum(-1)

    assert float((gain(True) - 1).abs().max()) < 2.0**-11 + 1e-6
    if bits <= 4:
        assert float((gain(False) - 1).abs().max()) > 2.0**-10


@pytest.mark.parametrize("size", [2e3, 5e4])
def test_large_rows_keep_their_precision(case, size):
    y, metric, step = case(1, 2, 32, 32, bits=4)
    small, large = (feedback_codes(y * s, metric, step, 4) for s in (1.0, size / 3))
    a, b = (
        seen_error(y * s, decoded(c, sigma, step, 4), metric) / s**2
        for s, (c, sigma) in ((1, small), (size / 3, large))
    )
    torch.testing.assert_close(b.mean(), a.mean(), rtol=0.05, atol=0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_singular_metric(randn, rank):
    """Nothing, or one direction, is seen: no error, and that direction is kept well."""
    y, seen = randn(1, 1, 32, 16, dtype=torch.float32), randn(1, 1, 16, 1, dtype=torch.float32)
    metric = rank * seen @ seen.mT
    codes, scale = feedback_codes(y, metric, torch.ones(1, 1, 16), 3)
    assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all()) and int(codes.max()) <= 7
    if rank:
        y_hat = decoded(codes, scale, torch.ones(1, 1, 16), 3)
        assert float(seen_error(y, y_hat, metric).mean()) < 1e-2 * float(seen_error(y, 0, metric).mean())


def test_a_non_finite_metric_poisons_its_head_alone(case):
    y, metric, step = case(2, 2, 16, 16, own="both")
    want = feedback_codes(y, metric, step, 2)
    metric = metric.clone()
    metric[1, 0, 3, 3] = float("nan")
    codes, scale = feedback_codes(y, metric, step, 2)
    others = torch.tensor([[True, True], [False, True]])
    assert torch.equal(codes[others], want[0][others]) and torch.equal(scale[others], want[1][others])
    assert int(codes.max()) <= 3


def test_ldl_factor(case):
    _, metric, _ = case(2, 3, 1, 24, own="both", dtype=torch.float64)
    packed = reference.ldl_factor(metric)
    torch.testing.assert_close(packed.triu(), packed)
    n, d = packed.triu(1) + torch.eye(24, dtype=torch.float64), packed.diagonal(dim1=-2, dim2=-1)
    assert bool((d > 0).all())
    torch.testing.assert_close((n * d[..., None, :]) @ n.mT, metric, rtol=0, atol=1e-5 * float(metric.abs().max()))


def test_more_work_is_no_worse(case):
    """What each part brings: elimination over nearest codes, descent over elimination, scales, two of them over one."""
    y, metric, step = case(1, 2, 200, 32, dtype=torch.float64)

    def error(metric_used, spreads, kept, passes):
        feedback = reference.ldl_factor(metric_used)
        codes, scale = reference.feedback_codes(y, metric_used, feedback, step, 2, spreads, kept, passes, False)
        return float(seen_error(y, decoded(codes, scale, step, 2), metric).mean())

    nearest = error(torch.eye(32, dtype=torch.float64)[None, None], (1.0,), 1, 0)
    eliminated, descended = (error(metric, (1.0,), 1, passes) for passes in (0, PASSES))
    one, two, every = (error(metric, SPREADS, kept, PASSES) for kept in (1, KEPT, len(SPREADS)))
    assert every < two < one < descended < eliminated < 0.7 * nearest
    assert two < 0.97 * one
