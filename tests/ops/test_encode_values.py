"""Value rows against a loop over tokens and groups in float64, and what a stored row must promise."""

import math

import pytest
import torch

from headq_ao.codec import GAUSSIAN_STEP, rotation_matrix
from headq_ao.ops import encode_values, feedback_codes
from headq_ao.ops.decode_attention.reference import dequantize_values
from headq_ao.ops.layout import unpack_values

TINY, HUGE = 2.0**-24, 65504.0


def fp16(x):
    return float(torch.tensor(x, dtype=torch.float64).half())


def positive_fp16(x):
    return fp16(min(max(x, TINY), HUGE))


def encode_group(y, bits, step, unbiased):
    """One group of one token as the docstring of encode_values says it: codes, scale, zero."""
    top = 2**bits - 1
    if not step:
        scale, zero = positive_fp16((max(y) - min(y)) / top), fp16(min(max(min(y), -HUGE), HUGE))
        return [min(max(round((y_i - zero) / scale), 0), top) for y_i in y], scale, zero
    scale = positive_fp16(step * math.sqrt(sum(y_i**2 for y_i in y) / len(y)))
    codes = [min(max(round(y_i / scale + top / 2), 0), top) for y_i in y]
    if unbiased and any(y):
        dot = sum(y_i * scale * (c - top / 2) for y_i, c in zip(y, codes, strict=True))
        scale = positive_fp16(scale * sum(y_i**2 for y_i in y) / dot)
    return codes, scale, None


def run(v, rotation, bits, **options):
    planes, scale, zero = encode_values(v, rotation, bits, **options)
    return unpack_values(planes, bits), scale, zero


@pytest.mark.parametrize(
    ("head_dim", "group_size", "tokens"), [(16, 16, 32), (64, 64, 32), (80, 16, 32), (96, 32, 64), (128, 64, 32)]
)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("base", ["affine", "symmetric", "symmetric, biased"])
def test_against_a_loop(randn, orthogonal, base, bits, head_dim, group_size, tokens):
    v, rotation = randn(2, 1, tokens, head_dim), orthogonal(head_dim)
    step, unbiased = 0.0 if base == "affine" else GAUSSIAN_STEP[bits], "biased" not in base
    codes, scale, zero = run(v, rotation, bits, group_size=group_size, step=step, unbiased=unbiased)
    assert scale.dtype == torch.float16 and scale.shape == (2, 1, tokens, head_dim // group_size)
    assert (zero is None) == (base != "affine")
    for b in range(2):
        for t in range(tokens):
            y = (v[b, 0, t] @ rotation).tolist()
            for g in range(head_dim // group_size):
                group = slice(g * group_size, (g + 1) * group_size)
                want_codes, want_scale, want_zero = encode_group(y[group], bits, step, unbiased)
                assert codes[b, 0, t, group].tolist() == want_codes
                assert float(scale[b, 0, t, g]) == want_scale
                if zero is not None:
                    assert float(zero[b, 0, t, g]) == want_zero


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (1, 1)], ids=["per head", "per sequence", "shared"])
def test_a_basis_and_a_mean_of_each_head(randn, orthogonal, bits, shape):
    """``y = (v − mean) @ encode``, whoever shares them."""
    v, encode, mean = randn(2, 2, 32, 16), randn(*shape, 16, 16), randn(*shape, 16)
    options = {"group_size": 16, "step": GAUSSIAN_STEP[bits]}
    got = run(v, encode, bits, mean=mean, **options)
    want = run((v - mean.unsqueeze(-2)) @ encode, torch.eye(16), bits, **options)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_feedback_codes_the_encoded_row(randn, bits, unbiased):
    """With a metric: the codes of feedback_codes, and their step as a part of the scale."""
    v, encode, mean = randn(2, 2, 32, 32), randn(1, 2, 32, 32), randn(1, 2, 32)
    metric, step = encode.mT @ encode, GAUSSIAN_STEP[bits]
    y = (v - mean.unsqueeze(-2)) @ encode
    want, sigma = feedback_codes(y, metric, torch.full((1, 1, 32), step), bits, unbiased=unbiased)
    options = {"group_size": 32, "mean": mean, "step": step, "unbiased": unbiased}
    codes, scale, zero = run(v, encode, bits, metric=metric, **options)
    assert torch.equal(codes, want) and zero is None
    assert torch.equal(scale[..., 0], (sigma.double() * step).half())

    def form(x, y):
        return ((x @ metric) * y).sum(-1)

    def y_hat(codes, scale):
        return scale.double() * (codes - (2**bits - 1) / 2)

    kept = form(y, y_hat(codes, scale)) / form(y, y)
    assert unbiased == bool((kept - 1).abs().max() <= 2.0**-9)
    off, nearest = (y - y_hat(*c) for c in ((codes, scale), run(v, encode, bits, **options)[:2]))
    assert form(off, off).sum() < 0.8 * form(nearest, nearest).sum()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_unbiased_scale(randn, orthogonal, bits):
    v, rotation = randn(1, 2, 64, 64), orthogonal(64)
    y = (v @ rotation).unflatten(-1, (-1, 32))

    def gain(unbiased):
        options = {"group_size": 32, "step": GAUSSIAN_STEP[bits], "unbiased": unbiased}
        codes, scale, _ = run(v, rotation, bits, **options)
        y_hat = scale.double()[..., None] * (codes.unflatten(-1, (-1, 32)) - (2**bits - 1) / 2)
        return (y * y_hat).sum(-1) / y.square().sum(-1)

    assert (gain(True) - 1).abs().max() <= 2.0**-11
    assert (gain(False) - 1).abs().max() > 2.0**-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("step", [0.0, GAUSSIAN_STEP[2]])
def test_low_precision_values_are_coded_in_fp32(randn, orthogonal, step, dtype):
    v, rotation = randn(1, 2, 32, 64, dtype=dtype), orthogonal(64).float()
    narrow, wide = (run(x, rotation, 2, group_size=64, step=step) for x in (v, v.float()))
    assert all(torch.equal(a, b) if a is not None else b is None for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-6, 1.0, 6e4])
@pytest.mark.parametrize("step", [0.0, GAUSSIAN_STEP[4]], ids=["affine", "symmetric"])
@pytest.mark.parametrize("shape", ["constant", "random"])
def test_extreme_rows(randn, shape, step, size, dtype):
    v = torch.ones(1, 2, 16, 64) if shape == "constant" else randn(1, 2, 16, 64).clamp(-1, 1)
    v = (v * size).to(dtype)
    planes, scale, zero = encode_values(v, torch.eye(64), 4, group_size=64, step=step)
    assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
    assert zero is None or bool(torch.isfinite(zero).all())
    error = (dequantize_values(planes, 4, scale, zero, torch.float64) - v.double()).norm(dim=-1)
    assert bool((error <= 0.2 * v.double().norm(dim=-1) + 1e-5).all())


def test_a_rotation_may_carry_a_row_past_fp16():
    v = torch.full((1, 1, 16, 64), -6e4)
    planes, scale, zero = encode_values(v, rotation_matrix(64), 2, group_size=64)
    assert bool(torch.isfinite(dequantize_values(planes, 2, scale, zero, torch.float32)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("bits", "group_size", "step"), [(2, 64, 0.0), (3, 16, 0.586), (8, 32, 0.0), (1, 64, 1.6)])
def test_opcheck(randn, bits, group_size, step, dtype):
    v = randn(2, 3, 32, 64, dtype=dtype)
    args = (torch.eye(64), None, None, None, bits, group_size, step, True)
    if group_size == 64 and step:
        args = (torch.eye(64).expand(1, 3, 64, 64), torch.ones(2, 3, 64), torch.eye(64)[None, None], *args[3:])
    torch.library.opcheck(torch.ops.headq.encode_values.default, (v, *args))
    view = v.transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(torch.ops.headq.encode_values.default, (view, *args), test_utils="test_faketensor")


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 2, 32, 64), {"bits": 7}, r"bits must be one of \[1, 2, 3, 4, 5, 6, 8\], got 7"),
        ((1, 2, 24, 64), {}, r"T a multiple of 16 and D of 16, got \(1, 2, 24, 64\); pass whole blocks"),
        ((1, 2, 16, 64), {"bits": 3}, r"T a multiple of 32 and D of 16, got \(1, 2, 16, 64\); pass whole blocks"),
        ((1, 2, 32, 72), {}, r"D of 16, got \(1, 2, 32, 72\)"),
        ((2, 32, 64), {}, r"v must be \[B, Hkv, T, D\] .*got \(2, 32, 64\)"),
        ((1, 2, 32, 64), {"group_size": 48}, r"group_size must divide head_dim 64, got 48"),
        ((1, 2, 32, 64), {"encode": torch.eye(32)}, r"encode must end in \(64, 64\) for values of 64, got \(32, 32\)"),
        (
            (1, 2, 32, 64),
            {"mean": torch.zeros(1, 2, 32)},
            r"mean must end in \(64,\) for values of 64, got \(1, 2, 32\)",
        ),
        ((1, 2, 32, 64), {"metric": torch.zeros(1, 1, 64, 1)}, r"metric must end in \(64, 64\) for values of 64, got"),
        (
            (1, 2, 32, 64),
            {"metric": torch.eye(64)[None, None], "group_size": 64},
            r"error feedback \(metric\) needs a symmetric code \(step > 0\) and one scale per row",
        ),
        ((1, 2, 32, 64), {"metric": torch.eye(64)[None, None], "step": 1.0}, r"\(step > 0\) and one scale per row"),
    ],
)
def test_errors(shape, options, message):
    arguments = {"encode": torch.eye(shape[-1]), "bits": 2, "group_size": 16} | options
    with pytest.raises(ValueError, match=message):
        encode_values(torch.zeros(shape), **arguments)
