"""Quantizing tokens, as the papers read: a linear map, integers with a scale, and a code of the error that is left."""

from collections.abc import Callable

import torch
from torch import Tensor

from headq_ao.ops.encode.types import Encoder
from headq_ao.ops.error_feedback import reference as error_feedback
from headq_ao.ops.error_feedback.reference import KEPT, PASSES, SPREADS
from headq_ao.ops.rounding import half, half_signed, highest_codes, unbiased_scale

# of y, hessian, its LDL factor, step, bits, unbiased, bits of the scale: codes and σ with error feedback
Feedback = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool, int], tuple[Tensor, Tensor]]
Quantized = tuple[Tensor, Tensor, Tensor | None]


def pure_feedback(
    y: Tensor, hessian: Tensor, ldl: Tensor, step: Tensor, bits: int, unbiased: bool, scale_bits: int
) -> tuple[Tensor, Tensor]:
    """:func:`headq_ao.ops.feedback_codes` by its reference, whatever the device."""
    return error_feedback.feedback_codes(y, hessian, ldl, step, bits, SPREADS, KEPT, PASSES, unbiased, scale_bits)


def quantize(x: Tensor, encoder: Encoder, feedback: Feedback = pure_feedback) -> Quantized:
    """:func:`headq_ao.ops.quantize`; the operator gives a ``feedback`` that has kernels."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = centred(x.to(wide), encoder)
    y = product(x, encoder.encode.to(wide))  # [B, h, n, M0]
    if encoder.hessian is not None:
        codes, scale, zero = with_error_feedback(y, encoder, feedback)
    elif encoder.step is None:
        codes, scale, zero = affine(y, encoder)
    else:
        codes, scale, zero = nearest(y, encoder)
    if encoder.side_encode is not None:
        codes = torch.cat([codes, side_code(x, codes, scale, zero, encoder)], -1)
    return codes.to(torch.uint8), scale.half(), None if zero is None else zero.half()


def centred(x: Tensor, encoder: Encoder) -> Tensor:
    """``x / unit − mean``."""
    if encoder.unit is not None:
        x = x / encoder.unit.to(x.dtype).unsqueeze(-2)
    return x if encoder.mean is None else x - encoder.mean.to(x.dtype).unsqueeze(-2)


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix``, of one token as of several: matrix libraries sum a single row in another order, and its codes
    must not depend on how many come at once."""
    return (x.expand(-1, -1, 2, -1) @ matrix)[:, :, :1] if x.shape[-2] == 1 else x @ matrix


def highest_code(encoder: Encoder, like: Tensor) -> Tensor:
    """``2^b − 1`` of each base coordinate, or of all."""
    return highest_codes(encoder.bits[: encoder.encode.shape[-1]], like)


def with_error_feedback(y: Tensor, encoder: Encoder, feedback: Feedback) -> Quantized:
    """Codes that keep ``(y − ŷ)ᵀ H (y − ŷ)`` small."""
    assert encoder.hessian is not None and encoder.factor is not None and encoder.step is not None
    number = None if isinstance(encoder.step, Tensor) else encoder.step
    step = encoder.step if isinstance(encoder.step, Tensor) else y.new_full((1, 1, y.shape[-1]), encoder.step)
    codes, scale = feedback(
        y, encoder.hessian, encoder.factor, step, encoder.bits[0], encoder.unbiased, encoder.scale_bits
    )
    scale = scale.to(y.dtype).unsqueeze(-1)
    return codes.to(y.dtype), scale if number is None else half(scale * number), None


def affine(y: Tensor, encoder: Encoder) -> Quantized:
    """Between the least and the largest coordinate of each group."""
    y, highest = y.unflatten(-1, (encoder.groups(y.shape[-1]), -1)), highest_code(encoder, y)[0]
    low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    scale, zero = half((high - low) / highest), half_signed(low)
    codes = ((y - zero) / scale).round().clamp(zero.new_zeros(()), highest)
    return codes.flatten(-2), scale.squeeze(-1), zero.squeeze(-1)


def nearest(y: Tensor, encoder: Encoder) -> Quantized:
    """The nearest levels around zero, in units of the group's RMS."""
    assert encoder.step is not None
    groups = encoder.groups(y.shape[-1])
    highest = highest_code(encoder, y).expand(y.shape[-1]).unflatten(0, (groups, -1))
    y = y.unflatten(-1, (groups, -1))  # [B, h, n, groups, M0 / groups]
    rms = y.square().mean(-1, keepdim=True).sqrt()
    if isinstance(encoder.step, Tensor):
        scale = half(rms)
        delta = scale * encoder.step.to(y.dtype).unsqueeze(-2).unflatten(-1, (groups, -1))
    else:
        scale = delta = half(rms * encoder.step)
    codes = (y / delta + highest / 2).round().clamp(scale.new_zeros(()), highest)
    if encoder.unbiased:
        scale = unbiased_scale(scale, y, delta * (codes - highest / 2))
    return codes.flatten(-2), scale.squeeze(-1), None


def side_code(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, encoder: Encoder) -> Tensor:
    """Codes of the error that the base leaves, in units of its scale: ``[B, h, n, R]``."""
    assert encoder.read is not None and encoder.side_encode is not None and encoder.side_step is not None
    y_hat = dequantize(codes, scale, zero, encoder)
    error = x - product(y_hat, encoder.read.to(x.dtype).transpose(-1, -2))
    highest = highest_codes(encoder.bits[encoder.encode.shape[-1] :], x)
    z = product(error, encoder.side_encode.to(x.dtype)) / (scale * encoder.side_step.to(x.dtype).unsqueeze(-2))
    return (z + highest / 2).round().clamp(z.new_zeros(()), highest)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, encoder: Encoder) -> Tensor:
    """``ŷ`` of base codes that share one scale."""
    if zero is not None:
        return zero + scale * codes
    step = encoder.step.to(codes.dtype).unsqueeze(-2) if isinstance(encoder.step, Tensor) else 1.0
    return scale * step * (codes - highest_code(encoder, codes) / 2)
