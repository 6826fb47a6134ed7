"""Rounding: the levels of codes, and scales as the fp16 that is stored."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor


def unbiased_scale(scale: Tensor, y: Tensor, y_hat: Tensor) -> Tensor:
    """The scale that makes ``⟨y, ŷ⟩ = ‖y‖²``: nearest levels shrink a token, and shrinkage does not average out."""
    return scale_by_gain(scale, y.square().sum(-1, keepdim=True), (y * y_hat).sum(-1, keepdim=True))


def scale_by_gain(scale: Tensor, wanted: Tensor, got: Tensor) -> Tensor:
    """``scale · wanted / got`` as stored; ``scale`` itself where that is not positive."""
    gain = wanted / got.clamp(min=1e-30)
    return half(scale * torch.where(gain > 0, gain, torch.ones_like(gain)))


def half(x: Tensor) -> Tensor:
    """Round to the fp16 that is stored, never to zero: an all-equal token still divides."""
    return x.clamp(min=2.0**-24, max=65504.0).half().to(x.dtype)


def half_signed(x: Tensor) -> Tensor:
    """Round to the fp16 that is stored, never to an infinity: a rotation can carry a large token past fp16."""
    return x.clamp(min=-65504.0, max=65504.0).half().to(x.dtype)


def highest_codes(bits: Sequence[int], like: Tensor) -> Tensor:
    """``2^b − 1`` of each coordinate in the dtype of ``like``, made on its device: nothing is copied there."""
    return torch.cat([like.new_full((len(list(run)),), 2.0**b - 1) for b, run in groupby(bits)])
