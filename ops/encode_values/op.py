"""``encode_values``: exact value rows to packed value rows."""

import torch
from torch import Tensor

from headq_ao.ops.encode_values import reference
from headq_ao.ops.layout import CHANNEL_TILE, PIECES, granule, value_plane_shapes


def encode_values(
    v: Tensor, rotation: Tensor, bits: int, *, group_size: int, step: float = 0.0, unbiased: bool = True
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Code values per token in a rotated basis: ``y = v @ rotation``, ``ŷ = zero + scale · c``.

    With ``step == 0`` the group is affine (min-max, a stored zero); with ``step > 0`` it is symmetric,
    codes are taken at ``scale = step · rms(y)`` and ``zero = −scale·(2^b − 1)/2`` is not stored.
    Rotation before quantization: QuaRot, arXiv 2404.00456; per-token values: KIVI, arXiv 2402.02750.

    Args:
        v: exact values ``[B, Hkv, T, D]``, ``D`` a multiple of 16, ``T`` of 16 (2 bits), 8 (4 bits) or 32 (odd bits).
        rotation: orthogonal ``[D, D]``; the reader applies its transpose once to the output.
        bits: 1 to 8 bits per coordinate.
        group_size: coordinates that share a scale; divides ``D``.
        step: level distance in units of the group's RMS, 0 for min-max.
        unbiased: store the scale that makes ``⟨y, ŷ⟩ = ‖y‖²`` (symmetric groups only).

    Returns:
        Value planes (see :mod:`headq_ao.ops.layout`), scale ``[B, Hkv, T, D/group_size]`` fp16, and zero or None.

    Raises:
        ValueError: when shapes or bits do not fit each other.

    Example:
        >>> import torch
        >>> from headq_ao.ops import encode_values
        >>> planes, scale, zero = encode_values(torch.randn(1, 2, 32, 64), torch.eye(64), 2, group_size=64)
        >>> planes[0].shape, tuple(scale.shape)
        (torch.Size([1, 2, 2, 4, 16, 4]), (1, 2, 32, 1))
    """
    if bits not in PIECES:
        raise ValueError(f"bits must be one of {sorted(PIECES)}, got {bits}")
    tile = max(granule(w) for w in PIECES[bits])
    if v.ndim != 4 or v.shape[-2] % tile or v.shape[-1] % CHANNEL_TILE:
        raise ValueError(
            f"v must be [B, Hkv, T, D] with T a multiple of {tile} and D of {CHANNEL_TILE}, got {tuple(v.shape)}; "
            "pass whole blocks"
        )
    if rotation.shape != (v.shape[-1], v.shape[-1]):
        raise ValueError(f"rotation must be [D, D] for values of {v.shape[-1]}, got {tuple(rotation.shape)}")
    if v.shape[-1] % group_size:
        raise ValueError(f"group_size must divide head_dim {v.shape[-1]}, got {group_size}")
    out = _encode_values(v, rotation, bits, group_size, float(step), unbiased)
    return (out[:-1], out[-1], None) if step else (out[:-2], out[-2], out[-1])


@torch.library.custom_op("headq::encode_values", mutates_args=())
def _encode_values(
    v: Tensor, rotation: Tensor, bits: int, group_size: int, step: float, unbiased: bool
) -> list[Tensor]:
    return reference.encode_values(v, rotation, bits, group_size, step, unbiased)


@_encode_values.register_fake
def _(v, rotation, bits, group_size, step, unbiased):
    rows = v.shape[:-1]
    planes = [v.new_empty((*rows[:2], *s), dtype=torch.uint8) for s in value_plane_shapes(bits, rows[2], v.shape[-1])]
    groups = (*rows, v.shape[-1] // group_size)
    return planes + [v.new_empty(groups, dtype=torch.float16) for _ in range(1 if step else 2)]
