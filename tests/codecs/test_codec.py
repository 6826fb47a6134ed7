"""Bases, steps and the query map: a score of codes is a score of the dequantized key."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from headq_ao import headq_config
from headq_ao.calibration.observers import MomentAccumulator
from headq_ao.codecs.affine import affine_codec, rotated_value_codec
from headq_ao.codecs.base import GAUSSIAN_STEP, KeyCodec
from headq_ao.codecs.layer_codec import LayerCodec
from headq_ao.codecs.linalg import ridged, rotation_matrix, square_roots, top_eigenvectors
from headq_ao.codecs.side_code import STEP_GRID, fit_steps, side_basis, with_side_code
from headq_ao.codecs.whitened import (
    PROMPT_RIDGE,
    prompt_whitened_codec,
    whitened_codec,
    whitened_value_codec,
    whitening,
)
from headq_ao.layer_shape import LayerShape


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


AFFINE = {"key_codec": "affine"}
CODECS = {
    "affine": AFFINE | {"k_zero_point": True, "rank": 0},
    "affine + side": AFFINE | {"k_zero_point": True, "rank": 5, "side_bits": 4},
    "symmetric": AFFINE | {"rank": 0},
    "symmetric + side": AFFINE,
    "symmetric + optimal side": AFFINE | {"basis": "score_optimal", "rank": 8, "side_bits": 4},
    "no mean": AFFINE | {"subtract_key_mean": False, "k_bits": 4},
    "no rotation": AFFINE | {"rotation": False, "k_bits": 3, "basis": "random"},
    "biased": AFFINE | {"unbiased_scale": False, "basis": "key_pca", "side_bits": 1},
    "whitened": {},
    "whitened + side": {"rank": 8, "side_bits": 4, "basis": "score_optimal"},
    "whitened, nearest": {"error_feedback": False, "k_bits": 3},
    "whitened, no mean": {"subtract_key_mean": False, "k_bits": 4, "whitening": 1.0},
    "whitened, no rotation": {"rotation": False, "whitening": 0.0, "unbiased_scale": False},
    "prompt": {"prompt": True},
    "prompt + side": {"prompt": True, "rank": 5},
    "prompt, nearest": {"prompt": True, "error_feedback": False, "k_bits": 3},
}


def build(config, c_q, rows, prompt=False):
    """The key codec of those statistics; ``prompt``: the form that a sequence can afford."""
    mean = rows.mean(-2)
    centred = rows - mean.unsqueeze(-2)
    if config.key_codec == "affine":
        return affine_codec(config, c_q, mean, rows[:, :, :256])
    if prompt:
        codec = prompt_whitened_codec(config, c_q, mean, centred.square().mean(-2))
    else:
        codec = whitened_codec(config, c_q, mean, second_moment(centred))
    return with_side_code(config, codec, c_q, rows[:, :, :256])


@pytest.fixture
def packed(statistics):
    """A codec, queries, exact keys and their packed tokens."""

    def make(head_dim, dtype=torch.float64, prompt=False, **options):
        config = headq_config(**options)
        q, k, c_q = statistics(head_dim)
        codec = build(config, c_q.to(dtype), k.to(dtype), prompt)
        k = k[:, :, 256:320]
        return codec, q[:, :, :5].repeat_interleave(3, 1), k, codec.quantize(k.to(dtype), config.unbiased_scale)

    return make


def mapped(codec, q, scaling, sign=1):
    """Queries ``[B, Hq, S, D]`` by the codec's query map: ``q̃``, ``b``, ``h`` and ``q·μ``."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    mapping = codec.query_map(sign, dtype)
    found = ((q.to(dtype) * scaling).unflatten(1, (mapping.shape[1], -1)) @ mapping.unsqueeze(2)).flatten(1, 2)
    bias, zero, of_mean = found[..., -3:].unbind(-1)
    return SimpleNamespace(codes=found[..., :-3], bias=bias, zero=zero, of_mean=of_mean)


def integer_scores(query, codes, scale, zero):
    """``s_j = σ_j (q̃·c_j + b) + m_j h + q·μ`` by hand, ``[B, Hq, S, T]``."""
    groups = query.codes.shape[1] // codes.shape[1]
    codes, scale = (x.to(query.codes.dtype).repeat_interleave(groups, 1) for x in (codes, scale))
    s = (query.codes @ codes.mT + query.bias[..., None]) * scale[:, :, None]
    if zero is not None:
        s = s + query.zero[..., None] * zero.to(scale.dtype).repeat_interleave(groups, 1)[:, :, None]
    return s + query.of_mean[..., None]


@pytest.mark.parametrize("head_dim", [16, 64, 80])
@pytest.mark.parametrize("options", CODECS.values(), ids=CODECS)
def test_integer_scores_are_scores_of_dequantized_keys(packed, options, head_dim):
    codec, q, _, (codes, scale, zero) = packed(head_dim, **options)
    scores = integer_scores(mapped(codec, q, 0.125), codes, scale, zero)
    k_hat = codec.dequantize(codes, scale, zero).double().repeat_interleave(3, 1)
    torch.testing.assert_close(scores, 0.125 * q @ k_hat.mT, rtol=0, atol=1e-4)  # dequantize is fp32


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


@pytest.mark.parametrize(
    "options",
    [AFFINE, AFFINE | {"k_zero_point": True}, {}, {"prompt": True}, {"rank": 8}],
    ids=["symmetric", "affine", "whitened", "prompt", "whitened + side"],
)
def test_dequantized_keys_are_near_the_exact_ones(packed, options):
    previous = float("inf")
    for bits in (1, 2, 3, 4, 6, 8):
        codec, _, k, rows = packed(64, k_bits=bits, side_bits=4, **options)
        centred = k - codec.mean.unsqueeze(-2)
        error = float((codec.dequantize(*rows).double() - k).square().mean() / centred.square().mean())
        assert error < 0.6 * previous
        previous = error
    assert previous < 1e-4


@pytest.mark.parametrize("name", ["symmetric + side", "whitened", "prompt"])
def test_the_gauge_is_free(packed, name):
    """The same codec over keys moved by a vector: the same codes, and softmax sees no difference."""
    codec, q, k, (codes, scale, _) = packed(64, **CODECS[name])
    shift = randn(1, 2, 64, seed=9)
    moved = codec.replace({"mean": codec.mean + shift})
    codes_moved, scale_moved, _ = moved.quantize(k + shift.unsqueeze(-2), True)
    changed = int((codes != codes_moved).sum())
    assert changed <= 2, "rounding may flip a code"
    a, b = (
        integer_scores(mapped(c, q, 1.0), p, s, None).softmax(-1)
        for c, p, s in ((codec, codes, scale), (moved, codes_moved, scale_moved))
    )
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3 if changed else 1e-12)


def test_queries_keep_their_dtype(packed):
    codec, q, _, _ = packed(16)
    for dtype, wide in ((torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)):
        assert {x.dtype for x in vars(mapped(codec, q.to(dtype), 1.0)).values()} == {wide}


@pytest.mark.parametrize("name", ["affine + side", "symmetric + side", "no mean", "whitened", "prompt"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_fp32_scores_are_as_exact_as_plain_attention(packed, head_dim, name):
    """The integers' coordinates cost no precision: at most twice the error of fp32 attention over k̂."""
    codec, q, _, (codes, scale, zero) = packed(head_dim, torch.float32, **CODECS[name])
    wide = codec.replace({n: t.double() for n, t in codec.tensors().items()})
    v = randn(1, 2, 64, head_dim, seed=8)
    scaling = head_dim**-0.5

    def attention(codec, q, v):
        scores = integer_scores(mapped(codec, q, scaling), codes, scale, zero)
        return scores.softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    want, ours = attention(wide, q, v), attention(codec, q.float(), v.float())
    k_hat = codec.dequantize(codes, scale, zero)
    plain = scaled_dot_product_attention(q.float(), k_hat, v.float(), scale=scaling, enable_gqa=True)
    rms = lambda x: float((x.double() - want).square().mean().sqrt())  # noqa: E731
    assert rms(ours) <= 2 * rms(plain) + 1e-9, (rms(ours), rms(plain))


def test_index_keeps_what_is_shared(packed):
    codec, *_ = packed(16, **AFFINE)
    own = dataclasses.replace(codec, mean=torch.cat([codec.mean, codec.mean + 1]), own=frozenset({"mean"}))
    picked = own.index(torch.tensor([1, 1, 0]))
    assert torch.equal(picked.mean, own.mean[[1, 1, 0]])
    assert picked.encode is own.encode and picked.side_step is own.side_step


def test_tensors_names_what_there_is(packed):
    plain = {"mean", "encode", "read", "step"}
    side = {"side_encode", "side_read", "side_step"}
    wanted = {
        "affine": plain,
        "symmetric": plain,
        "symmetric + side": plain | side,
        "whitened": plain | {"hessian"},
        "whitened + side": plain | side | {"hessian"},
        "whitened, nearest": plain,
        "prompt": plain | {"spread", "q_factor"},
        "prompt, nearest": plain | {"spread"},
    }
    for name, want in wanted.items():
        assert set(packed(16, **CODECS[name])[0].tensors()) == want, name
    in_unit = dataclasses.replace(packed(16)[0], unit=torch.ones(1, 2, 1)).tensors()
    names = {f.name for f in dataclasses.fields(KeyCodec)}
    assert set(in_unit).union(*wanted.values()) == names - {"bits", "symmetric", "head_bits", "own", "mapped", "parts"}


@pytest.mark.parametrize("options", [AFFINE, {}, {"prompt": True}], ids=["affine", "whitened", "prompt"])
def test_rank_zero_and_full_rank(packed, options):
    codec, *_ = packed(16, **options | {"rank": 0})
    assert codec.side_encode is None and codec.bits == (2,) * 16
    codec, *_ = packed(16, **options | {"rank": 16})
    assert codec.side_encode.shape[-1] == 16 and codec.bits == (2,) * 32


# Whitened codes


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
    torch.testing.assert_close(little.spread.log().mean(-1), torch.zeros(1, 2).double(), rtol=0, atol=1e-9)
    a, b = (codec.error_hessian() for codec in (whole, little))
    size = (a.diagonal(dim1=-2, dim2=-1).mean(-1) / b.diagonal(dim1=-2, dim2=-1).mean(-1))[..., None, None]
    torch.testing.assert_close(a, size.to(a) * b.to(a), rtol=1e-4, atol=1e-5 * float(a.abs().max()))
    k = k[:, :, :64]
    wide, narrow = (codec.dequantize(*codec.quantize(k, True)).double() for codec in (whole, little))
    assert float((wide - narrow).square().mean() / (wide - k).square().mean()) < 0.05, "but for rounding flips"


def test_spread_and_seen_are_shorthand(packed):
    """The same rows as of a codec that holds the stretched basis and the metric themselves."""
    codec, q, k, (codes, scale, zero) = packed(64, prompt=True)
    encode = codec.encode / codec.spread[..., None]
    seen = codec.reader.mT @ codec.q_factor
    metric = codec.reader.mT @ codec.reader + seen @ seen.mT
    full = dataclasses.replace(codec, encode=encode, read=codec.reader, hessian=metric, spread=None, q_factor=None)
    torch.testing.assert_close(codec.error_hessian().double(), metric, rtol=1e-4, atol=1e-4)
    again, scale_again, _ = full.quantize(k, True)
    assert int((codes != again).sum()) <= 2
    assert float((scale_again != scale).double().mean()) < 0.02
    torch.testing.assert_close(full.dequantize(codes, scale, zero), codec.dequantize(codes, scale, zero))
    for name, x in vars(mapped(codec, q, 0.3)).items():
        torch.testing.assert_close(x, vars(mapped(full, q, 0.3))[name])


@pytest.mark.parametrize("name", ["whitened", "whitened + side", "prompt", "prompt + side", "symmetric + side"])
def test_heads_of_a_codec(packed, name):
    """A codec cut to some heads writes and reads them as the whole one does."""
    codec, q, k, (codes, scale, _) = packed(32, **CODECS[name])
    part = slice(1, 2)
    mine = codec.of_heads(part)
    assert (mine.side_read is mine.side_encode) == (codec.side_read is codec.side_encode)
    mine_codes, mine_scale, _ = mine.quantize(k[:, part], True)
    assert torch.equal(mine_scale, scale[:, part])
    assert torch.equal(mine_codes, codes[:, part])
    torch.testing.assert_close(
        mine.dequantize(mine_codes, mine_scale, None), codec.dequantize(codes, scale, None)[:, part]
    )
    half = q.unflatten(1, (2, -1))[:, part].flatten(1, 2)
    whole = mapped(codec, q, 0.3).codes.unflatten(1, (2, -1))[:, part].flatten(1, 2)
    torch.testing.assert_close(mapped(mine, half, 0.3).codes, whole)


@pytest.mark.parametrize(("basis", "one"), [("query_pca", True), ("score_optimal", False)])
def test_a_moved_layer_keeps_one_side_basis(basis, one):
    """A basis that reads as it encodes is one tensor, also after the module went to another device."""
    g = torch.Generator().manual_seed(0)
    accumulator = MomentAccumulator(64)
    q, k, v = (torch.randn(64, 2, 32, generator=g) for _ in range(3))
    accumulator.add(q, k, v, [torch.ones(64, 2)] * 3, torch.rand(64, generator=g))
    config = headq_config(key_codec="affine", value_codec="affine", rank=16, basis=basis)
    layer = LayerCodec(config, LayerShape(2, 2, 32, None), accumulator.moments(), torch.device("cpu"))
    layer._apply(torch.clone)
    assert (layer.calibrated.side_read is layer.calibrated.side_encode) == one


def test_a_prompts_own_statistics_are_taken_under_the_layers_softcap():
    g = torch.Generator().manual_seed(0)
    q, k = 3 * torch.randn(1, 4, 200, 32, generator=g), torch.randn(1, 2, 200, 32, generator=g)
    q[..., 0] *= 8
    made = {
        cap: LayerCodec(headq_config(), LayerShape(4, 2, 32, None, softcap=cap), None, torch.device("cpu"))
        for cap in (None, 1e6, 2.0)
    }
    plain, far, low = (made[cap].from_prompt(q, k, 0.2) for cap in (None, 1e6, 2.0))
    torch.testing.assert_close(far.mean, plain.mean, rtol=1e-3, atol=1e-4)
    assert (low.mean - plain.mean).norm() > 0.1 * plain.mean.norm()


@pytest.mark.parametrize("name", ["prompt", "prompt + side"])
def test_sequences_of_a_codec(packed, name):
    """Statistics of two sequences: each row is coded with its own, in any order."""
    codec, _, k, _ = packed(32, **CODECS[name])
    own = {"mean", "spread", "q_factor", "side_encode", "side_read", "side_step"} & codec.tensors().keys()
    other = {n: codec.tensors()[n].flip(1) for n in own}
    both = {n: torch.cat([codec.tensors()[n], other[n]]) for n in own}
    if codec.side_read is codec.side_encode and codec.side_read is not None:
        both["side_read"], other["side_read"] = both["side_encode"], other["side_encode"]
    batch = dataclasses.replace(codec, **both, own=frozenset(own))
    codes, scale, _ = batch.index(torch.tensor([1, 0, 1])).quantize(k.expand(3, -1, -1, -1), True)
    for b, one in enumerate((dataclasses.replace(codec, **other), codec, dataclasses.replace(codec, **other))):
        alone, alone_scale, _ = one.quantize(k, True)
        assert torch.equal(scale[b], alone_scale[0])
        assert torch.equal(codes[b], alone[0])


# Values


VALUES = {
    "whitened": {},
    "whitened, no whitening": {"whitening": 0.0},
    "whitened, nearest": {"error_feedback": False},
    "whitened, no rotation": {"rotation": False},
    "affine": {"value_codec": "affine"},
    "affine, zero": {"value_codec": "affine", "v_zero_point": True, "v_group_size": 16},
}


@pytest.fixture
def values():
    """``values(v_bits=…)``: a value codec, 256 values ``[1, 2, 256, 64]`` with a mean, and how they are read back."""

    def make(**options):
        config = headq_config(**options)
        v = anisotropic(1, 2, 1024, 64, decay=1.5, seed=21) + randn(1, 2, 1, 64, seed=22)
        if config.value_codec == "affine":
            codec = rotated_value_codec(config, 64)
        else:
            codec = whitened_value_codec(config, v.mean(-2), second_moment(v))

        def coordinates(rows):
            """``ŷ`` of tokens, float64, by hand."""
            codes, scale, zero = codec.quantize(rows)
            scale = scale.double()
            zero = -scale * ((2**codec.bits - 1) / 2) if zero is None else zero.double()
            wide = codes.double().unflatten(-1, (scale.shape[-1], -1))
            return (wide * scale[..., None] + zero[..., None]).flatten(-2)

        return codec, v[:, :, 768:], coordinates

    return make


def readout(codec, out):
    """A weighted sum of coordinates ``[B, Hq, S, D]`` in the model's basis, as :class:`headq_ao.ops.types.Readers`."""
    groups = out.shape[1] // 2
    read = codec.reader.to(out.dtype).expand(-1, 2, -1, -1).repeat_interleave(groups, 1)
    out = out @ read.mT
    return out if codec.mean is None else out + codec.mean.to(out.dtype).repeat_interleave(groups, 1).unsqueeze(-2)


@pytest.mark.parametrize("name", VALUES)
def test_readout_is_the_sum_of_dequantized_values(values, name):
    """Σ_j a_j v̂_j = (Σ_j a_j ŷ_j) readᵀ + mean, the mean once, as attention weights sum to one."""
    codec, v, coordinates = values(**VALUES[name])
    a = randn(1, 6, 5, 256, seed=23).softmax(-1)
    v_hat = codec.dequantize(*codec.quantize(v)).double()
    out = readout(codec, a @ coordinates(v).repeat_interleave(3, 1))
    torch.testing.assert_close(out, a @ v_hat.repeat_interleave(3, 1), rtol=0, atol=1e-5)  # dequantize is fp32
    assert set(codec.tensors()) == {"encode", "read"} | (
        set() if "affine" in name else {"mean"} if "nearest" in name else {"mean", "hessian"}
    )


@pytest.mark.parametrize("name", ["whitened", "whitened, nearest"])
def test_the_value_gauge_is_free(values, name):
    """Values and mean moved by one vector: the same codes, and an output moved by it."""
    codec, v, _ = values(**VALUES[name])
    shift = 20 * randn(1, 2, 64, seed=24)
    moved = dataclasses.replace(codec, mean=codec.mean + shift)
    codes, scale, _ = codec.quantize(v)
    codes_moved, scale_moved, _ = moved.quantize(v + shift.unsqueeze(-2))
    assert int((codes != codes_moved).sum()) <= 2, "rounding may flip a code"
    assert float((scale != scale_moved).double().mean()) < 0.02
    out = randn(1, 4, 3, 64, seed=25)
    want = readout(codec, out) + shift.repeat_interleave(2, 1).unsqueeze(-2)
    torch.testing.assert_close(readout(moved, out), want)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_whitened_values_err_less(values, bits):
    """``‖v − v̂‖²`` at equal bits, on anisotropic values with a mean; in each coordinate that a row has."""

    def error(**options):
        codec, v, coordinates = values(v_bits=bits, **options)
        v_hat = coordinates(v) @ codec.read.double().mT
        if codec.mean is not None:
            v_hat = v_hat + codec.mean.double().unsqueeze(-2)
        return float((v_hat - v).square().sum(-1).mean())

    visible = error()
    assert visible < 0.5 * error(value_codec="affine")
    assert visible < 0.8 * error(error_feedback=False)
    assert visible < error(whitening=0.0)
