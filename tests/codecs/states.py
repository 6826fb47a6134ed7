"""Statistics, codecs of them, and scores by hand, for the tests of codecs."""

from types import SimpleNamespace

import torch

from headq_ao.codecs.affine import affine_codec
from headq_ao.codecs.rotation import Rotation
from headq_ao.codecs.side_code import with_side_code
from headq_ao.codecs.whitened import (
    prompt_whitened_codec,
    whitened_codec,
)


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


def some_rotation(head_dim=16):
    """A rotation of pairs ``i, i + D/2``."""
    angle = torch.rand(head_dim // 2).double()
    return Rotation(torch.cat([-angle, angle]), torch.arange(head_dim).roll(head_dim // 2))
