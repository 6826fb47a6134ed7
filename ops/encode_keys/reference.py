"""Writing a key row, as the paper reads: a base code, its actual error, and a low-rank code of that error."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headq_ao.ops.feedback.reference import plain_codes
from headq_ao.ops.layout import pack_keys
from headq_ao.ops.rounding import half, half_signed, unbiased_scale


def encode_keys(
    k: Tensor,
    mean: Tensor,
    encode: Tensor,
    read: Tensor,
    step: Tensor,
    weight: Tensor | None,
    metric: Tensor | None,
    factor: Tensor | None,
    side_encode: Tensor | None,
    side_step: Tensor | None,
    bits: Sequence[int],
    unbiased: bool,
    feedback_codes: Callable[..., tuple[Tensor, Tensor]] = plain_codes,
) -> list[Tensor]:
    """``feedback_codes``: codes and scales with error feedback; the operator gives the one that has kernels."""
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    k, mean, encode, read, step = (x.to(dtype) for x in (k, mean, encode, read, step))
    k = k - mean.unsqueeze(-2)
    y, rows = k @ encode, []  # [B, Hkv, T, M0]
    found = None if metric is None else feedback_codes(y, metric, step, bits[0], factor=factor, unbiased=unbiased)
    if found is not None and side_encode is None:
        return [*pack_keys(found[0], bits), found[1]]
    top = torch.tensor([2**b - 1 for b in bits], dtype=dtype, device=k.device)
    top, side_top = top[: read.shape[-1]], top[read.shape[-1] :]
    if found is not None:  # symmetric, rounded with error feedback
        codes, scale = found[0].to(dtype), found[1].to(dtype).unsqueeze(-1)
        y_hat = scale * step.unsqueeze(-2) * (codes - top / 2)
    elif weight is None:  # affine: min-max
        low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
        scale, zero = half((high - low) / top[0]), half_signed(low)
        codes = ((y - zero) / scale).round().clamp(zero.new_zeros(()), top)
        y_hat, rows = zero + scale * codes, [zero]
    else:  # symmetric around the gauge, nearest levels
        scale = half((y.square() * weight.to(dtype).unsqueeze(-2)).mean(-1, keepdim=True).sqrt())
        width = scale * step.unsqueeze(-2)
        codes = (y / width + top / 2).round().clamp(scale.new_zeros(()), top)
        if unbiased:
            scale = unbiased_scale(scale, y, width * (codes - top / 2))
        y_hat = scale * step.unsqueeze(-2) * (codes - top / 2)
    if side_encode is not None and side_step is not None:
        k_err = k - y_hat @ read.transpose(-1, -2)
        z = k_err @ side_encode.to(dtype) / (scale * side_step.to(dtype).unsqueeze(-2))  # [B, Hkv, T, R]
        codes = torch.cat([codes, (z + side_top / 2).round().clamp(z.new_zeros(()), side_top)], -1)
    return pack_keys(codes.to(torch.uint8), bits) + [x.squeeze(-1).half() for x in (scale, *rows)]
