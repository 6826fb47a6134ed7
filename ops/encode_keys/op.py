"""``encode_keys``: exact key rows to packed key rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headq_ao.ops.cpu_build import direct
from headq_ao.ops.encode_keys import reference
from headq_ao.ops.feedback.op import feedback_codes
from headq_ao.ops.layout import PIECES, TOKEN_TILE, key_plane_shapes


def encode_keys(
    k: Tensor,
    mean: Tensor,
    encode: Tensor,
    read: Tensor,
    step: Tensor,
    bits: Sequence[int],
    *,
    weight: Tensor | None = None,
    metric: Tensor | None = None,
    factor: Tensor | None = None,
    side_encode: Tensor | None = None,
    side_step: Tensor | None = None,
    unbiased: bool = True,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Code keys in a base and their actual error in a side code (the HeadQ write path).

    ``y = (k − mean) @ encode``; the base codes ``y``; ``k_err = k − mean − ŷ @ readᵀ``; the side code is
    ``z = round(k_err @ side_encode / (σ · side_step))``, with ``σ`` the row's scale.
    Without ``weight`` the base is affine (``ŷ = zero + σ·c``, min-max); with it, symmetric around zero:
    ``σ = sqrt(mean(weight · y²))``, ``ŷ_i = σ · step_i · (c_i − (2^b − 1)/2)``, each code the nearest one, or with
    ``metric`` those of :func:`headq_ao.ops.feedback_codes`, which keep ``(y − ŷ)ᵀ M (y − ŷ)`` small.
    Source of the construction: HeadQ, arXiv 2605.03562 (withdrawn by its author).

    Args:
        k: exact keys ``[B, Hkv, T, D]``, ``T`` a multiple of 16, any float dtype.
        mean: the key gauge ``[B or 1, Hkv, D]``.
        encode, read: ``[B or 1, Hkv or 1, D, M0]``; ``(q @ read)·ŷ + q·mean`` is the base score.
        step: ``[B or 1, Hkv or 1, M0]``, in units of σ (ones for the affine base).
        bits: bits of the M0 base coordinates, then of the R side coordinates.
        weight: ``[B or 1, Hkv, M0]``, inverse variances; its presence selects the symmetric base.
        metric: ``[B or 1, Hkv, M0, M0]``, how an error of ``y`` is seen, ``readᵀ C_q read``; symmetric base only.
        factor: :func:`headq_ao.ops.unit_factor` of ``metric``, where the caller has it.
        side_encode, side_step: ``[B or 1, Hkv, D, R]``, ``[B or 1, Hkv, R]``.
        unbiased: store the σ that makes ``⟨y, ŷ⟩ = ‖y‖²`` (symmetric base only).

    Returns:
        Key planes (see :mod:`headq_ao.ops.layout`), σ ``[B, Hkv, T]`` fp16, and the zero ``[B, Hkv, T]`` fp16 or None.

    Raises:
        ValueError: when shapes or bits do not fit each other.

    Example:
        >>> import torch
        >>> from headq_ao.ops import encode_keys
        >>> k, eye = torch.randn(1, 2, 32, 16), torch.eye(16)[None, None]
        >>> planes, scale, zero = encode_keys(k, torch.zeros(1, 2, 16), eye, eye, torch.ones(1, 1, 16), [2] * 16)
        >>> planes[0].shape, scale.dtype
        (torch.Size([1, 2, 2, 1, 16, 4]), torch.float16)
    """
    if k.ndim != 4 or k.shape[-2] % TOKEN_TILE:
        raise ValueError(
            f"k must be [B, Hkv, T, D] with T a multiple of {TOKEN_TILE}, got {tuple(k.shape)}; pass whole blocks"
        )
    base, side = read.shape[-1], 0 if side_encode is None else side_encode.shape[-1]
    if len(bits) != base + side:
        raise ValueError(f"bits must list {base} base and {side} side coordinates, got {len(bits)}")
    if not PIECES.keys() >= set(bits):
        raise ValueError(f"bits must be of {sorted(PIECES)}, got {sorted(set(bits) - PIECES.keys())}")
    if weight is None and len(set(bits[:base])) != 1:
        raise ValueError(f"the affine base needs one bit width for all coordinates, got {sorted(set(bits[:base]))}")
    if metric is not None and (weight is None or len(set(bits[:base])) != 1):
        raise ValueError(
            "error feedback (metric) needs the symmetric base (weight) and one bit width for its coordinates"
        )
    if (side_encode is None) != (side_step is None):
        raise ValueError("side_encode and side_step must be given together")
    head_dim = k.shape[-1]
    trailing = {
        "mean": (mean, (head_dim,)),
        "encode": (encode, (head_dim, base)),
        "read": (read, (head_dim, base)),
        "step": (step, (base,)),
        "weight": (weight, (base,)),
        "metric": (metric, (base, base)),
        "side_encode": (side_encode, (head_dim, side)),
        "side_step": (side_step, (side,)),
    }
    for name, (x, shape) in trailing.items():
        if x is not None and x.shape[-len(shape) :] != shape:
            raise ValueError(f"{name} must end in {shape} for keys of {head_dim}, got {tuple(x.shape)}")
    run = _with_kernels if direct(k) else _encode_keys
    out = run(k, mean, encode, read, step, weight, metric, factor, side_encode, side_step, list(bits), unbiased)
    if weight is None:
        return out[:-2], out[-2], out[-1]
    return out[:-1], out[-1], None


def _with_kernels(
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
    bits: list[int],
    unbiased: bool,
) -> list[Tensor]:
    """The reference, but for the codes of error feedback, which have kernels."""
    return reference.encode_keys(
        k, mean, encode, read, step, weight, metric, factor, side_encode, side_step, bits, unbiased, feedback_codes
    )


_encode_keys = torch.library.custom_op("headq::encode_keys", _with_kernels, mutates_args=())


@_encode_keys.register_fake
def _(k, mean, encode, read, step, weight, metric, factor, side_encode, side_step, bits, unbiased):
    rows = k.shape[:-1]
    planes = [k.new_empty((*rows[:2], *s), dtype=torch.uint8) for s in key_plane_shapes(bits, rows[2])]
    return planes + [k.new_empty(rows, dtype=torch.float16) for _ in range(2 if weight is None else 1)]
