"""The quantizer against a loop over tokens in float64, and what stored tokens must promise."""

import math

import pytest
import torch

from headq_ao.codecs.base import GAUSSIAN_STEP
from headq_ao.codecs.linalg import rotation_matrix
from headq_ao.ops import Encoder, feedback_codes, quantize
from tests.ops import codes_96f785c

TINY, HUGE = 2.0**-24, 65504.0


def fp16(x):
    return float(torch.tensor(x, dtype=torch.float64).half())


def positive_fp16(x):
    return fp16(min(max(x, TINY), HUGE))


def clip_round(x, top):
    return min(max(round(x), 0), top)  # Python rounds half to even, as torch does


def at(x, b, h):
    """The entry of batch row b and head h, where either may be shared."""
    return None if x is None else x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)]


def encode_token(k, mean, encode, read, step, bits, symmetric, side_encode, side_step, unbiased):
    """One token as the docstring of Encoder says it: codes, σ, zero."""
    base = len(step)
    tops = [2**b - 1 for b in bits]
    y = ((k - mean) @ encode).tolist()
    zero = None
    if not symmetric:
        sigma = positive_fp16((max(y) - min(y)) / tops[0])
        zero = fp16(min(max(min(y), -HUGE), HUGE))
        codes = [clip_round((y_i - zero) / sigma, tops[0]) for y_i in y]
        y_hat = [zero + sigma * c for c in codes]
    else:
        sigma = positive_fp16(math.sqrt(sum(y_i**2 for y_i in y) / base))
        middle = [top / 2 for top in tops[:base]]
        codes = [clip_round(y[i] / (sigma * float(step[i])) + middle[i], tops[i]) for i in range(base)]
        levels = [float(step[i]) * (codes[i] - middle[i]) for i in range(base)]
        if unbiased and any(y):
            dot = sum(y_i * sigma * level for y_i, level in zip(y, levels, strict=True))
            sigma = positive_fp16(sigma * sum(y_i**2 for y_i in y) / dot)
        y_hat = [sigma * level for level in levels]
    if side_encode is not None:
        k_err = (k - mean) - read @ torch.tensor(y_hat, dtype=torch.float64)
        for r, (z, top) in enumerate(zip((k_err @ side_encode).tolist(), tops[base:], strict=True)):
            codes.append(clip_round(z / (sigma * float(side_step[r])) + top / 2, top))
    return codes, sigma, zero


def encode_loop(k, mean, encode, read, step, bits, *, symmetric=True, side_encode=None, side_step=None, unbiased=True):
    b, h, t, _ = k.shape
    codes = torch.zeros(b, h, t, len(bits), dtype=torch.uint8)
    scale, zero = torch.zeros(b, h, t), torch.zeros(b, h, t)
    for i in range(b):
        for j in range(h):
            shared = [at(x, i, j) for x in (mean, encode, read, step)]
            sides = [at(x, i, j) for x in (side_encode, side_step)]
            for n in range(t):
                row, sigma, m = encode_token(k[i, j, n], *shared, bits, symmetric, *sides, unbiased)
                codes[i, j, n] = torch.tensor(row)
                scale[i, j, n] = sigma
                zero[i, j, n] = 0.0 if m is None else m
    return codes, scale, zero


@pytest.fixture
def case(randn, orthogonal):
    """Tokens, and what an Encoder takes; ``own`` gives each sequence its own mean and side basis."""

    def make(
        symmetric, head_dim=16, batch=1, heads=2, tokens=16, base_bits=2, rank=0, side_bits=2, own=False, feedback=False
    ):
        mine = batch if own else 1
        rotation = orthogonal(1, 1, head_dim)
        args = {
            "k": randn(batch, heads, tokens, head_dim) * (1 + randn(1, heads, 1, head_dim).abs()),
            "mean": randn(mine, heads, head_dim),
            "encode": rotation,
            "read": rotation,
            "step": torch.ones(1, 1, head_dim, dtype=torch.float64),
            "symmetric": symmetric,
            "bits": [base_bits] * head_dim + [side_bits] * rank,
        }
        if symmetric:
            args["step"] = 0.5 + randn(1, 1, head_dim).abs() / 2
        if feedback:
            seen = randn(mine, heads, head_dim, head_dim // 2)
            args["metric"] = seen @ seen.mT + 0.1 * torch.eye(head_dim, dtype=torch.float64)
        if rank:
            args["side_encode"] = orthogonal(mine, heads, head_dim)[..., :rank]
            args["side_step"] = 0.1 + randn(mine, heads, rank).abs() / 2
        return args

    return make


def encoder_of(args, **options):
    """The Encoder of those arguments."""
    given = {name: x for name, x in (args | options).items() if name not in ("k", "symmetric", "metric")}
    given["bits"] = tuple(given["bits"])
    given["step"] = given["step"] if args["symmetric"] else None
    return Encoder(**given, hessian=args.get("metric"))


def run(args, **options):
    """Codes, scale and zero of quantize."""
    codes, scale, zero = quantize(args["k"], encoder_of(args, **options))
    return codes, scale[..., 0], None if zero is None else zero[..., 0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head_dim": 80, "tokens": 32},
        {"head_dim": 64, "heads": 1, "base_bits": 3},
        {"batch": 2, "rank": 4, "own": True},
        {"head_dim": 96, "rank": 7, "side_bits": 4},
        {"head_dim": 32, "base_bits": 1, "rank": 8, "side_bits": 1},
        {"base_bits": 8, "rank": 16, "side_bits": 6},
        {"head_dim": 128, "heads": 1, "base_bits": 4, "rank": 3, "side_bits": 5},
        {"head_dim": 256, "heads": 1, "rank": 64},
    ],
    ids=str,
)
@pytest.mark.parametrize("base", ["affine", "symmetric", "symmetric, biased"])
def test_against_a_loop(case, base, options):
    args = case(base != "affine", **options)
    codes, scale, zero = run(args, unbiased="biased" not in base)
    want_codes, want_scale, want_zero = encode_loop(**args, unbiased="biased" not in base)
    assert torch.equal(codes, want_codes)
    assert scale.dtype == torch.float16 and torch.equal(scale.float(), want_scale)
    if base == "affine":
        assert zero.dtype == torch.float16 and torch.equal(zero.float(), want_zero)
    else:
        assert zero is None


def test_ragged_base_bits(case):
    args = case(True)
    args["bits"] = [8] * 2 + [4] * 6 + [3] * 2 + [1] * 6
    codes, scale, _ = run(args)
    want_codes, want_scale, _ = encode_loop(**args)
    assert torch.equal(codes, want_codes)
    assert torch.equal(scale.float(), want_scale)


def test_narrower_base_than_head_dim(case, randn):
    """A base that keeps 8 of 16 coordinates: the side code sees what was dropped."""
    args = case(True, rank=4)
    args |= {name: args[name][..., :8] for name in ("encode", "read", "step")}
    args["bits"] = [2] * 8 + [2] * 4
    codes, scale, _ = run(args)
    want_codes, want_scale, _ = encode_loop(**args)
    assert torch.equal(codes, want_codes)
    assert torch.equal(scale.float(), want_scale)


@pytest.mark.parametrize("base", ["affine", "symmetric", "feedback"])
def test_side_code_is_of_the_stored_row(case, base):
    """z is the error of what a reader decodes, fp16 scale and zero included, not of the unrounded row."""
    symmetric = base != "affine"
    args = case(symmetric, head_dim=32, rank=32, side_bits=8, feedback=base == "feedback")
    args["side_step"] = torch.full((1, 2, 32), 1e-4, dtype=torch.float64)  # finer than the fp16 rounding of the scale
    if symmetric:
        args["k"] = args["mean"].unsqueeze(-2) + args["k"] * 1e-3
    base_bits = torch.tensor(args["bits"][:32])
    codes, scale, zero = run(args)
    centre = (2.0**base_bits - 1) / 2 if symmetric else 0.0
    sigma = scale.double()[..., None]
    y_hat = sigma * args["step"] * (codes[..., :32] - centre) + (0 if symmetric else zero.double()[..., None])
    k_err = args["k"] - args["mean"].unsqueeze(-2) - y_hat @ args["read"].mT
    z = k_err @ args["side_encode"] / (sigma * 1e-4) + 255 / 2
    assert torch.equal(codes[..., 32:], z.round().clamp(0, 255).to(torch.uint8))
    coarse = k_err @ args["side_encode"] / (sigma * (1 + 2.0**-12) * 1e-4) + 255 / 2
    assert not torch.equal(coarse.round(), z.round()), "the case does not tell roundings of the scale apart"


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("options", [{}, {"batch": 2, "own": True, "rank": 4, "head_dim": 48}], ids=str)
def test_feedback_codes_the_encoded_row(case, options, unbiased):
    """With a metric, base codes and σ are those of feedback_codes on ``(k − mean) @ encode``."""
    args = case(True, feedback=True, **options)
    codes, scale, zero = run(args, unbiased=unbiased)
    y = (args["k"] - args["mean"].unsqueeze(-2)) @ args["encode"]
    want, sigma = feedback_codes(y, args["metric"], args["step"], 2, unbiased=unbiased)
    assert torch.equal(codes[..., : y.shape[-1]], want)
    assert torch.equal(scale, sigma) and zero is None
    nearest = run({name: x for name, x in args.items() if name != "metric"}, unbiased=unbiased)
    assert not torch.equal(codes, nearest[0])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_unbiased_scale(case, bits):
    """⟨y, ŷ⟩ = ‖y‖² within the fp16 rounding of one scale; without it rows shrink."""
    args = case(True, head_dim=64, tokens=64, base_bits=bits)
    y = (args["k"] - args["mean"].unsqueeze(-2)) @ args["encode"]

    def gain(unbiased):
        codes, scale, _ = run(args, unbiased=unbiased)
        y_hat = scale.double()[..., None] * args["step"] * (codes - (2**bits - 1) / 2)
        return (y * y_hat).sum(-1) / y.square().sum(-1)

    assert (gain(True) - 1).abs().max() <= 2.0**-11
    assert (gain(False) - 1).abs().max() > 2.0**-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("base", ["affine", "symmetric", "feedback"])
def test_low_precision_keys_are_coded_in_fp32(case, base, dtype):
    args = case(base != "affine", head_dim=64, rank=16, tokens=32, feedback=base == "feedback")
    args = {n: x.to(dtype if n == "k" else torch.float32) if torch.is_tensor(x) else x for n, x in args.items()}
    codes, scale, zero = run(args)
    widened = run(args | {"k": args["k"].float()})
    assert torch.equal(codes, widened[0])
    assert torch.equal(scale, widened[1])
    assert zero is None or torch.equal(zero, widened[2])
    wide = {n: x.double() if torch.is_tensor(x) else x for n, x in args.items()}
    exact, _, _ = run(wide) if base == "feedback" else encode_loop(**wide)
    # ties of fp32 against float64; with feedback one flipped code moves those after it
    assert (codes != exact).double().mean() < (0.02 if base == "feedback" else 1e-3)


def decoded(args, codes, scale, zero):
    """What a reader sees of the base: k_hat."""
    base = args["read"].shape[-1]
    if zero is None:
        middle = (2.0 ** torch.tensor(args["bits"][:base]) - 1) / 2
        y_hat = scale.double()[..., None] * args["step"] * (codes[..., :base] - middle)
    else:
        y_hat = scale.double()[..., None] * codes[..., :base] + zero.double()[..., None]
    return args["mean"].unsqueeze(-2) + y_hat @ args["read"].mT


EDGES = {
    "zero": 0.0,
    "constant": 3.0,
    "tiny": 1e-6,
    "smaller than fp16": 1e-12,
    "huge": 6e4,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("centred", [False, True], ids=["no mean", "mean"])
@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("base", ["affine", "symmetric", "feedback"])
def test_extreme_rows(case, randn, base, name, centred, dtype):
    symmetric = base != "affine"
    args = case(symmetric, head_dim=64, rank=8, base_bits=4, side_bits=4)
    if base == "feedback":
        args["metric"] = (0.1 + 0.9 * torch.eye(64, dtype=torch.float64)).expand(1, 2, 64, 64)
    args["encode"] = args["read"] = torch.eye(64, dtype=torch.float64)[None, None]
    if symmetric:
        args["step"] = torch.full_like(args["step"], 0.3352)
    if name in ("zero", "constant"):
        args["k"] = torch.full_like(args["k"], EDGES[name])
    else:
        args["k"] = randn(1, 2, 16, 64).clamp(-1, 1) * EDGES[name]
    args["k"] = args["k"].to(dtype)
    args["mean"] = args["k"].double().mean(-2) if centred else torch.zeros(1, 2, 64, dtype=torch.float64)
    codes, scale, zero = run(args)
    assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
    assert zero is None or bool(torch.isfinite(zero).all())
    k = args["k"].double()
    error = (decoded(args, codes, scale, zero) - k).norm(dim=-1)
    size = (k - args["mean"].unsqueeze(-2)).norm(dim=-1)
    # one fp16 step of the smallest scale beside a share of the row's own size
    assert bool((error <= 0.25 * size + 1e-5).all()), float((error / size).max())


def test_a_rotation_may_carry_a_row_past_fp16(case):
    """64 coordinates of 6e4 meet in one rotated coordinate of 4.8e5: clipped, and finite."""
    args = case(False, head_dim=64)
    args["encode"] = args["read"] = rotation_matrix(64).double()[None, None]
    args["mean"] = torch.zeros(1, 2, 64, dtype=torch.float64)
    args["k"] = torch.full_like(args["k"], -6e4)
    codes, scale, zero = run(args)
    assert bool(torch.isfinite(scale).all()) and bool(torch.isfinite(zero).all())
    assert bool(torch.isfinite(decoded(args, codes, scale, zero)).all())


def test_side_code_lessens_the_error(case):
    args = case(True, head_dim=64, tokens=64, rank=16, side_bits=4)
    codes, scale, zero = run(args)
    k_hat = decoded(args, codes, scale, zero)
    z = (codes[..., 64:] - 7.5) * scale.double()[..., None] * args["side_step"].unsqueeze(-2)
    basis = args["side_encode"]
    before = (args["k"] - k_hat) @ basis
    after = (args["k"] - k_hat - z @ basis.mT) @ basis
    assert after.square().mean() < 0.3 * before.square().mean()


@pytest.mark.parametrize("options", [{}, {"batch": 2, "heads": 3, "tokens": 47, "own": True, "rank": 4}], ids=str)
@pytest.mark.parametrize("base", ["affine", "symmetric", "feedback"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(case, base, options, dtype):
    args = case(base != "affine", **options, feedback=base == "feedback")
    args = {n: x.to(dtype if n == "k" else torch.float32) if torch.is_tensor(x) else x for n, x in args.items()}
    torch.library.opcheck(torch.ops.headq.quantize.default, (args["k"], *encoder_of(args).flat))


def test_a_view(case):
    args = case(True, heads=3, tokens=32, rank=2)
    dense = run(args)
    args["k"] = args["k"].transpose(1, 2).contiguous().transpose(1, 2)  # what a projection hands over
    view = run(args)
    assert torch.equal(view[0], dense[0]) and torch.equal(view[1], dense[1])


@pytest.mark.parametrize("base", ["affine", "symmetric", "feedback"])
def test_flat_and_back(case, base):
    encoder = encoder_of(case(base != "affine", rank=4, feedback=base == "feedback"))
    again = Encoder.of_flat(*encoder.flat)
    x = torch.randn(1, 2, 3, 16)
    assert all(
        a is b is None or torch.equal(a, b) for a, b in zip(quantize(x, encoder), quantize(x, again), strict=True)
    )
    assert again.flat[1] == encoder.flat[1]


@pytest.mark.parametrize("head_dim", [16, 80, 128, 256, 512])
@pytest.mark.parametrize("base", ["affine", "symmetric", "feedback"])
def test_tokens_are_coded_each_for_itself(case, base, head_dim):
    """Any cut of the tokens, single ones included: the same bits."""
    args = case(base != "affine", head_dim=head_dim, tokens=37, rank=4, feedback=base == "feedback")
    args = {n: x.float() if torch.is_tensor(x) else x for n, x in args.items()}
    whole = run(args)
    for cut in (1, 2, 3, 16):
        parts = [run(args | {"k": k}) for k in args["k"].split(cut, 2)]
        for x, *y in zip(whole, *parts, strict=True):
            assert x is None or torch.equal(x, torch.cat(y, 2))


@pytest.mark.parametrize("base", ["affine", "symmetric", "feedback"])
def test_a_unit_changes_no_code(case, base):
    """Tokens as many times as large, by a power of two."""
    args = case(base != "affine", tokens=9, rank=4, feedback=base == "feedback")
    unit = 2.0 ** torch.tensor([[[-20], [30]]])
    plain, scaled = run(args), run(args | {"k": args["k"] * unit[..., None]}, unit=unit)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))


@pytest.mark.parametrize("dim", [32, 48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("number", [True, False], ids=["values", "keys"])
def test_codes_are_those_of_96f785c(dim, bits, number):
    torch.manual_seed(dim + bits)
    seen = torch.randn(1, 2, dim, dim // 4)
    step = GAUSSIAN_STEP[bits]
    encoder = Encoder(
        torch.linalg.qr(torch.randn(1, 2, dim, dim))[0], (bits,), step if number else torch.full((1, 2, dim), step),
        mean=torch.randn(1, 2, dim), hessian=seen @ seen.mT + 0.2 * torch.eye(dim),
    )  # fmt: skip
    x = 2 * torch.randn(2, 2, 32, dim)
    codes, scale, _ = quantize(x, encoder)
    want, sigma = codes_96f785c.quantize(x, encoder)
    assert torch.equal(codes, want) and torch.equal(scale[..., 0], sigma)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": (2, 16, 16)}, r"x must be \[B, h, n, 16\] for this encoder, got \(2, 16, 16\)"),
        ({"k": (1, 2, 16, 8)}, r"x must be \[B, h, n, 16\] for this encoder, got \(1, 2, 16, 8\)"),
        ({"bits": [2] * 15}, r"bits must list 16 base and 0 side coordinates, got 15"),
        ({"bits": [2] * 15 + [7]}, r"bits must be of \[1, 2, 3, 4, 5, 6, 8\], got \[7\]"),
        ({"bits": [2] * 8 + [4] * 8}, r"need one bit width for all coordinates, got \[2, 4\]"),
        ({"side_step": (1, 2, 4)}, r"side_encode, side_step and read must be given together"),
        ({"mean": (1, 2, 8)}, r"mean must end in \(16,\) for tokens of 16, got \(1, 2, 8\)"),
        ({"step": (1, 1, 4), "symmetric": True}, r"step must end in \(16,\) for tokens of 16, got \(1, 1, 4\)"),
        ({"metric": (1, 2, 16, 16)}, r"error feedback \(hessian\) needs a symmetric code \(step\)"),
        ({"metric": (1, 2, 16, 16), "symmetric": True, "group_size": 8}, r"and one scale per token"),
        (
            {"metric": (1, 2, 16, 16), "symmetric": True, "bits": [2] * 8 + [4] * 8},
            r"error feedback need one bit width for all coordinates",
        ),
        ({"metric": (1, 2, 16, 8), "symmetric": True}, r"hessian must end in \(16, 16\) for tokens of 16, got"),
        ({"group_size": 5}, r"group_size must divide the 16 coordinates, got 5"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors(case, changes, message):
    args = case(False)
    args |= {name: torch.ones(x) if isinstance(x, tuple) else x for name, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        run(args)


def encode_group(y, bits, step, unbiased):
    """One group of one token as the docstring of Encoder says it: codes, scale, zero."""
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


def run_values(v, encode, bits, *, metric=None, step=0.0, **options):
    """Codes, scale and zero of quantize, the step a part of the stored scale."""
    return quantize(v, Encoder(encode, (bits,), step or None, hessian=metric, **options))


@pytest.mark.parametrize(
    ("head_dim", "group_size", "tokens"), [(16, 16, 32), (64, 64, 32), (80, 16, 32), (96, 32, 64), (128, 64, 32)]
)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("base", ["affine", "symmetric", "symmetric, biased"])
def test_against_a_loop_of_values(randn, orthogonal, base, bits, head_dim, group_size, tokens):
    v, rotation = randn(2, 1, tokens, head_dim), orthogonal(head_dim)
    step, unbiased = 0.0 if base == "affine" else GAUSSIAN_STEP[bits], "biased" not in base
    codes, scale, zero = run_values(v, rotation, bits, group_size=group_size, step=step, unbiased=unbiased)
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
def test_a_basis_and_a_mean_of_each_head_of_values(randn, orthogonal, bits, shape):
    """``y = (v − mean) @ encode``, whoever shares them."""
    v, encode, mean = randn(2, 2, 32, 16), randn(*shape, 16, 16), randn(*shape, 16)
    options = {"group_size": 16, "step": GAUSSIAN_STEP[bits]}
    got = run_values(v, encode, bits, mean=mean, **options)
    want = run_values((v - mean.unsqueeze(-2)) @ encode, torch.eye(16), bits, **options)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_feedback_codes_the_encoded_row_of_values(randn, bits, unbiased):
    """With a metric: the codes of feedback_codes, and their step as a part of the scale."""
    v, encode, mean = randn(2, 2, 32, 32), randn(1, 2, 32, 32), randn(1, 2, 32)
    metric, step = encode.mT @ encode, GAUSSIAN_STEP[bits]
    y = (v - mean.unsqueeze(-2)) @ encode
    want, sigma = feedback_codes(y, metric, torch.full((1, 1, 32), step), bits, unbiased=unbiased)
    options = {"group_size": 32, "mean": mean, "step": step, "unbiased": unbiased}
    codes, scale, zero = run_values(v, encode, bits, metric=metric, **options)
    assert torch.equal(codes, want) and zero is None
    assert torch.equal(scale[..., 0], (sigma.double() * step).half())

    def form(x, y):
        return ((x @ metric) * y).sum(-1)

    def y_hat(codes, scale):
        return scale.double() * (codes - (2**bits - 1) / 2)

    kept = form(y, y_hat(codes, scale)) / form(y, y)
    assert unbiased == bool((kept - 1).abs().max() <= 2.0**-9)
    off, nearest = (y - y_hat(*c) for c in ((codes, scale), run_values(v, encode, bits, **options)[:2]))
    assert form(off, off).sum() < 0.8 * form(nearest, nearest).sum()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_unbiased_scale_of_values(randn, orthogonal, bits):
    v, rotation = randn(1, 2, 64, 64), orthogonal(64)
    y = (v @ rotation).unflatten(-1, (-1, 32))

    def gain(unbiased):
        options = {"group_size": 32, "step": GAUSSIAN_STEP[bits], "unbiased": unbiased}
        codes, scale, _ = run_values(v, rotation, bits, **options)
        y_hat = scale.double()[..., None] * (codes.unflatten(-1, (-1, 32)) - (2**bits - 1) / 2)
        return (y * y_hat).sum(-1) / y.square().sum(-1)

    assert (gain(True) - 1).abs().max() <= 2.0**-11
    assert (gain(False) - 1).abs().max() > 2.0**-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("step", [0.0, GAUSSIAN_STEP[2]])
def test_low_precision_values_are_coded_in_fp32_of_values(randn, orthogonal, step, dtype):
    v, rotation = randn(1, 2, 32, 64, dtype=dtype), orthogonal(64).float()
    narrow, wide = (run_values(x, rotation, 2, group_size=64, step=step) for x in (v, v.float()))
    assert all(torch.equal(a, b) if a is not None else b is None for a, b in zip(narrow, wide, strict=True))


def decoded_values(codes, bits, scale, zero):
    """``zero + σ·c``, of groups of coordinates."""
    groups, sigma = codes.double().unflatten(-1, (scale.shape[-1], -1)), scale.double()[..., None]
    low = -sigma * (2**bits - 1) / 2 if zero is None else zero.double()[..., None]
    return (groups * sigma + low).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-6, 1.0, 6e4])
@pytest.mark.parametrize("step", [0.0, GAUSSIAN_STEP[4]], ids=["affine", "symmetric"])
@pytest.mark.parametrize("shape", ["constant", "random"])
def test_extreme_rows_of_values(randn, shape, step, size, dtype):
    v = torch.ones(1, 2, 16, 64) if shape == "constant" else randn(1, 2, 16, 64).clamp(-1, 1)
    v = (v * size).to(dtype)
    codes, scale, zero = run_values(v, torch.eye(64), 4, group_size=64, step=step)
    assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
    assert zero is None or bool(torch.isfinite(zero).all())
    error = (decoded_values(codes, 4, scale, zero) - v.double()).norm(dim=-1)
    assert bool((error <= 0.2 * v.double().norm(dim=-1) + 1e-5).all())


def test_a_rotation_may_carry_a_row_past_fp16_of_values():
    v = torch.full((1, 1, 16, 64), -6e4)
    codes, scale, zero = run_values(v, rotation_matrix(64), 2, group_size=64)
    assert bool(torch.isfinite(decoded_values(codes, 2, scale, zero)).all())
