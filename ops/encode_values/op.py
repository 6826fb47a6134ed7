"""``encode_values``: exact value rows to packed value rows."""

import torch
from torch import Tensor

from headq_ao.ops.cpu_build import direct
from headq_ao.ops.encode_values import reference
from headq_ao.ops.feedback.op import feedback_codes
from headq_ao.ops.layout import CHANNEL_TILE, PIECES, granule, value_plane_shapes


def encode_values(
    v: Tensor,
    encode: Tensor,
    bits: int,
    *,
    group_size: int,
    mean: Tensor | None = None,
    metric: Tensor | None = None,
    factor: Tensor | None = None,
    step: float = 0.0,
    unbiased: bool = True,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Code values per token in another basis: ``y = (v − mean) @ encode``, ``ŷ = zero + scale · c``.

    With ``step == 0`` the group is affine (min-max, a stored zero); with ``step > 0`` it is symmetric,
    codes are taken at ``scale = step · rms(y)`` and ``zero = −scale·(2^b − 1)/2`` is not stored. With ``metric`` codes
    and scale are those of :func:`headq_ao.ops.feedback_codes`, which keep ``(y − ŷ)ᵀ M (y − ŷ)`` small.
    Rotation before quantization: QuaRot, arXiv 2404.00456; per-token values: KIVI, arXiv 2402.02750.

    Args:
        v: exact values ``[B, Hkv, T, D]``, ``D`` a multiple of 16, ``T`` of 16 (2 bits), 8 (4 bits) or 32 (odd bits).
        encode: ``[D, D]`` or ``[B or 1, Hkv or 1, D, D]``; the reader applies its inverse once to the output.
        bits: 1 to 8 bits per coordinate.
        group_size: coordinates that share a scale; divides ``D``.
        mean: the value gauge ``[B or 1, Hkv, D]`` (``Σ a_j = 1``: the reader adds it once), or None.
        metric: ``[B or 1, Hkv, D, D]``, how an error of ``y`` is seen; needs ``step`` and one group.
        factor: :func:`headq_ao.ops.unit_factor` of ``metric``, where the caller has it.
        step: level distance in units of the group's RMS, 0 for min-max.
        unbiased: store the scale that makes ``⟨y, ŷ⟩ = ‖y‖²``, or with ``metric`` ``yᵀ M ŷ = yᵀ M y`` (symmetric
            groups only).

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
    d = v.shape[-1]
    for name, x, shape in (("encode", encode, (d, d)), ("mean", mean, (d,)), ("metric", metric, (d, d))):
        if x is not None and x.shape[-len(shape) :] != shape:
            raise ValueError(f"{name} must end in {shape} for values of {d}, got {tuple(x.shape)}")
    if metric is not None and (not step or group_size != d):
        raise ValueError("error feedback (metric) needs a symmetric code (step > 0) and one scale per row")
    if v.shape[-1] % group_size:
        raise ValueError(f"group_size must divide head_dim {v.shape[-1]}, got {group_size}")
    run = _with_kernels if direct(v) else _encode_values
    out = run(v, encode, mean, metric, factor, bits, group_size, float(step), unbiased)
    return (out[:-1], out[-1], None) if step else (out[:-2], out[-2], out[-1])


def _with_kernels(
    v: Tensor,
    encode: Tensor,
    mean: Tensor | None,
    metric: Tensor | None,
    factor: Tensor | None,
    bits: int,
    group_size: int,
    step: float,
    unbiased: bool,
) -> list[Tensor]:
    """The reference, but for the codes of error feedback, which have kernels."""
    return reference.encode_values(v, encode, mean, metric, factor, bits, group_size, step, unbiased, feedback_codes)


_encode_values = torch.library.custom_op("headq::encode_values", _with_kernels, mutates_args=())


@_encode_values.register_fake
def _(v, encode, mean, metric, factor, bits, group_size, step, unbiased):
    rows = v.shape[:-1]
    planes = [v.new_empty((*rows[:2], *s), dtype=torch.uint8) for s in value_plane_shapes(bits, rows[2], v.shape[-1])]
    groups = (*rows, v.shape[-1] // group_size)
    return planes + [v.new_empty(groups, dtype=torch.float16) for _ in range(1 if step else 2)]
