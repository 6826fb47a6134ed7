"""Error feedback against brute force over all codes, and the compiled kernel against the reference."""

import importlib
import itertools

import pytest
import torch

from headq_ao.codecs.base import GAUSSIAN_STEP
from headq_ao.ops import feedback_codes
from headq_ao.ops.error_feedback import cpu_kernel, reference
from headq_ao.ops.error_feedback.op import PASSES, SPREADS

op = importlib.import_module("headq_ao.ops.error_feedback.op")
BITS = [1, 2, 3, 4, 5, 6, 8]


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


def decoded(codes, scale, step, bits):
    return scale.double()[..., None] * step.double().unsqueeze(-2) * (codes.double() - (2**bits - 1) / 2)


def seen_error(y, y_hat, metric):
    e = y.double() - y_hat
    return ((e @ metric.double()) * e).sum(-1)


def by_the_docstring(y, metric, step, bits, unbiased):
    """One row ``[M]`` in Python numbers: elimination, two descents, five scales, the best kept."""
    m, top = len(y), 2**bits - 1
    factor = reference.unit_factor(metric[None, None])[0, 0].tolist()
    y, metric, step = y.tolist(), metric.tolist(), step.tolist()
    half = lambda x: float(torch.tensor(min(max(x, 2.0**-24), 65504.0), dtype=torch.float64).half())  # noqa: E731
    form = lambda a, b: sum(a[i] * metric[i][j] * b[j] for i in range(m) for j in range(m))  # noqa: E731
    nearest = lambda x, width: min(max(round(x / width + top / 2), 0), top)  # noqa: E731
    rms, best = (sum(x * x for x in y) / m) ** 0.5, None
    for spread in (0.7, 0.85, 1.0, 1.15, 1.3):
        scale = half(rms * spread)
        width, codes, e = [scale * s for s in step], [0] * m, [0.0] * m
        for i in range(m):
            codes[i] = nearest(y[i] + sum(factor[j][i] * e[j] for j in range(i)), width[i])
            e[i] = y[i] - width[i] * (codes[i] - top / 2)
        for _ in range(2):
            for i in range(m):
                others = sum(metric[i][j] * e[j] for j in range(m) if j != i)
                codes[i] = nearest(y[i] + others / metric[i][i], width[i])
                e[i] = y[i] - width[i] * (codes[i] - top / 2)
        y_hat = [a - b for a, b in zip(y, e, strict=True)]
        if unbiased:
            kept = half(scale * form(y, y) / form(y, y_hat))
            y_hat, scale = [x * kept / scale for x in y_hat], kept
        e = [a - b for a, b in zip(y, y_hat, strict=True)]
        if best is None or form(e, e) < best[0]:
            best = form(e, e), codes, scale
    return best[1:]


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_against_a_loop(case, bits, unbiased):
    y, metric, step = case(2, 2, 6, 12, bits, dtype=torch.float64)
    codes, scale = feedback_codes(y, metric, step, bits, unbiased=unbiased)
    assert codes.dtype == torch.uint8 and scale.dtype == torch.float16
    for b, h, t in itertools.product(range(2), range(2), range(6)):
        want, sigma = by_the_docstring(y[b, h, t], metric[0, h], step[0, h], bits, unbiased)
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
    assert error.mean() < 1.1 * least.mean()
    assert (error <= least + 1e-9).double().mean() > 0.6
    assert plain.mean() > (1.02 if strength < 1 else 1.3) * error.mean()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("unbiased", [False, True])
def test_an_identity_metric_gives_the_nearest_codes(case, bits, unbiased):
    """Whose scale is the best of the five, and nothing else."""
    y, _, step = case(1, 2, 32, 24, bits, dtype=torch.float64)
    metric = 7 * torch.eye(24, dtype=torch.float64)[None, None]
    codes, scale = feedback_codes(y, metric, step, bits, unbiased=unbiased)
    rms, top = y.square().mean(-1, keepdim=True).sqrt(), 2**bits - 1
    found = []
    for spread in SPREADS:
        sigma = (rms * spread).half().double()
        nearest = (y / (sigma * step.unsqueeze(-2)) + top / 2).round().clamp(0, top)
        if unbiased:
            y_hat = decoded(nearest, sigma[..., 0], step, bits)
            sigma = (sigma * (y * y).sum(-1, keepdim=True) / (y * y_hat).sum(-1, keepdim=True)).half().double()
        found.append((seen_error(y, decoded(nearest, sigma[..., 0], step, bits), metric), nearest, sigma[..., 0]))
    best = torch.stack([error for error, _, _ in found]).argmin(0)
    for i in range(len(SPREADS)):
        assert torch.equal(codes[best == i], found[i][1][best == i].to(torch.uint8))
        assert torch.equal(scale[best == i].double(), found[i][2][best == i])
    assert len(best.unique()) > 1 or (bits == 1 and unbiased)  # two levels at their best scale: all five agree


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


SHAPES = [
    # batch, heads, tokens, width, whose metric
    (1, 1, 16, 16, "none"),
    (2, 3, 17, 16, "head"),
    (2, 2, 5, 32, "both"),
    (3, 2, 40, 48, "row"),
    (2, 2, 33, 64, "both"),
    (1, 2, 1, 80, "head"),
    (1, 2, 31, 96, "none"),
    (2, 1, 18, 128, "row"),
    (1, 1, 35, 256, "head"),
]


@pytest.mark.skipif(cpu_kernel.library() is None, reason="no compiler")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("unbiased", [False, True])
def test_the_kernel_equals_the_reference(case, without_kernel, shape, bits, unbiased):
    """Code for code; fp32 sums of another order may decide the tie of one row."""
    *size, own = shape
    y, metric, step = case(*size, bits, own)
    codes, scale = feedback_codes(y, metric, step, bits, unbiased=unbiased)
    want, sigma = without_kernel(feedback_codes, y, metric, step, bits, unbiased=unbiased)
    same = (codes == want).all(-1) & (scale == sigma)
    assert int((~same).sum()) <= 1
    ours, theirs = (seen_error(y, decoded(c, s, step, bits), metric)[~same] for c, s in ((codes, scale), (want, sigma)))
    assert bool((ours < 1.5 * theirs + 1e-6).all())


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "reference"])
def test_rows_do_not_depend_on_their_neighbours(case, without_kernel, kernel):
    """Any cut of the tokens, any part of the batch or the heads: the same codes, bit for bit."""
    call = feedback_codes if kernel else lambda *args: without_kernel(feedback_codes, *args)
    y, metric, step = case(3, 2, 53, 32, own="both", dtype=torch.float32 if kernel else torch.float64)
    whole = call(y, metric, step, 2)
    again = call(y, metric, step, 2)
    for cut in (1, 7, 16, 48):
        parts = [call(part, metric, step, 2) for part in y.split(cut, 2)]
        for i, axis in enumerate((2, 2)):
            assert torch.equal(torch.cat([p[i] for p in parts], axis), whole[i])
    alone = call(y[1:2, 1:], metric[1:2, 1:], step[1:2, 1:], 2)
    for i in (0, 1):
        assert torch.equal(again[i], whole[i])
        assert torch.equal(alone[i], whole[i][1:2, 1:])


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_matter(case, threads):
    y, metric, step = case(2, 3, 70, 32)
    want, before = feedback_codes(y, metric, step, 2), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = feedback_codes(y, metric, step, 2)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("bad", [0.0, 1e-12, 1e6, 3e38, float("inf"), float("-inf"), float("nan")])
def test_extreme_rows_do_not_poison_others(case, without_kernel, kernel, unbiased, bad):
    """A zero, tiny, huge or non-finite row: codes in range, scales that divide, and its neighbours as without it."""
    call = feedback_codes if kernel else lambda *args, **kw: without_kernel(feedback_codes, *args, **kw)
    y, metric, step = case(2, 2, 18, 32)
    want = call(y, metric, step, 2, unbiased=unbiased)
    y = y.clone()
    y[1, 0, 5] = bad * (torch.ones(32) if abs(bad) == float("inf") else y[1, 0, 5].sign())
    y[0, 1, 3, 7] = bad
    codes, scale = call(y, metric, step, 2, unbiased=unbiased)
    assert int(codes.max()) <= 3
    touched = torch.zeros(2, 2, 18, dtype=torch.bool)
    touched[1, 0, 5] = touched[0, 1, 3] = True
    assert torch.equal(codes[~touched], want[0][~touched]) and torch.equal(scale[~touched], want[1][~touched])
    if abs(bad) <= 1e6:
        assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
    if bad == 0:
        assert float(decoded(codes, scale, step, 2)[1, 0, 5].abs().max()) < 1e-5


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


def test_unit_factor(case):
    _, metric, _ = case(2, 3, 1, 24, own="both", dtype=torch.float64)
    n = reference.unit_factor(metric)
    torch.testing.assert_close(n.triu(), n)
    torch.testing.assert_close(n.diagonal(dim1=-2, dim2=-1), torch.ones(2, 3, 24, dtype=torch.float64))
    inverse = torch.linalg.inv(n)
    d = inverse @ metric @ inverse.mT
    off = d - torch.diag_embed(d.diagonal(dim1=-2, dim2=-1))
    assert float(off.abs().max()) < 1e-5 * float(metric.abs().max())


def test_more_tries_are_no_worse(case):
    """What each part brings: elimination over nearest codes, descent over elimination, five scales over one."""
    y, metric, step = case(1, 2, 200, 32, dtype=torch.float64)

    def error(metric_used, spreads, passes):
        feedback = reference.unit_factor(metric_used)
        codes, scale = reference.feedback_codes(y, metric_used, feedback, step, 2, spreads, passes, False)
        return float(seen_error(y, decoded(codes, scale, step, 2), metric).mean())

    nearest = error(torch.eye(32, dtype=torch.float64)[None, None], (1.0,), 0)
    eliminated, descended = (error(metric, (1.0,), passes) for passes in (0, PASSES))
    assert error(metric, SPREADS, PASSES) < descended < eliminated < 0.7 * nearest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_rows_are_coded_in_fp32(case, dtype):
    y, metric, step = case(1, 2, 20, 32)
    narrow, wide = (feedback_codes(x, metric, step, 2) for x in (y.to(dtype), y.to(dtype).float()))
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_float64_rows_are_coded_in_float64(case, without_kernel):
    """By the reference, with or without a compiler."""
    y, metric, step = case(1, 2, 20, 32, dtype=torch.float64)
    got, want = feedback_codes(y, metric, step, 2), without_kernel(feedback_codes, y, metric, step, 2)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 17, 16, "head"), (1, 2, 16, 32, "none")], ids=str)
def test_opcheck(case, shape, dtype):
    *size, own = shape
    y, metric, step = case(*size, own=own)
    args = (metric, reference.unit_factor(metric), step, 2, True)
    torch.library.opcheck(torch.ops.headq.feedback_codes.default, (y.to(dtype), *args))
    view = y.transpose(1, 2).contiguous().transpose(1, 2)
    dense, strided = feedback_codes(y, metric, step, 2), feedback_codes(view, metric.mT, step, 2)
    assert all(torch.equal(a, b) for a, b in zip(dense, strided, strict=True))


def test_meta(case):
    codes, scale = feedback_codes(*(x.to("meta") for x in case(2, 3, 17, 16)), 2)
    assert (codes.shape, codes.dtype, codes.device.type) == ((2, 3, 17, 16), torch.uint8, "meta")
    assert (scale.shape, scale.dtype, scale.device.type) == ((2, 3, 17), torch.float16, "meta")


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_rows(case, tokens):
    codes, scale = feedback_codes(*case(2, 3, tokens, 16), 2)
    assert codes.shape == (2, 3, tokens, 16) and scale.shape == (2, 3, tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 7}, r"bits must be one of \[1, 2, 3, 4, 5, 6, 8\], got 7"),
        ({"bits": 0}, "got 0"),
        (
            {"hessian": (1, 2, 16, 8)},
            r"hessian must be \[B or 1, H or 1, 16, 16\] for tokens of 16, got \(1, 2, 16, 8\)",
        ),
        ({"hessian": (2, 16, 16)}, r"hessian must be .*, got \(2, 16, 16\)"),
        ({"step": (1, 2, 8)}, r"step must be \[B or 1, H or 1, 16\] for tokens of 16, got \(1, 2, 8\)"),
        ({"step": (16,)}, r"step must be .*, got \(16,\)"),
    ],
    ids=str,
)
def test_errors(case, changes, message):
    y, metric, step = case(1, 2, 16, 16)
    args = {"hessian": metric, "step": step, "bits": 2}
    args |= {name: torch.ones(x) if isinstance(x, tuple) else x for name, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        feedback_codes(y, **args)
