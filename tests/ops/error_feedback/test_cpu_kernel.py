"""The compiled kernel of feedback_codes against the reference."""

import pytest
import torch

from headq_ao.ops import feedback_codes
from headq_ao.ops.error_feedback import cpu_kernel
from tests.ops.error_feedback.rows import BITS, decoded, seen_error

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
@pytest.mark.parametrize("scale_bits", [8, 16])
def test_the_kernel_equals_the_reference(case, without_kernel, shape, bits, unbiased, scale_bits):
    """Code for code; fp32 sums of another order may decide the tie of one row."""
    *size, own = shape
    y, metric, step = case(*size, bits, own)
    how = {"unbiased": unbiased, "scale_bits": scale_bits}
    codes, scale = feedback_codes(y, metric, step, bits, **how)
    want, sigma = without_kernel(feedback_codes, y, metric, step, bits, **how)
    same = (codes == want).all(-1) & (scale == sigma)
    assert int((~same).sum()) <= 1
    ours, theirs = (seen_error(y, decoded(c, s, step, bits), metric)[~same] for c, s in ((codes, scale), (want, sigma)))
    assert bool((ours < 1.5 * theirs + 1e-6).all())


@pytest.mark.skipif(cpu_kernel.library() is None, reason="no compiler")
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("width", [16, 40, 64])
def test_the_kernel_equals_the_reference_under_a_singular_metric(case, without_kernel, randn, width, unbiased):
    """What elimination leaves is measured by the factor here and by the metric there."""
    y, _, step = case(1, 4, 100, width)
    seen = randn(1, 4, width, width // 4, dtype=torch.float32)
    metric = seen @ seen.mT
    codes, scale = feedback_codes(y, metric, step, 2, unbiased=unbiased)
    want, sigma = without_kernel(feedback_codes, y, metric, step, 2, unbiased=unbiased)
    assert ((codes == want).all(-1) & (scale == sigma)).double().mean() > 0.97
    ours, theirs = (seen_error(y, decoded(c, s, step, 2), metric).sum() for c, s in ((codes, scale), (want, sigma)))
    assert float(ours) < 1.002 * float(theirs)


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_coordinates_that_are_not_seen(case, without_kernel, kernel, tokens):
    """Their codes are the nearest, and those of others are as good as without them."""
    call = feedback_codes if kernel else lambda *args, **how: without_kernel(feedback_codes, *args, **how)
    y, metric, step = case(2, 2, tokens, 24, 3)
    metric[..., ::3, :] = metric[..., :, ::3] = 0
    codes, scale = call(y, metric, step, 3, unbiased=False)
    e = y.double() - decoded(codes, scale, step, 3)
    nearest = (y.double() / (scale.double()[..., None] * step.double().unsqueeze(-2)) + 3.5).round().clamp(0, 7)
    assert torch.equal(codes[..., ::3].double(), nearest[..., ::3])
    plain = y.double() - decoded(nearest, scale, step, 3)
    assert float(((e @ metric.double()) * e).sum()) < 0.9 * float(((plain @ metric.double()) * plain).sum())


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_metric_in_low_precision_is_read_as_it_is(case, without_kernel, kernel, dtype):
    call = feedback_codes if kernel else lambda *args: without_kernel(feedback_codes, *args)
    y, metric, step = case(1, 2, 40, 32)
    metric = metric.to(dtype)
    got, want = call(y, metric, step, 2), call(y, metric.float(), step, 2)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 40])
def test_tokens_below_the_least_scale_in_a_byte_keep_it(case, without_kernel, kernel, bits, tokens):
    """Their codes point anywhere: a gain would blow them up, to the largest scale."""
    y, metric, step = case(2, 2, tokens, 64, bits, "head")
    small = y / y.square().mean(-1, keepdim=True).sqrt() * torch.logspace(-6, -2, tokens, dtype=y.dtype)[:, None]
    call = feedback_codes if kernel else lambda *args, **how: without_kernel(feedback_codes, *args, **how)
    codes, scale = call(small, metric, step, bits, scale_bits=8)
    assert bool((scale == 1 / 16).all())
    assert float(decoded(codes, scale, step, bits).abs().max()) <= (2**bits - 1) / 2 / 16 * float(step.max())


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
