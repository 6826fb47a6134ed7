"""Writing a key row, as the paper reads: a base code, its actual error, and a low-rank code of that error."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headq_ao.ops.layout import pack_keys


def encode_keys(
    k: Tensor,
    mean: Tensor,
    encode: Tensor,
    read: Tensor,
    step: Tensor,
    weight: Tensor | None,
    side_encode: Tensor | None,
    side_step: Tensor | None,
    bits: Sequence[int],
    shrink: Sequence[float],
) -> list[Tensor]:
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    k, mean, encode, read, step = (x.to(dtype) for x in (k, mean, encode, read, step))
    base_bits, side_bits = bits[: read.shape[-1]], bits[read.shape[-1] :]
    y = (k - mean.unsqueeze(-2)) @ encode  # [B, Hkv, T, M0]
    top = torch.tensor([2**b - 1 for b in base_bits], dtype=dtype, device=k.device)

    def base(factor: float) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Scale, zero, codes and reconstruction of y when its range is shrunk by ``factor``."""
        if weight is None:  # affine: min-max around the row's middle
            low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
            scale = _half((high - low) * (factor / top[0].item()), dtype)
            zero = ((high + low) / 2 - (high - low) * (factor / 2)).half().to(dtype)
            codes = ((y - zero) / scale).round().clamp(min=zero.new_zeros(()), max=top)
            return scale, zero, codes, zero + scale * codes
        scale = _half((y.square() * weight.to(dtype).unsqueeze(-2)).mean(-1, keepdim=True).sqrt() * factor, dtype)
        width = scale * step.unsqueeze(-2)
        codes = (y / width + top / 2).round().clamp(min=top.new_zeros(()), max=top)
        return scale, None, codes, width * (codes - top / 2)

    scale, zero, codes, y_hat = base(shrink[0])
    for factor in shrink[1:]:
        other = base(factor)
        better = (y - other[3]).square().sum(-1, keepdim=True) < (y - y_hat).square().sum(-1, keepdim=True)
        scale, codes, y_hat = (torch.where(better, o, c) for o, c in zip(other[::2] + other[3:], (scale, codes, y_hat), strict=True))
        zero = None if zero is None else torch.where(better, other[1], zero)

    if side_encode is not None and side_step is not None:
        k_err = k - mean.unsqueeze(-2) - y_hat @ read.transpose(-1, -2)
        z = k_err @ side_encode.to(dtype)  # [B, Hkv, T, R]
        side_top = torch.tensor([2**b - 1 for b in side_bits], dtype=dtype, device=k.device)
        z = (z / (scale * side_step.to(dtype).unsqueeze(-2)) + side_top / 2).round()
        codes = torch.cat([codes, z.clamp(min=z.new_zeros(()), max=side_top)], -1)
    rows = [scale.squeeze(-1).half()] + ([] if zero is None else [zero.squeeze(-1).half()])
    return pack_keys(codes.to(torch.uint8), bits) + rows


def _half(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the fp16 that is stored, never to zero: an all-equal row still divides."""
    return x.clamp(min=2.0**-24, max=65504.0).half().to(dtype)
