"""Writing a value row: a rotation, then per-token groups of small integers with a scale and, optionally, a zero."""

import torch
from torch import Tensor

from headq_ao.ops.encode_keys.reference import half, half_signed, unbiased_scale
from headq_ao.ops.layout import pack_values


def encode_values(v: Tensor, rotation: Tensor, bits: int, group_size: int, step: float, unbiased: bool) -> list[Tensor]:
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    y = (v.to(dtype) @ rotation.to(dtype)).unflatten(-1, (-1, group_size))  # [B, Hkv, T, D/g, g]
    top = 2**bits - 1
    if not step:  # affine: min-max
        low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
        scale, zero = half((high - low) / top), half_signed(low)
        codes, rows = ((y - zero) / scale).round().clamp(0, top), [zero]
    else:  # symmetric, steps in units of the group's RMS
        scale, rows = half(y.square().mean(-1, keepdim=True).sqrt() * step), []
        codes = (y / scale + top / 2).round().clamp(0, top)
        if unbiased:
            scale = unbiased_scale(scale, y, scale * (codes - top / 2))
    return pack_values(codes.flatten(-2).to(torch.uint8), bits) + [x.squeeze(-1).half() for x in (scale, *rows)]
