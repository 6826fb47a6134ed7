"""References are plain PyTorch: they run where every kernel is broken, and the operators agree with them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headq_ao.codecs.base import GAUSSIAN_STEP
from headq_ao.ops import (
    Encoder,
    cache_update,
    cpu_build,
    dispatch,
    feedback_codes,
    ldl_factor,
    paged_attention,
    quantize,
)
from headq_ao.ops.cache_update import reference as of_update
from headq_ao.ops.cache_update.encoders import coders
from headq_ao.ops.encode import reference as of_encode
from headq_ao.ops.error_feedback import reference as of_feedback
from headq_ao.ops.page_layout import GroupLayout, PageLayout, Side
from headq_ao.ops.paged_attention import reference as of_attention
from headq_ao.ops.types import PagedKV, Readers

B, H, T, D = 2, 2, 32, 32
BITS = 2
BASES = ["affine", "nearest", "feedback"]


@pytest.fixture
def broken_kernels(monkeypatch):
    """Every way to a kernel raises."""

    def fail(*args, **kwargs):
        raise AssertionError("a reference came to a kernel")

    monkeypatch.setattr(dispatch, "_module", fail)
    monkeypatch.setattr(cpu_build, "load", fail)


def metric_of(randn):
    seen = randn(1, H, D, D // 2, dtype=torch.float32)
    return seen @ seen.mT + 0.2 * torch.eye(D)


def encoder_of(randn, orthogonal, base, keys):
    """As the codecs of keys, with a side code, and of values make them."""
    rotation, step = orthogonal(1, H, D).float(), None if base == "affine" else GAUSSIAN_STEP[BITS]
    metric = metric_of(randn) if base == "feedback" else None
    mean = randn(1, H, D, dtype=torch.float32)
    if not keys:
        return Encoder(rotation, (BITS,), step, mean=mean, hessian=metric)
    step = None if step is None else torch.full((1, 1, D), step)
    side = {"side_encode": orthogonal(1, H, D)[..., :8].float(), "side_step": torch.full((1, H, 8), 0.5)}
    return Encoder(rotation, (BITS,) * (D + 8), step, mean=mean, hessian=metric, read=rotation, **side)


def cache_of(randn, keys, values):
    """An empty cache of pages for those encoders, and tokens for it."""
    sides = Side(keys.bits, keys.step is None), Side((BITS,), values.step is None)
    layout, length = PageLayout(T, D, D, (GroupLayout(0, H, *sides),)), torch.zeros(B, dtype=torch.int64)
    window = [torch.zeros(B, H, 8, D) for _ in range(2)]
    table = torch.arange(1, B + 1, dtype=torch.int32)[:, None]
    pages = layout.allocate(B + 1, torch.float32, torch.device("cpu"))
    kv = PagedKV(pages, layout.spec, table, None, length, length, length + T, *window, 0)
    k, v = (randn(B, H, T, D, dtype=torch.float32) for _ in range(2))
    query_map = randn(1, 1, H, D, len(keys.bits) + 3, dtype=torch.float32)
    return kv, k, v, torch.full((B,), T - 4), Readers(query_map, values.encode, values.mean)


def after(kv, packed):
    """The cache behind that call."""
    return replace(kv, packed=packed, held=kv.total)


def test_every_reference_is_run_here():
    folders = {path.parent.name for path in (Path(__file__).parents[2] / "ops").glob("*/reference.py")}
    assert folders == {"cache_update", "encode", "error_feedback", "paged_attention"}


@pytest.mark.parametrize("base", BASES)
def test_references_run_without_kernels(randn, orthogonal, broken_kernels, base):
    keys, values = (encoder_of(randn, orthogonal, base, keys) for keys in (True, False))
    y, metric, step = randn(B, H, 5, D), metric_of(randn), torch.ones(1, 1, D)
    spelled = (ldl_factor(metric), step, BITS, of_feedback.SPREADS, of_feedback.KEPT, of_feedback.PASSES, True)
    codes, scale = of_feedback.feedback_codes(y, metric, *spelled)
    assert codes.shape == y.shape and scale.shape == y.shape[:3]
    kv, k, v, packed, readers = cache_of(randn, keys, values)
    functions = coders(PageLayout.parse(kv.layout), [keys], [values], of_encode.quantize)
    of_update.cache_update(kv, k, v, packed, T - 4, *functions)
    q = randn(B, H, 1, D, dtype=torch.float32)
    out, lse = of_attention.paged_attention(q, 0.1, after(kv, packed), readers)
    assert out.shape == (B, H, 1, D) and bool(torch.isfinite(out).all()) and bool(torch.isfinite(lse).all())


def test_the_operators_run_what_was_broken(randn, orthogonal, broken_kernels):
    """Else the test above would prove nothing."""
    keys, values = (encoder_of(randn, orthogonal, "feedback", keys) for keys in (True, False))
    kv, k, v, packed, readers = cache_of(randn, keys, values)
    y, metric, step = randn(B, H, 5, D, dtype=torch.float32), metric_of(randn), torch.ones(1, 1, D)
    for call in (
        lambda: quantize(k, keys),
        lambda: feedback_codes(y, metric, step, BITS),
        lambda: cache_update(kv, k, v, packed, T - 4, [keys], [values]),
        lambda: paged_attention(k[:, :, :1], 0.1, after(kv, packed), readers),
    ):
        with pytest.raises(AssertionError, match="a reference came to a kernel"):
            call()


@pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])
@pytest.mark.parametrize("base", BASES)
def test_quantize_agrees_with_its_reference(randn, orthogonal, base, keys):
    """Code for code; with error feedback fp32 sums of another order may decide the tie of one token."""
    encoder, x = encoder_of(randn, orthogonal, base, keys), randn(B, H, T, D, dtype=torch.float32)
    (codes, scale, zero), (want, sigma, offset) = quantize(x, encoder), of_encode.quantize(x, encoder)
    same = (codes == want).all(-1) & (scale == sigma).all(-1)
    assert int((~same).sum()) <= (1 if base == "feedback" else 0)
    assert zero is offset is None or torch.equal(zero, offset)
