"""``feedback_codes``: integer codes of rows whose error is measured by a quadratic form."""

import torch
from torch import Tensor

from headq_ao.ops.cpu_build import direct
from headq_ao.ops.feedback import cpu_kernel, reference
from headq_ao.ops.feedback.reference import PASSES, SPREADS
from headq_ao.ops.gpu_build import optional
from headq_ao.ops.layout import PIECES


def feedback_codes(
    y: Tensor, metric: Tensor, step: Tensor, bits: int, *, factor: Tensor | None = None, unbiased: bool = True
) -> tuple[Tensor, Tensor]:
    """Codes ``c`` and scale ``σ`` of rows, for a small ``(y − ŷ)ᵀ M (y − ŷ)`` with ``ŷ_i = σ · step_i · (c_i − c0)``.

    ``c0 = (2^b − 1)/2``. Rounding each coordinate to its nearest level minimizes ``‖y − ŷ‖²``; what attention sees of
    a key's error is ``E[(q·e)²] = eᵀ C_q e``. With ``M = N D Nᵀ``, ``N`` unit upper triangular,
    ``eᵀ M e = Σ_i D_i (e_i + Σ_{j<i} N_ji e_j)²``: coordinates are rounded in order, each to
    ``y_i + Σ_{j<i} N_ji e_j``, so that it makes up for the errors before it (as GPTQ, arXiv 2210.17323, does for
    weights; Babai's nearest plane); then every code is moved by coordinate descent, twice. Five scales around the
    row's RMS are tried and the best is kept. No bit is added and a reader need not know ``M``.

    Args:
        y: rows ``[B, H, T, M]``, any float dtype.
        metric: symmetric, positive semidefinite ``[B or 1, H or 1, M, M]``; its scale does not matter.
        step: ``[B or 1, H or 1, M]``, level distance in units of σ.
        bits: of every coordinate, 1 to 6 or 8.
        factor: ``N``, :func:`headq_ao.ops.unit_factor` of ``metric``, where the caller has it.
        unbiased: store the σ that makes ``yᵀ M ŷ = yᵀ M y``.

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
    if metric.ndim != 4 or metric.shape[-2:] != (m, m):
        raise ValueError(f"metric must be [B or 1, H or 1, {m}, {m}] for rows of {m}, got {tuple(metric.shape)}")
    if step.ndim != 3 or step.shape[-1] != m:
        raise ValueError(f"step must be [B or 1, H or 1, {m}] for rows of {m}, got {tuple(step.shape)}")
    if factor is None:
        factor = reference.unit_factor(metric)
    elif factor.shape != metric.shape:
        raise ValueError(f"factor must be of metric's shape {tuple(metric.shape)}, got {tuple(factor.shape)}")
    run = KERNELS[y.device.type] if direct(y) else _feedback_codes
    return run(y, metric, factor, step, bits, unbiased)


@torch.library.custom_op("headq::feedback_codes", mutates_args=())
def _feedback_codes(
    y: Tensor, metric: Tensor, feedback: Tensor, step: Tensor, bits: int, unbiased: bool
) -> tuple[Tensor, Tensor]:
    return reference.feedback_codes(y, metric, feedback, step, bits, SPREADS, PASSES, unbiased)


@_feedback_codes.register_kernel("cpu")
def _cpu(y: Tensor, metric: Tensor, feedback: Tensor, step: Tensor, bits: int, unbiased: bool) -> tuple[Tensor, Tensor]:
    lib = None if y.dtype == torch.float64 else cpu_kernel.library()
    if lib is None:
        return reference.feedback_codes(y, metric, feedback, step, bits, SPREADS, PASSES, unbiased)
    return cpu_kernel.feedback_codes(lib, y, metric, feedback, step, bits, SPREADS, PASSES, unbiased)


@_feedback_codes.register_kernel("cuda")
def _cuda(
    y: Tensor, metric: Tensor, feedback: Tensor, step: Tensor, bits: int, unbiased: bool
) -> tuple[Tensor, Tensor]:
    """The Triton kernel, on CUDA and HIP; fp64 and a torch without Triton keep to the reference."""
    kernel = None if y.dtype == torch.float64 else optional("feedback.triton_kernel")
    if kernel is None:
        return reference.feedback_codes(y, metric, feedback, step, bits, SPREADS, PASSES, unbiased)
    return kernel.feedback_codes(y, metric, feedback, step, bits, SPREADS, PASSES, unbiased)


KERNELS = {"cpu": _cpu, "cuda": _cuda}  # where nothing is traced, without the dispatcher


@_feedback_codes.register_fake
def _(y, metric, feedback, step, bits, unbiased):
    return y.new_empty(y.shape, dtype=torch.uint8), y.new_empty(y.shape[:-1], dtype=torch.float16)
