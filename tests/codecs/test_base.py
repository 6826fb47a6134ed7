"""Codecs of keys and values: a score of codes is a score of the dequantized key, and so for values."""

import dataclasses

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from headq_ao.codecs.base import GAUSSIAN_STEP, KeyCodec
from tests.codecs.states import AFFINE, CODECS, integer_scores, mapped, randn


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


@pytest.mark.parametrize("head_dim", [16, 64, 80])
@pytest.mark.parametrize("options", CODECS.values(), ids=CODECS)
def test_integer_scores_are_scores_of_dequantized_keys(packed, options, head_dim):
    codec, q, _, (codes, scale, zero) = packed(head_dim, **options)
    scores = integer_scores(mapped(codec, q, 0.125), codes, scale, zero)
    k_hat = codec.dequantize(codes, scale, zero).double().repeat_interleave(3, 1)
    torch.testing.assert_close(scores, 0.125 * q @ k_hat.mT, rtol=0, atol=1e-4)  # dequantize is fp32


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
    assert set(in_unit).union(*wanted.values()) == names - {
        "bits", "symmetric", "head_bits", "byte_scales", "own", "mapped", "parts",
    }  # fmt: skip


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


VALUES = {
    "whitened": {},
    "whitened, no whitening": {"whitening": 0.0},
    "whitened, nearest": {"error_feedback": False},
    "whitened, no rotation": {"rotation": False},
    "affine": {"value_codec": "affine"},
    "affine, zero": {"value_codec": "affine", "v_zero_point": True, "v_group_size": 16},
}


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
