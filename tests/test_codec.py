"""Bases, steps and the query map: a score of codes is a score of the dequantized key."""

import dataclasses

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from headq_ao import headq_config
from headq_ao.codec import (
    GAUSSIAN_STEP,
    STEP_GRID,
    affine_codec,
    fit_steps,
    rotation_matrix,
    side_basis,
    square_roots,
    top_eigenvectors,
)
from headq_ao.ops import Rows, decode_attention
from headq_ao.ops.layout import unpack_keys


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(*shape, seed=0):
    return torch.linalg.qr(randn(*shape, shape[-1], seed=seed))[0]


def spectrum(d, decay):
    return torch.arange(1, d + 1, dtype=torch.float64) ** -decay


def anisotropic(*shape, decay=1.0, seed=0):
    """Rows ``[*shape]`` whose variances fall as a power law in a random basis, one basis per head."""
    *lead, _, d = shape
    return (randn(*shape, seed=seed) * spectrum(d, decay).sqrt()) @ orthogonal(*lead, d, seed=seed + 1)


def second_moment(x):
    return x.mT @ x / x.shape[-2]


@pytest.fixture
def statistics():
    """Queries, keys and C_q, each anisotropic in a basis of its own; ``[1, 2, n, D]``."""

    def make(head_dim=64, n=512):
        q = anisotropic(1, 2, n, head_dim, decay=1.5, seed=3)
        k = anisotropic(1, 2, n, head_dim, decay=1.0, seed=5) + randn(1, 2, 1, head_dim, seed=6)
        return q, k, second_moment(q)

    return make


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 192, 240, 256])
def test_rotation_is_orthogonal_and_flat(head_dim):
    r = rotation_matrix(head_dim)
    assert r.dtype == torch.float32
    torch.testing.assert_close(r.double() @ r.double().T, torch.eye(head_dim, dtype=torch.float64), rtol=0, atol=1e-6)
    # Hadamard entries are ±1/√D; the cosine part of an odd factor at most √2 of that
    assert float(r.abs().max()) * head_dim**0.5 <= (1.0 if head_dim & (head_dim - 1) == 0 else 2**0.5) + 1e-5
    assert torch.equal(rotation_matrix(head_dim, hadamard=False), torch.eye(head_dim))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_fit_steps_against_brute_force(bits):
    z = randn(2, 3, 256, 4) * spectrum(4, 1.0)
    z[0, 0, :, 1] = z[0, 0, :, 1] ** 3  # heavy tails want wider steps
    step = fit_steps(z, bits)
    assert step.shape == (2, 3, 4)
    middle = (2**bits - 1) / 2
    levels = torch.arange(2**bits, dtype=torch.float64) - middle
    for i in range(2):
        for j in range(3):
            for r in range(4):
                x = z[i, j, :, r]
                rms = float(x.square().mean().sqrt())
                tried = {}
                for factor in STEP_GRID:
                    width = rms * GAUSSIAN_STEP[bits] * factor
                    nearest = (x[:, None] - width * levels).abs().min(-1).values
                    tried[width] = float(nearest.square().mean())
                best = min(tried, key=tried.get)
                assert float(step[i, j, r]) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(("bits", "step"), GAUSSIAN_STEP.items())
def test_gaussian_steps_are_the_best(bits, step):
    """Max 1960: no uniform quantizer with that many levels has less squared error on a unit normal."""
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)

    def error(width):
        middle = (2**bits - 1) / 2
        x_hat = width * ((x / width + middle).round().clamp(0, 2 * middle) - middle)
        return float((density * (x - x_hat).square()).sum())

    assert error(step) < min(error(step * 0.99), error(step * 1.01))


def test_fit_steps_of_nothing_stays_positive():
    step = fit_steps(torch.zeros(1, 1, 32, 4), 2)
    assert bool((step > 0).all()) and bool(torch.isfinite(step).all())


def test_query_pca_of_a_hand_made_c_q():
    basis = orthogonal(2, 16)
    values = torch.tensor([[9.0, 7, 5, 3] + [1] * 12, [4.0, 8, 2, 6] + [1] * 12], dtype=torch.float64)
    c_q = (basis * values[:, None]) @ basis.mT
    rows, k_err = randn(1, 2, 32, 16), randn(1, 2, 32, 16, seed=1)
    encode, read = side_basis(headq_config(basis="query_pca"), 3, c_q[None], rows, k_err)
    assert encode is read and encode.shape == (1, 2, 16, 3)
    for head, order in enumerate([[0, 1, 2], [1, 3, 0]]):
        for r, column in enumerate(order):
            u, want = encode[0, head, :, r], basis[head, :, column]
            assert abs(float(u @ want)) == pytest.approx(1, abs=1e-9)
            assert float(u[u.abs().argmax()]) > 0, "the sign is fixed by the largest entry"


def test_key_pca_is_of_the_centred_keys():
    axes = orthogonal(16)
    rows = randn(1, 1, 4096, 16) * torch.tensor([3.0, 2.0] + [0.1] * 14, dtype=torch.float64) @ axes.T
    rows = rows + 50 * axes[:, 9]  # a large mean along another axis
    encode, read = side_basis(headq_config(basis="key_pca"), 2, randn(1, 1, 16, 16), rows, rows)
    assert encode is read
    overlap = (axes[:, :2].T @ encode[0, 0]).abs()
    torch.testing.assert_close(overlap, torch.eye(2, dtype=torch.float64), rtol=0, atol=0.05)


def test_random_basis_is_seeded_and_per_head():
    c_q, rows = torch.eye(32, dtype=torch.float64).expand(1, 3, 32, 32), randn(1, 3, 16, 32)

    def basis(seed):
        return side_basis(headq_config(basis="random", seed=seed), 8, c_q, rows, rows)[0]

    u = basis(0)
    torch.testing.assert_close(u.mT @ u, torch.eye(8, dtype=torch.float64).expand(1, 3, 8, 8))
    assert torch.equal(u, basis(0))
    assert not torch.equal(u, basis(1))
    assert not torch.equal(u[0, 0], u[0, 1])


def score_error(q, k_err, encode, read):
    """E[(q·(k_err − P Eᵀ k_err))²] over all pairs; centred, as softmax sees errors."""
    centred = k_err - k_err.mean(-2, keepdim=True)
    left = centred - centred @ encode @ read.mT
    return float((q @ left.mT).square().mean())


def test_score_optimal_basis_is_better_than_the_others(statistics):
    q, k, c_q = statistics()
    k_err = anisotropic(1, 2, 512, 64, decay=1.0, seed=11)
    error = {
        name: score_error(q, k_err, *side_basis(headq_config(basis=name), 8, c_q, k, k_err))
        for name in ("score_optimal", "query_pca", "key_pca", "random")
    }
    assert error["score_optimal"] < 0.9 * error["query_pca"]
    assert error["query_pca"] < 0.9 * error["random"]
    assert error["score_optimal"] < min(error["key_pca"], error["random"])


def test_score_optimal_is_a_minimum(statistics):
    """No nearby pair of rank R does better."""
    q, k, c_q = statistics(head_dim=16)
    k_err = anisotropic(1, 2, 512, 16, seed=11)
    encode, read = side_basis(headq_config(basis="score_optimal"), 4, c_q, k, k_err)
    least = score_error(q, k_err, encode, read)
    for seed in range(20):
        nudge = 0.05 * randn(2, *encode.shape, seed=seed)
        scale_e, scale_p = encode.square().mean().sqrt(), read.square().mean().sqrt()
        assert score_error(q, k_err, encode + nudge[0] * scale_e, read + nudge[1] * scale_p) > least


def test_a_constant_error_does_not_move_the_basis(statistics):
    """Softmax does not see an error that all keys share, so no side code is spent on it."""
    _, k, c_q = statistics(head_dim=32)
    k_err = anisotropic(1, 2, 512, 32, seed=11)
    config = headq_config(basis="score_optimal")
    basis, moved = (side_basis(config, 4, c_q, k, x) for x in (k_err, k_err + 10 * randn(1, 2, 1, 32)))
    for a, b in zip(basis, moved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_score_optimal_pair_is_a_projection(statistics):
    """EᵀP = 1, so that coding an error inside the span of P gives that error back."""
    _, k, c_q = statistics(head_dim=32)
    encode, read = side_basis(headq_config(basis="score_optimal"), 6, c_q, k, randn(1, 2, 512, 32))
    torch.testing.assert_close(
        encode.mT @ read, torch.eye(6, dtype=torch.float64).expand(1, 2, 6, 6), rtol=0, atol=1e-9
    )


def test_isotropic_errors_give_both_bases_one_span(statistics):
    _, k, c_q = statistics(head_dim=16)
    k_err = orthogonal(32, seed=4)[:, :16][None, None].expand(1, 2, 32, 16)
    k_err = torch.cat([k_err, -k_err], -2)  # centred, and C_e a multiple of one
    torch.testing.assert_close(second_moment(k_err), torch.eye(16, dtype=torch.float64).expand(1, 2, 16, 16) / 32)
    u, _ = side_basis(headq_config(basis="query_pca"), 4, c_q, k, k_err)
    encode, read = side_basis(headq_config(basis="score_optimal"), 4, c_q, k, k_err)
    for x in (encode, read):
        p = torch.linalg.qr(x)[0]
        torch.testing.assert_close(p @ p.mT, u @ u.mT, rtol=0, atol=1e-4)


def test_square_roots_survive_a_singular_c_q():
    q = randn(1, 1, 4, 16)
    c_q = second_moment(q)  # rank 4 of 16
    root, inverse = square_roots(c_q)
    torch.testing.assert_close(root @ inverse, torch.eye(16, dtype=torch.float64)[None, None], rtol=0, atol=1e-9)
    torch.testing.assert_close(root @ root, c_q, rtol=0, atol=2e-6 * float(torch.linalg.eigvalsh(c_q).max()))
    for x in square_roots(torch.zeros(1, 1, 16, 16)):
        assert bool(torch.isfinite(x).all())


def test_top_eigenvectors_do_not_flip():
    c = second_moment(randn(1, 1, 64, 16))
    u = top_eigenvectors(c, 16)
    assert torch.equal(u.sign(), top_eigenvectors(c * (1 + 1e-15), 16).sign())
    order = (u.mT @ c @ u).diagonal(dim1=-2, dim2=-1)
    assert bool((order.diff() <= 1e-12).all()), "largest first"


CODECS = {
    "affine": {"k_zero_point": True, "rank": 0},
    "affine + side": {"k_zero_point": True, "rank": 5, "side_bits": 4},
    "symmetric": {"rank": 0},
    "symmetric + side": {},
    "symmetric + optimal side": {"basis": "score_optimal", "rank": 8, "side_bits": 4},
    "no gauge": {"key_gauge": False, "k_bits": 4},
    "no rotation": {"rotation": False, "k_bits": 3, "basis": "random"},
    "biased": {"unbiased_scale": False, "basis": "key_pca", "side_bits": 1},
}


@pytest.fixture
def packed(statistics):
    """A codec, queries, exact keys and their packed rows."""

    def make(head_dim, dtype=torch.float64, **options):
        config = headq_config(**options)
        q, k, c_q = statistics(head_dim)
        codec = affine_codec(config, c_q.to(dtype), k.mean(-2).to(dtype), k[:, :, :256].to(dtype))
        k = k[:, :, 256:320]
        return codec, q[:, :, :5].repeat_interleave(3, 1), k, codec.encode_rows(k.to(dtype), config.unbiased_scale)

    return make


def integer_scores(query, codes, scale, zero):
    """``s_j = σ_j (q̃·c_j + b) + m_j h + q·μ`` by hand, ``[B, Hq, S, T]``."""
    groups = query.codes.shape[1] // codes.shape[1]
    codes, scale = (x.double().repeat_interleave(groups, 1) for x in (codes, scale))
    s = (query.codes @ codes.mT + query.bias[..., None]) * scale[:, :, None]
    if zero is not None:
        s = s + query.zero[..., None] * zero.double().repeat_interleave(groups, 1)[:, :, None]
    return s + query.gauge[..., None]


@pytest.mark.parametrize("head_dim", [16, 64, 80])
@pytest.mark.parametrize("options", CODECS.values(), ids=CODECS)
def test_integer_scores_are_scores_of_dequantized_keys(packed, options, head_dim):
    codec, q, _, (planes, scale, zero) = packed(head_dim, **options)
    codes = unpack_keys(planes, codec.bits)
    scores = integer_scores(codec.map_query(q, 0.125), codes, scale, zero)
    k_hat = codec.dequantize(planes, scale, zero).double().repeat_interleave(3, 1)
    torch.testing.assert_close(scores, 0.125 * q @ k_hat.mT, rtol=0, atol=1e-4)  # dequantize is fp32


@pytest.mark.parametrize("options", [CODECS["affine + side"], CODECS["symmetric + optimal side"]], ids=str)
def test_wrong_sign_takes_the_side_code_off(packed, options):
    codec, q, k, (planes, scale, zero) = packed(64, **options)
    codes = unpack_keys(planes, codec.bits)
    with_side, without = (codec.dequantize(planes, scale, zero, side=s).double() for s in (True, False))
    mirrored = (2 * without - with_side).repeat_interleave(3, 1)
    scores = integer_scores(codec.map_query(q, 1.0, sign=-1), codes, scale, zero)
    torch.testing.assert_close(scores, q @ mirrored.mT, rtol=0, atol=1e-4)
    exact = q @ k.repeat_interleave(3, 1).mT
    error = {
        name: float((q @ x.repeat_interleave(3, 1).mT - exact).square().mean())
        for name, x in {"right": with_side, "none": without, "wrong": 2 * without - with_side}.items()
    }
    assert error["right"] < error["none"] < error["wrong"]


@pytest.mark.parametrize("options", [{}, {"k_zero_point": True}], ids=["symmetric", "affine"])
def test_dequantized_keys_are_near_the_exact_ones(packed, options):
    previous = float("inf")
    for bits in (1, 2, 3, 4, 6, 8):
        codec, _, k, rows = packed(64, k_bits=bits, side_bits=4, **options)
        centred = k - codec.mean.unsqueeze(-2)
        error = float((codec.dequantize(*rows).double() - k).square().mean() / centred.square().mean())
        assert error < 0.6 * previous
        previous = error
    assert previous < 1e-4


def test_the_gauge_is_free(packed):
    """The same codec over keys moved by a vector: the same codes, and softmax sees no difference."""
    codec, q, k, (planes, scale, _) = packed(64)
    shift = randn(1, 2, 64, seed=9)
    moved = codec.replace({"mean": codec.mean + shift})
    planes_moved, scale_moved, _ = moved.encode_rows(k + shift.unsqueeze(-2), True)
    changed = sum(int((a != b).sum()) for a, b in zip(planes, planes_moved, strict=True))
    assert changed <= 2, "rounding may flip a code"
    a, b = (
        integer_scores(c.map_query(q, 1.0), unpack_keys(p, c.bits), s, None).softmax(-1)
        for c, p, s in ((codec, planes, scale), (moved, planes_moved, scale_moved))
    )
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3 if changed else 1e-12)


def test_queries_keep_their_dtype(packed):
    codec, q, _, _ = packed(16)
    for dtype, mapped in ((torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)):
        assert {x.dtype for x in vars(codec.map_query(q.to(dtype), 1.0)).values()} == {mapped}


@pytest.mark.parametrize("options", [CODECS["affine + side"], CODECS["symmetric + side"], CODECS["no gauge"]], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_fp32_scores_are_as_exact_as_plain_attention(packed, head_dim, options):
    """The integers' coordinates cost no precision: at most twice the error of fp32 attention over k̂."""
    codec, q, _, (planes, scale, zero) = packed(head_dim, torch.float32, **options)
    wide = codec.replace({n: t.double() for n, t in codec.tensors().items()})
    v = randn(1, 2, 64, head_dim, seed=8)
    span = torch.zeros(1, 5, dtype=torch.int64), torch.full((1, 5), 64)
    rows = Rows(planes=planes, bits=codec.bits, scale=scale, zero=zero)
    scaling = head_dim**-0.5
    want, _ = decode_attention(wide.map_query(q, scaling), rows, Rows(exact=v), *span)
    ours, _ = decode_attention(codec.map_query(q.float(), scaling), rows, Rows(exact=v.float()), *span)
    k_hat = codec.dequantize(planes, scale, zero)
    plain = scaled_dot_product_attention(q.float(), k_hat, v.float(), scale=scaling, enable_gqa=True)
    rms = lambda x: float((x.double() - want).square().mean().sqrt())  # noqa: E731
    assert rms(ours) <= 2 * rms(plain) + 1e-9, (rms(ours), rms(plain))


def test_index_keeps_what_is_shared(packed):
    codec, *_ = packed(16)
    own = dataclasses.replace(codec, mean=torch.cat([codec.mean, codec.mean + 1]), own=frozenset({"mean"}))
    picked = own.index(torch.tensor([1, 1, 0]))
    assert torch.equal(picked.mean, own.mean[[1, 1, 0]])
    assert picked.encode is own.encode and picked.side_step is own.side_step


def test_tensors_names_what_there_is(packed):
    codec, *_ = packed(16, **CODECS["affine"])
    assert set(codec.tensors()) == {"mean", "encode", "read", "step"}
    codec, *_ = packed(16)
    assert set(codec.tensors()) == {f.name for f in dataclasses.fields(codec)} - {"bits", "own"}


def test_rank_zero_and_full_rank(packed):
    codec, *_ = packed(16, rank=0)
    assert codec.side_encode is None and codec.bits == (2,) * 16
    codec, *_ = packed(16, rank=16)
    assert codec.side_encode.shape[-1] == 16 and codec.bits == (2,) * 32
