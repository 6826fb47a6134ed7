"""Rounding: the levels of codes, and scales as they are stored, in fp16 or in a byte of three exponent and five
mantissa bits.

A scale in a byte is fp16 as well: ``byte · 2^5 + 0x2C00`` are its bits, so that all arithmetic before and after it is
the same. The 256 scales reach from 1/16 to 15.75, in steps of 1/32 to 1/64 of themselves.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

SCALE_BITS = (8, 16)  # that a scale may be stored in
LEAST_SHORT, MOST_SHORT = 2.0**-4, 15.75
_FIRST, _DROPPED = 0x2C00, 5  # fp16 bits of the least scale in a byte; mantissa bits that it does not have


def unbiased_scale(scale: Tensor, y: Tensor, y_hat: Tensor) -> Tensor:
    """The scale that makes ``⟨y, ŷ⟩ = ‖y‖²``: nearest levels shrink a token, and shrinkage does not average out."""
    return scale_by_gain(scale, y.square().sum(-1, keepdim=True), (y * y_hat).sum(-1, keepdim=True))


def scale_by_gain(scale: Tensor, wanted: Tensor, got: Tensor, bits: int = 16) -> Tensor:
    """``scale · wanted / got`` as stored; ``scale`` itself where that is not positive, or is the least that a byte
    holds: codes of a token that is smaller still have no direction that a gain could be of."""
    gain = wanted / got.clamp(min=1e-30)
    usable = gain > 0 if bits == 16 else (gain > 0) & (scale > LEAST_SHORT)
    return stored_scale(scale * torch.where(usable, gain, torch.ones_like(gain)), bits)


def stored_scale(x: Tensor, bits: int) -> Tensor:
    """Round scales to those that can be stored in so many bits, 16 or 8: always positive.

    Example:
        >>> import torch
        >>> from headq_ao.ops.rounding import stored_scale
        >>> stored_scale(torch.tensor([0.0, 1.0, 1.02, 99.0]), 8).tolist()
        [0.0625, 1.0, 1.03125, 15.75]
    """
    if bits == 16:
        return half(x)
    near = x.clamp(min=LEAST_SHORT, max=MOST_SHORT).half().view(torch.int16)
    return ((near + (1 << _DROPPED - 1)) & -(1 << _DROPPED)).view(torch.float16).to(x.dtype)


def scale_to_byte(scale: Tensor) -> Tensor:
    """The byte of each scale, which :func:`stored_scale` has rounded to 8 bits, uint8.

    Example:
        >>> import torch
        >>> from headq_ao.ops.rounding import scale_of_byte, scale_to_byte
        >>> byte = scale_to_byte(torch.tensor([0.0625, 1.0, 1.03125, 15.75]))
        >>> byte.tolist(), scale_of_byte(byte).tolist()
        ([0, 128, 129, 255], [0.0625, 1.0, 1.03125, 15.75])
    """
    return ((scale.half().view(torch.int16) - _FIRST) >> _DROPPED).to(torch.uint8)


def scale_of_byte(byte: Tensor) -> Tensor:
    """:func:`scale_to_byte`, undone: fp16."""
    return ((byte.to(torch.int16) << _DROPPED) + _FIRST).view(torch.float16)


def scale_of(stored: Tensor) -> Tensor:
    """Scales or zeros as numbers, of bytes or of fp16."""
    return scale_of_byte(stored) if stored.dtype == torch.uint8 else stored


def half(x: Tensor) -> Tensor:
    """Round to the fp16 that is stored, never to zero: an all-equal token still divides."""
    return x.clamp(min=2.0**-24, max=65504.0).half().to(x.dtype)


def half_signed(x: Tensor) -> Tensor:
    """Round to the fp16 that is stored, never to an infinity: a rotation can carry a large token past fp16."""
    return x.clamp(min=-65504.0, max=65504.0).half().to(x.dtype)


def highest_codes(bits: Sequence[int], like: Tensor) -> Tensor:
    """``2^b − 1`` of each coordinate in the dtype of ``like``, made on its device: nothing is copied there."""
    return torch.cat([like.new_full((len(list(run)),), 2.0**b - 1) for b, run in groupby(bits)])
