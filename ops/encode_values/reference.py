"""Writing a value row: a basis, then per-token groups of small integers with a scale and, optionally, a zero."""

from collections.abc import Callable

import torch
from torch import Tensor

from headq_ao.ops.feedback.reference import plain_codes
from headq_ao.ops.layout import pack_values
from headq_ao.ops.rounding import half, half_signed, unbiased_scale


def encode_values(
    v: Tensor,
    encode: Tensor,
    mean: Tensor | None,
    metric: Tensor | None,
    factor: Tensor | None,
    bits: int,
    group_size: int,
    step: float,
    unbiased: bool,
    feedback_codes: Callable[..., tuple[Tensor, Tensor]] = plain_codes,
) -> list[Tensor]:
    """``feedback_codes``: codes and scales with error feedback; the operator gives the one that has kernels."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    v = v.to(dtype) if mean is None else v.to(dtype) - mean.to(dtype).unsqueeze(-2)
    y = (v @ encode.to(dtype)).unflatten(-1, (-1, group_size))  # [B, Hkv, T, D/g, g]
    top, rows = 2**bits - 1, []
    if metric is not None:  # symmetric, rounded with error feedback
        codes, scale = feedback_codes(
            y.flatten(-2), metric, y.new_full((1, 1, group_size), step), bits, factor=factor, unbiased=unbiased
        )
        # a value row is read as scale · (c − c0): its step is part of the scale
        scale, codes = half(scale.to(dtype) * step)[..., None, None], codes.unflatten(-1, (-1, group_size))
    elif not step:  # affine: min-max
        low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
        scale, zero = half((high - low) / top), half_signed(low)
        codes, rows = ((y - zero) / scale).round().clamp(0, top), [zero]
    else:  # symmetric, steps in units of the group's RMS
        scale = half(y.square().mean(-1, keepdim=True).sqrt() * step)
        codes = (y / scale + top / 2).round().clamp(0, top)
        if unbiased:
            scale = unbiased_scale(scale, y, scale * (codes - top / 2))
    return pack_values(codes.flatten(-2).to(torch.uint8), bits) + [x.squeeze(-1).half() for x in (scale, *rows)]
