"""The side code: its bases, its steps, and what it takes off a score's error."""

import pytest
import torch

from headq_ao import headq_config
from headq_ao.codecs.base import GAUSSIAN_STEP
from headq_ao.codecs.side_code import STEP_GRID, fit_steps, side_basis
from tests.codecs.states import (
    AFFINE,
    CODECS,
    anisotropic,
    integer_scores,
    mapped,
    orthogonal,
    randn,
    second_moment,
    spectrum,
)


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


def test_fit_steps_of_nothing_stays_positive():
    step = fit_steps(torch.zeros(1, 1, 32, 4), 2)
    assert bool((step > 0).all()) and bool(torch.isfinite(step).all())


def test_query_pca_of_a_hand_made_c_q():
    basis = orthogonal(2, 16)
    values = torch.tensor([[9.0, 7, 5, 3] + [1] * 12, [4.0, 8, 2, 6] + [1] * 12], dtype=torch.float64)
    c_q = (basis * values[:, None]) @ basis.mT
    rows, k_err = randn(1, 2, 32, 16), randn(1, 2, 32, 16, seed=1)
    encode, read = side_basis(headq_config(key_codec="affine", basis="query_pca"), 3, c_q[None], rows, k_err)
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
    encode, read = side_basis(headq_config(key_codec="affine", basis="key_pca"), 2, randn(1, 1, 16, 16), rows, rows)
    assert encode is read
    overlap = (axes[:, :2].T @ encode[0, 0]).abs()
    torch.testing.assert_close(overlap, torch.eye(2, dtype=torch.float64), rtol=0, atol=0.05)


def test_random_basis_is_seeded_and_per_head():
    c_q, rows = torch.eye(32, dtype=torch.float64).expand(1, 3, 32, 32), randn(1, 3, 16, 32)

    def basis(seed):
        return side_basis(headq_config(key_codec="affine", basis="random", seed=seed), 8, c_q, rows, rows)[0]

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
        name: score_error(q, k_err, *side_basis(headq_config(key_codec="affine", basis=name), 8, c_q, k, k_err))
        for name in ("score_optimal", "query_pca", "key_pca", "random")
    }
    assert error["score_optimal"] < 0.9 * error["query_pca"]
    assert error["query_pca"] < 0.9 * error["random"]
    assert error["score_optimal"] < min(error["key_pca"], error["random"])


def test_score_optimal_is_a_minimum(statistics):
    """No nearby pair of rank R does better."""
    q, k, c_q = statistics(head_dim=16)
    k_err = anisotropic(1, 2, 512, 16, seed=11)
    encode, read = side_basis(headq_config(key_codec="affine", basis="score_optimal"), 4, c_q, k, k_err)
    least = score_error(q, k_err, encode, read)
    for seed in range(20):
        nudge = 0.05 * randn(2, *encode.shape, seed=seed)
        scale_e, scale_p = encode.square().mean().sqrt(), read.square().mean().sqrt()
        assert score_error(q, k_err, encode + nudge[0] * scale_e, read + nudge[1] * scale_p) > least


def test_a_constant_error_does_not_move_the_basis(statistics):
    """Softmax does not see an error that all keys share, so no side code is spent on it."""
    _, k, c_q = statistics(head_dim=32)
    k_err = anisotropic(1, 2, 512, 32, seed=11)
    config = headq_config(key_codec="affine", basis="score_optimal")
    basis, moved = (side_basis(config, 4, c_q, k, x) for x in (k_err, k_err + 10 * randn(1, 2, 1, 32)))
    for a, b in zip(basis, moved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_score_optimal_pair_is_a_projection(statistics):
    """EᵀP = 1, so that coding an error inside the span of P gives that error back."""
    _, k, c_q = statistics(head_dim=32)
    encode, read = side_basis(headq_config(key_codec="affine", basis="score_optimal"), 6, c_q, k, randn(1, 2, 512, 32))
    torch.testing.assert_close(
        encode.mT @ read, torch.eye(6, dtype=torch.float64).expand(1, 2, 6, 6), rtol=0, atol=1e-9
    )


def test_isotropic_errors_give_both_bases_one_span(statistics):
    _, k, c_q = statistics(head_dim=16)
    k_err = orthogonal(32, seed=4)[:, :16][None, None].expand(1, 2, 32, 16)
    k_err = torch.cat([k_err, -k_err], -2)  # centred, and C_e a multiple of one
    torch.testing.assert_close(second_moment(k_err), torch.eye(16, dtype=torch.float64).expand(1, 2, 16, 16) / 32)
    u, _ = side_basis(headq_config(key_codec="affine", basis="query_pca"), 4, c_q, k, k_err)
    encode, read = side_basis(headq_config(key_codec="affine", basis="score_optimal"), 4, c_q, k, k_err)
    for x in (encode, read):
        p = torch.linalg.qr(x)[0]
        torch.testing.assert_close(p @ p.mT, u @ u.mT, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["affine + side", "symmetric + optimal side", "whitened + side", "prompt + side"])
def test_wrong_sign_takes_the_side_code_off(packed, name):
    codec, q, k, (codes, scale, zero) = packed(64, **CODECS[name])
    with_side, without = (codec.dequantize(codes, scale, zero, side=s).double() for s in (True, False))
    mirrored = (2 * without - with_side).repeat_interleave(3, 1)
    scores = integer_scores(mapped(codec, q, 1.0, sign=-1), codes, scale, zero)
    torch.testing.assert_close(scores, q @ mirrored.mT, rtol=0, atol=1e-4)
    exact = q @ k.repeat_interleave(3, 1).mT
    error = {
        name: float((q @ x.repeat_interleave(3, 1).mT - exact).square().mean())
        for name, x in {"right": with_side, "none": without, "wrong": 2 * without - with_side}.items()
    }
    assert error["right"] < error["none"] < error["wrong"]


@pytest.mark.parametrize("options", [AFFINE, {}, {"prompt": True}], ids=["affine", "whitened", "prompt"])
def test_rank_zero_and_full_rank(packed, options):
    codec, *_ = packed(16, **options | {"rank": 0})
    assert codec.side_encode is None and codec.bits == (2,) * 16
    codec, *_ = packed(16, **options | {"rank": 16})
    assert codec.side_encode.shape[-1] == 16 and codec.bits == (2,) * 32
