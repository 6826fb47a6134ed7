"""``feedback_codes``: integer codes of tokens whose error is measured by a quadratic form."""

import torch
from torch import Tensor

from headq_ao.ops.dispatch import direct, kernels
from headq_ao.ops.error_feedback import reference
from headq_ao.ops.error_feedback.reference import KEPT, PASSES, SPREADS
from headq_ao.ops.layout import PIECES
from headq_ao.ops.rounding import SCALE_BITS


def feedback_codes(
    y: Tensor,
    hessian: Tensor,
    step: Tensor,
    bits: int,
    *,
    ldl: Tensor | None = None,
    unbiased: bool = True,
    scale_bits: int = 16,
) -> tuple[Tensor, Tensor]:
    """Codes ``c`` and scale ``σ`` of tokens, for a small ``(y − ŷ)ᵀ H (y − ŷ)``, ``ŷ_i = σ · step_i · (c_i − c0)``.

    ``c0 = (2^b − 1)/2``. Rounding each coordinate to its nearest level minimizes ``‖y − ŷ‖²``; what attention sees of
    a key's error is ``E[(q·e)²] = eᵀ C_q e``. With ``H = N D Nᵀ``, ``N`` unit upper triangular,
    ``eᵀ H e = Σ_i D_i (e_i + Σ_{j<i} N_ji e_j)²``: coordinates are rounded in order, each to
    ``y_i + Σ_{j<i} N_ji e_j``, so that it makes up for the errors before it (as GPTQ, arXiv 2210.17323, does for
    weights; Babai's nearest plane), at eight scales around the token's RMS. At the two scales of the least error every
    code is then moved by coordinate descent, twice, and the better is kept. No bit is added and a reader need not know
    ``H``.

    Args:
        y: tokens ``[B, H, T, M]``, any float dtype.
        hessian: symmetric, positive semidefinite ``[B or 1, H or 1, M, M]``; its scale does not matter.
        step: ``[B or 1, H or 1, M]``, level distance in units of σ.
        bits: of every coordinate, 1 to 6 or 8.
        ldl: ``N`` and ``D``, :func:`headq_ao.ops.ldl_factor` of ``hessian``, where the caller has it.
        unbiased: store the σ that makes ``yᵀ H ŷ = yᵀ H y``.
        scale_bits: that σ is rounded to, 16 (fp16) or 8 (:mod:`headq_ao.ops.rounding`: 1/16 to 15.75).

    Returns:
        Codes ``[B, H, T, M]`` uint8 and σ ``[B, H, T]`` fp16.

    Raises:
        ValueError: when shapes or bits do not fit each other.

    Example:
        >>> import torch
        >>> from headq_ao.ops import feedback_codes
        >>> y, seen = torch.randn(1, 1, 32, 16), torch.full((1, 1, 16, 16), 0.9) + 0.1 * torch.eye(16)
        >>> codes, scale = feedback_codes(y, seen, torch.ones(1, 1, 16), 2, unbiased=False)
        >>> error = y - scale.float()[..., None] * (codes.float() - 1.5)
        >>> bool(error.sum(-1).square().mean() < 0.1 * error.square().sum(-1).mean())  # what is seen of it
        True
    """
    m = y.shape[-1]
    if bits not in PIECES:
        raise ValueError(f"bits must be one of {sorted(PIECES)}, got {bits}")
    if scale_bits not in SCALE_BITS:
        raise ValueError(f"scale_bits must be one of {SCALE_BITS}, got {scale_bits}")
    if hessian.ndim != 4 or hessian.shape[-2:] != (m, m):
        raise ValueError(f"hessian must be [B or 1, H or 1, {m}, {m}] for tokens of {m}, got {tuple(hessian.shape)}")
    if step.ndim != 3 or step.shape[-1] != m:
        raise ValueError(f"step must be [B or 1, H or 1, {m}] for tokens of {m}, got {tuple(step.shape)}")
    if ldl is None:
        ldl = reference.ldl_factor(hessian)
    elif ldl.shape != hessian.shape:
        raise ValueError(f"ldl must be of hessian's shape {tuple(hessian.shape)}, got {tuple(ldl.shape)}")
    run = _feedback_codes if direct(y) else _operator
    return run(y, hessian, ldl, step, bits, unbiased, scale_bits)


def _feedback_codes(
    y: Tensor, hessian: Tensor, ldl: Tensor, step: Tensor, bits: int, unbiased: bool, scale_bits: int
) -> tuple[Tensor, Tensor]:
    """By the device's kernel where it serves, else by the reference."""
    module = kernels("feedback_codes", y.device.type)
    made: tuple[Tensor, Tensor] | None = None
    if module is not None:
        made = module.launch(y, hessian, ldl, step, bits, unbiased, scale_bits)
    if made is None:
        return reference.feedback_codes(y, hessian, ldl, step, bits, SPREADS, KEPT, PASSES, unbiased, scale_bits)
    return made


_operator = torch.library.custom_op("headq::feedback_codes", _feedback_codes, mutates_args=())


@_operator.register_fake
def _(
    y: Tensor, hessian: Tensor, ldl: Tensor, step: Tensor, bits: int, unbiased: bool, scale_bits: int
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape, dtype=torch.uint8), y.new_empty(y.shape[:-1], dtype=torch.float16)
