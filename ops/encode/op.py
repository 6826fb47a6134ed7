"""``quantize``: tokens of keys or values to integer codes with scales."""

import torch
from torch import Tensor

from headq_ao.ops.dispatch import direct
from headq_ao.ops.encode import reference
from headq_ao.ops.encode.types import Encoder
from headq_ao.ops.error_feedback.op import feedback_codes


def quantize(x: Tensor, encoder: Encoder) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zeros of tokens, each for itself: the same whether they come at once or one by one.

    Args:
        x: tokens ``[B, h, n, D]``, any float dtype.
        encoder: of their head group.

    Returns:
        Codes ``[B, h, n, M]`` uint8, scale ``[B, h, n, groups]`` fp16 and the zero alike or None.

    Raises:
        ValueError: when shapes do not fit each other.

    Example:
        >>> import torch
        >>> from headq_ao.ops import Encoder, quantize
        >>> encoder = Encoder(torch.eye(16)[None, None], (2,), step=0.9957)
        >>> codes, scale, zero = quantize(torch.randn(1, 2, 5, 16), encoder)
        >>> tuple(codes.shape), tuple(scale.shape), zero is None
        ((1, 2, 5, 16), (1, 2, 5, 1), True)
    """
    if x.ndim != 4 or x.shape[-1] != encoder.encode.shape[-2]:
        raise ValueError(f"x must be [B, h, n, {encoder.encode.shape[-2]}] for this encoder, got {tuple(x.shape)}")
    if direct(x):
        return reference.quantize(x, encoder, _with_kernels)
    tensors, spec = encoder.flat
    codes, scale, *zero = _quantize(x, tensors, spec)
    return codes, scale, zero[0] if zero else None


def _with_kernels(
    y: Tensor, hessian: Tensor, ldl: Tensor, step: Tensor, bits: int, unbiased: bool, scale_bits: int
) -> tuple[Tensor, Tensor]:
    return feedback_codes(y, hessian, step, bits, ldl=ldl, unbiased=unbiased, scale_bits=scale_bits)


@torch.library.custom_op("headq::quantize", mutates_args=())
def _quantize(x: Tensor, encoder: list[Tensor], spec: str) -> list[Tensor]:
    found = reference.quantize(x, Encoder.of_flat(encoder, spec), _with_kernels)
    return [t for t in found if t is not None]


@_quantize.register_fake
def _(x: Tensor, encoder: list[Tensor], spec: str) -> list[Tensor]:
    names, _, step, group_size, *_ = spec.split(",")
    given = dict(zip(names.split("+"), encoder, strict=True))
    base = given["encode"].shape[-1]
    stored = base + (given["side_encode"].shape[-1] if "side_encode" in given else 0)
    groups = (*x.shape[:-1], base // int(group_size) if int(group_size) else 1)
    affine = not step and "step" not in given
    numbers = [x.new_empty(groups, dtype=torch.float16) for _ in range(1 + affine)]
    return [x.new_empty((*x.shape[:-1], stored), dtype=torch.uint8), *numbers]
