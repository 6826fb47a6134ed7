"""Writing a value row: a rotation, then per-token groups of small integers with a scale and, optionally, a zero."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headq_ao.ops.layout import pack_values


def encode_values(v: Tensor, rotation: Tensor, bits: int, group_size: int, step: float, shrink: Sequence[float]) -> list[Tensor]:
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    y = (v.to(dtype) @ rotation.to(dtype)).unflatten(-1, (-1, group_size))  # [B, Hkv, T, D/g, g]
    top = 2**bits - 1
    if step:  # symmetric: levels (c − top/2)·scale around zero, scale in units of the group's RMS
        middle, full = torch.zeros_like(y[..., :1]), y.square().mean(-1, keepdim=True).sqrt() * (step * top)
    else:  # affine: min-max
        low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
        middle, full = (high + low) / 2, high - low

    best: tuple[Tensor, ...] | None = None
    for factor in shrink:
        scale = (full * (factor / top)).clamp(min=2.0**-24, max=65504.0).half().to(dtype)
        zero = -scale * top / 2 if step else (middle - full * (factor / 2)).half().to(dtype)
        codes = ((y - zero) / scale).round().clamp(0, top)
        err = (y - zero - scale * codes).square().sum(-1, keepdim=True)
        new = (err, scale, zero, codes)
        best = new if best is None else tuple(torch.where(err < best[0], n, b) for n, b in zip(new, best, strict=True))
    assert best is not None
    _, scale, zero, codes = best
    rows = [scale.squeeze(-1).half()] + ([] if step else [zero.squeeze(-1).half()])
    return pack_values(codes.flatten(-2).to(torch.uint8), bits) + rows
