"""References are plain PyTorch: they run where every kernel is broken, and the operators agree with them."""

import importlib
from pathlib import Path

import pytest
import torch

from headq_ao.codec import GAUSSIAN_STEP
from headq_ao.ops import MappedQuery, Rows, decode_attention, encode_keys, encode_values, feedback_codes, unit_factor
from headq_ao.ops.decode_attention import reference as of_attention
from headq_ao.ops.encode_keys import reference as of_keys
from headq_ao.ops.encode_values import reference as of_values
from headq_ao.ops.feedback import reference as of_feedback
from headq_ao.ops.layout import unpack_keys, unpack_values

B, H, T, D = 2, 2, 32, 32
BITS = 2
BASES = ["affine", "nearest", "feedback"]


@pytest.fixture
def broken_kernels(monkeypatch):
    """Every way to a kernel raises."""

    def fail(*args, **kwargs):
        raise AssertionError("a reference came to a kernel")

    for operator in ("decode_attention", "feedback"):
        op, kernel = (importlib.import_module(f"headq_ao.ops.{operator}.{name}") for name in ("op", "cpu_kernel"))
        monkeypatch.setattr(kernel, "library", fail)
        monkeypatch.setattr(op, "KERNELS", dict.fromkeys(op.KERNELS, fail))
    monkeypatch.setattr(importlib.import_module("headq_ao.ops.cpu_build"), "load", fail)
    for operator in ("encode_keys", "encode_values", "feedback"):
        op = importlib.import_module(f"headq_ao.ops.{operator}.op")
        monkeypatch.setattr(op, "feedback_codes", fail)


def metric_of(randn):
    seen = randn(1, H, D, D // 2, dtype=torch.float32)
    return seen @ seen.mT + 0.2 * torch.eye(D)


def key_arguments(randn, orthogonal, base, rank=8):
    """Keyword arguments of encode_keys."""
    rotation = orthogonal(1, 1, D).float()
    side = orthogonal(1, H, D)[..., :rank].float()
    step = torch.full((1, 1, D), 1.0 if base == "affine" else GAUSSIAN_STEP[BITS])
    return {
        "k": randn(B, H, T, D, dtype=torch.float32), "mean": randn(1, H, D, dtype=torch.float32), "encode": rotation,
        "read": rotation, "step": step, "weight": None if base == "affine" else torch.ones(1, 1, D),
        "metric": metric_of(randn) if base == "feedback" else None, "factor": None, "side_encode": side,
        "side_step": torch.full((1, H, rank), 0.5), "bits": [BITS] * (D + rank), "unbiased": base != "affine",
    }  # fmt: skip


def value_arguments(randn, orthogonal, base):
    """Keyword arguments of encode_values."""
    return {
        "v": randn(B, H, T, D, dtype=torch.float32), "encode": orthogonal(1, H, D).float(),
        "mean": randn(1, H, D, dtype=torch.float32), "metric": metric_of(randn) if base == "feedback" else None,
        "factor": None, "bits": BITS, "group_size": D, "step": 0.0 if base == "affine" else GAUSSIAN_STEP[BITS],
        "unbiased": base != "affine",
    }  # fmt: skip


def test_every_reference_is_run_here():
    folders = {path.parent.name for path in (Path(__file__).parents[2] / "ops").glob("*/reference.py")}
    assert folders == {"decode_attention", "encode_keys", "encode_values", "feedback"}


def split(stored, has_zero):
    """Planes, scale, and zero or None, of what a reference of a write path returns."""
    return (stored[:-2], stored[-2], stored[-1]) if has_zero else (stored[:-1], stored[-1], None)


@pytest.mark.parametrize("base", BASES)
def test_references_run_without_kernels(randn, orthogonal, broken_kernels, base):
    keys, values = key_arguments(randn, orthogonal, base), value_arguments(randn, orthogonal, base)
    y, metric, step = randn(B, H, 5, D), metric_of(randn), torch.ones(1, 1, D)
    codes, scale = of_feedback.plain_codes(y, metric, step, BITS)
    spelled = (unit_factor(metric), step, BITS, of_feedback.SPREADS, of_feedback.PASSES, True)
    again = of_feedback.feedback_codes(y, metric, *spelled)
    assert torch.equal(codes, again[0]) and torch.equal(scale, again[1])
    k_planes, k_scale, k_zero = split(of_keys.encode_keys(**keys), base == "affine")
    v_planes, v_scale, v_zero = split(of_values.encode_values(**values), base == "affine")
    query = randn(B, H, 1, 1, len(keys["bits"]), dtype=torch.float32)
    line, start, stop = query[..., 0], torch.zeros(B, 1, dtype=torch.int64), torch.full((B, 1), T)
    out, lse = of_attention.decode_attention(
        query, line, line, line, None, k_planes, keys["bits"], k_scale, k_zero,
        None, v_planes, BITS, v_scale, v_zero, start, stop, None,
    )  # fmt: skip
    assert out.shape == (B, H, 1, 1, D) and bool(torch.isfinite(out).all()) and bool(torch.isfinite(lse).all())


def test_the_operators_run_what_was_broken(randn, orthogonal, broken_kernels):
    """Else the test above would prove nothing."""
    of_k, of_v = key_arguments(randn, orthogonal, "feedback"), value_arguments(randn, orthogonal, "feedback")
    query = MappedQuery.exact(randn(1, 2, 1, 16, dtype=torch.float32), 0.25)
    rows, seen = Rows(exact=randn(1, 2, 8, 16, dtype=torch.float32)), torch.tensor([[0]])
    y, metric, step = randn(B, H, 5, D, dtype=torch.float32), metric_of(randn), torch.ones(1, 1, D)
    for call in (
        lambda: encode_keys(**of_k),
        lambda: encode_values(**of_v),
        lambda: feedback_codes(y, metric, step, BITS),
        lambda: decode_attention(query, rows, rows, seen, seen + 8),
    ):
        with pytest.raises(AssertionError, match="a reference came to a kernel"):
            call()


@pytest.mark.parametrize("base", BASES)
def test_encode_keys_agrees_with_its_reference(randn, orthogonal, base):
    """Code for code; with error feedback fp32 sums of another order may decide the tie of one row."""
    given = key_arguments(randn, orthogonal, base)
    want_planes, want_scale, want_zero = split(of_keys.encode_keys(**given), base == "affine")
    planes, scale, zero = encode_keys(**given)
    codes, want = (unpack_keys(x, given["bits"]) for x in (planes, want_planes))
    same = (codes == want).all(-1) & (scale == want_scale)
    assert int((~same).sum()) <= (1 if base == "feedback" else 0)
    assert zero is want_zero is None or torch.equal(zero, want_zero)


@pytest.mark.parametrize("base", BASES)
def test_encode_values_agrees_with_its_reference(randn, orthogonal, base):
    given = value_arguments(randn, orthogonal, base)
    want_planes, want_scale, want_zero = split(of_values.encode_values(**given), base == "affine")
    planes, scale, zero = encode_values(**given)
    codes, want = (unpack_values(x, BITS) for x in (planes, want_planes))
    same = ((codes == want) & (scale == want_scale)).all(-1)
    assert int((~same).sum()) <= (1 if base == "feedback" else 0)
    assert zero is want_zero is None or torch.equal(zero, want_zero)
