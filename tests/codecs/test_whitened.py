"""Whitened codes: where their errors lie, and what each part of them is worth."""

import pytest
import torch

from headq_ao import headq_config
from headq_ao.codecs.linalg import ridged, rotation_matrix
from headq_ao.codecs.whitened import (
    PROMPT_RIDGE,
    prompt_whitened_codec,
    whitened_codec,
    whitening,
)
from tests.codecs.states import anisotropic, build, orthogonal, randn, second_moment, spectrum


@pytest.fixture
def correlated_states():
    """``correlated_states(correlated, bias)``: queries and keys ``[1, 2, 2048, 64]``, both anisotropic,
    ``correlated`` in one basis; ``bias``: of three pairs of key coordinates, rotated as RoPE rotates it."""

    def make(correlated=True, bias=0.0, head_dim=64, n=2048):
        basis, other = orthogonal(1, 2, head_dim, seed=1), orthogonal(1, 2, head_dim, seed=2)
        scale = spectrum(head_dim, 1.5).sqrt()
        k = (randn(1, 2, n, head_dim, seed=3) * scale) @ basis
        q = (randn(1, 2, n, head_dim, seed=4) * scale) @ (basis if correlated else other)
        at = torch.arange(n, dtype=torch.float64)
        for i, speed in ((3, 0.01), (9, 0.1), (20, 0.5)):
            k[..., i] += bias * torch.cos(speed * at)
            k[..., i + head_dim // 2] += bias * torch.sin(speed * at)
        return q, k

    return make


def held_out_error(q, k, prompt=False, **options):
    """E[(q·e)²] on the second half of a codec from the first; a mean error is left out, as softmax does."""
    n = q.shape[2] // 2
    codec = build(headq_config(**options), second_moment(q[:, :, :n]), k[:, :, :n], prompt)
    q, k = q[:, :, n:], k[:, :, n:]
    e = codec.dequantize(*codec.quantize(k, True)).double() - k
    return float((q @ (e - e.mean(-2, keepdim=True)).mT).square().mean())


@pytest.mark.parametrize("correlated", [True, False], ids=["one basis", "two bases"])
@pytest.mark.parametrize("bias", [0.0, 10.0])
@pytest.mark.parametrize("bits", [2, 3])
def test_whitened_codes_show_less_error(correlated_states, correlated, bias, bits):
    """At equal bits a tenth of the affine base's error, and less than with half a bit more for its side code."""
    q, k = correlated_states(correlated, bias)
    plain = held_out_error(q, k, key_codec="affine", rank=0, k_bits=bits)
    side = held_out_error(q, k, key_codec="affine", k_bits=bits)
    visible = held_out_error(q, k, k_bits=bits)
    assert visible < (0.02 if bias else 0.15) * plain
    assert visible < 0.6 * side
    prompt = held_out_error(q, k, prompt=True, k_bits=bits)
    assert visible < prompt < (0.02 if bias else 0.35) * plain


@pytest.mark.parametrize("bias", [0.0, 10.0])
def test_each_part_of_the_whitened_code_helps(correlated_states, bias):
    q, k = correlated_states(bias=bias)
    whole = held_out_error(q, k)
    assert whole < 0.2 * held_out_error(q, k, error_feedback=False), "whitening alone puts errors where they show"
    assert whole < 0.5 * held_out_error(q, k, whitening=0.0)
    assert held_out_error(q, k, rank=16) < 0.7 * whole
    isotropic = torch.eye(64, dtype=torch.float64).expand(1, 2, 64, 64)
    unaware = whitened_codec(headq_config(), isotropic, k.mean(-2), second_moment(k - k.mean(-2, keepdim=True)))
    e = unaware.dequantize(*unaware.quantize(k, True)).double() - k
    assert whole < 0.6 * float((q @ e.mT).square().mean()), "queries matter"


def test_without_whitening_and_feedback_whitened_is_affine(correlated_states):
    """The same rotated nearest codes, up to the rounding of an identity that was computed."""
    q, k = correlated_states()
    q, k = q[:, :, :512], k[:, :, :512]
    plain, visible = (
        build(headq_config(rank=0, **options), second_moment(q), k)
        for options in ({"key_codec": "affine"}, {"whitening": 0.0, "error_feedback": False})
    )
    torch.testing.assert_close(visible.encode, plain.encode.expand_as(visible.encode), rtol=0, atol=1e-12)
    assert float((plain.quantize(k, True)[0] != visible.quantize(k, True)[0]).double().mean()) < 1e-4


@pytest.mark.parametrize("power", [0.0, 0.5, 0.75, 1.0])
def test_whitening(power):
    covariance = second_moment(anisotropic(1, 2, 500, 32, decay=1.5))
    rotation = rotation_matrix(32).double()
    encode, read = whitening(covariance, power, rotation)
    one = torch.eye(32, dtype=torch.float64).expand(1, 2, 32, 32)
    torch.testing.assert_close(encode.mT @ read, one, rtol=0, atol=1e-6)
    torch.testing.assert_close(encode @ read.mT, one, rtol=0, atol=1e-6)
    values, vectors = torch.linalg.eigh(ridged(covariance, 1e-4))
    want = vectors @ torch.diag_embed(values.pow(power / 2)) @ vectors.mT @ rotation
    torch.testing.assert_close(read, want, rtol=0, atol=1e-6)
    if power == 1:  # white, so that each coordinate deserves the same bits
        torch.testing.assert_close(encode.mT @ ridged(covariance, 1e-4) @ encode, one, rtol=0, atol=1e-6)
    assert all(x.dtype == torch.float32 for x in whitening(covariance.float(), power, rotation.float()))


def test_whitening_survives_a_singular_covariance():
    """Keys that are all alike, or that are not finite, make a codec that is finite."""
    for covariance in (torch.zeros(1, 2, 16, 16), torch.full((1, 2, 16, 16), torch.nan)):
        for x in whitening(covariance.nan_to_num(0.0), 1.0, rotation_matrix(16)):
            assert bool(torch.isfinite(x).all())
    k = torch.ones(1, 2, 32, 16)
    for prompt in (False, True):
        codec = build(headq_config(), torch.zeros(1, 2, 16, 16), k, prompt)
        torch.testing.assert_close(codec.dequantize(*codec.quantize(k, True)), k, rtol=0, atol=1e-3)


def test_the_metric_is_what_scores_show(statistics):
    """``eᵀMe`` of the coordinates is ``E[(q·k_err)²]``, with the mean eigenvalue for all directions."""
    q, k, c_q = statistics()
    codec = build(headq_config(), c_q, k)
    ridge = c_q.diagonal(dim1=-2, dim2=-1).mean(-1)
    e = randn(1, 2, 8, 64, seed=12)
    k_err = e @ codec.reader.mT
    shown = (q @ k_err.mT).square().mean(-2) + ridge[..., None] * k_err.square().sum(-1)
    torch.testing.assert_close(((e @ codec.error_hessian()) * e).sum(-1), shown)
    assert codec.error_hessian() is codec.hessian and codec.reader is codec.read


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_the_prompt_codec_is_a_whitened_codec_of_little(statistics, power, monkeypatch):
    """Diagonal covariance and a C_q of 16 directions over a flat rest: where that is all, both are one codec."""
    monkeypatch.setattr("headq_ao.codecs.whitened.CALIBRATED_RIDGE", PROMPT_RIDGE)
    _, k, _ = statistics()
    config, d = headq_config(whitening=power), 64
    basis = orthogonal(1, 2, d, seed=8)
    values = torch.cat([torch.ones(48), torch.linspace(2, 90, 16)]).double()
    c_q = (basis * values[:, None]) @ basis.mT
    variance, mean = (k - k.mean(-2, keepdim=True)).square().mean(-2), k.mean(-2)
    whole = whitened_codec(config, c_q, mean, torch.diag_embed(variance))
    little = prompt_whitened_codec(config, c_q, mean, variance)
    assert (little.spread.shape, little.q_factor.shape) == ((1, 2, d), (1, 2, d, 16))
    ratio = (whole.read / little.reader).nanmean((-2, -1))  # the spread is around 1: another unit
    torch.testing.assert_close(whole.read, little.reader * ratio[..., None, None], rtol=1e-6, atol=1e-9)
    y = (k - mean[:, :, None]) @ (little.encode / little.spread[..., None])
    torch.testing.assert_close(y.square().mean((-2, -1)), torch.ones(1, 2).double(), rtol=1e-6, atol=0)
    plain = prompt_whitened_codec(headq_config(whitening=power, scale_bits=16), c_q, mean, variance)
    torch.testing.assert_close(plain.spread.log().mean(-1), torch.zeros(1, 2).double(), rtol=0, atol=1e-9)
    a, b = (codec.error_hessian() for codec in (whole, little))
    size = (a.diagonal(dim1=-2, dim2=-1).mean(-1) / b.diagonal(dim1=-2, dim2=-1).mean(-1))[..., None, None]
    torch.testing.assert_close(a, size.to(a) * b.to(a), rtol=1e-4, atol=1e-5 * float(a.abs().max()))
    k = k[:, :, :64]
    wide, narrow = (codec.dequantize(*codec.quantize(k, True)).double() for codec in (whole, little))
    assert float((wide - narrow).square().mean() / (wide - k).square().mean()) < 0.05, "but for rounding flips"


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_whitened_values_err_less(values, bits):
    """``‖v − v̂‖²`` at equal bits, on anisotropic values with a mean; in each coordinate that a row has."""

    def error(**options):
        codec, v, coordinates = values(v_bits=bits, **options)
        v_hat = coordinates(v) @ codec.reader.double().mT
        if codec.mean is not None:
            v_hat = v_hat + codec.mean.double().unsqueeze(-2)
        return float((v_hat - v).square().sum(-1).mean())

    visible = error()
    assert visible < 0.5 * error(value_codec="affine")
    assert visible < 0.8 * error(error_feedback=False)
    assert visible < error(whitening=0.0)
