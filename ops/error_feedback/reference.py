"""Rounding with GPTQ-style error feedback: integer codes whose error is small in the directions that matter.

An error ``e`` of a token costs ``eᵀ H e``, ``H`` the hessian of the loss: ``C_q`` of a key, for scores; in the basis of
the codes. See GPTQ (arXiv 2210.17323) and Babai's nearest plane.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from headq_ao.ops.rounding import scale_by_gain, stored_scale

SPREADS = (0.7, 0.85, 1.0, 1.15, 1.3)  # scales that are tried, in units of the token's RMS
PASSES = 2


def feedback_codes(
    y: Tensor, hessian: Tensor, cholesky: Tensor, step: Tensor, bits: int, spreads: Sequence[float], passes: int,
    unbiased: bool, scale_bits: int = 16,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`headq_ao.ops.feedback_codes` as it reads."""
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    y, hessian, cholesky, step = (x.to(dtype) for x in (y, hessian, cholesky, step))
    highest = 2**bits - 1
    rms = y.square().mean(-1, keepdim=True).sqrt()
    best: list[Tensor] = []
    for spread in spreads:
        scale = stored_scale(rms * spread, scale_bits)  # [B, H, T, 1]
        delta = scale * step.unsqueeze(-2)
        codes = sequential_round(y, cholesky, delta, highest)
        for _ in range(passes):
            codes = coordinate_descent(y, hessian, delta, highest, codes)
        y_hat = delta * (codes - highest / 2)
        if unbiased:
            gains = quadratic_form(y, hessian, y), quadratic_form(y, hessian, y_hat)
            kept = scale_by_gain(scale, *gains, scale_bits)
            y_hat, scale = y_hat * (kept / scale), kept
        error = quadratic_form(y - y_hat, hessian, y - y_hat)
        new = [error, scale, codes]
        best = [torch.where(error < best[0], a, b) for a, b in zip(new, best, strict=True)] if best else new
    return best[2].to(torch.uint8), best[1].squeeze(-1).half()


def sequential_round(y: Tensor, cholesky: Tensor, delta: Tensor, highest: int) -> Tensor:
    """Coordinate by coordinate, each rounded to where it makes up for the errors before it."""
    codes, error = torch.empty_like(y), torch.zeros_like(y)
    for i in range(y.shape[-1]):
        target = y[..., i] + (error[..., :i] * cholesky[..., :i, i].unsqueeze(-2)).sum(-1)
        codes[..., i] = (target / delta[..., i] + highest / 2).round().clamp(0, highest)
        error[..., i] = y[..., i] - delta[..., i] * (codes[..., i] - highest / 2)
    return codes


def coordinate_descent(y: Tensor, hessian: Tensor, delta: Tensor, highest: int, codes: Tensor) -> Tensor:
    """One pass: each code moves to where the error of all the others wants it."""
    codes, error = codes.clone(), y - delta * (codes - highest / 2)
    for i in range(y.shape[-1]):
        pull = (error @ hessian[..., :, i, None]).squeeze(-1) / hessian[..., i, i].unsqueeze(-1)
        target = y[..., i] - error[..., i] + pull
        codes[..., i] = (target / delta[..., i] + highest / 2).round().clamp(0, highest)
        error[..., i] = y[..., i] - delta[..., i] * (codes[..., i] - highest / 2)
    return codes


def quadratic_form(x: Tensor, hessian: Tensor, y: Tensor) -> Tensor:
    """``xᵀ H y`` of each token, ``[B, H, T, 1]``."""
    return ((x @ hessian) * y).sum(-1, keepdim=True)


def unit_factor(hessian: Tensor) -> Tensor:
    """``N`` of ``H = N D Nᵀ``, the Cholesky factor with a diagonal of ones, upper triangular; in fp64, with 1e-7 of the
    mean diagonal added to it.

    The identity where rounding or non-finite entries left no positive definite matrix: its head must not fail others.
    """
    m = hessian.double().nan_to_num(0.0, 0.0, 0.0)
    diagonal = m.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-30)
    one = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    lower, failed = torch.linalg.cholesky_ex((m + 1e-7 * diagonal * one).flip(-1, -2))
    upper = torch.where((failed > 0)[..., None, None], one, lower.flip(-1, -2))  # a triangle R, H = R Rᵀ
    return (upper / upper.diagonal(dim1=-2, dim2=-1)[..., None, :]).to(hessian.dtype).contiguous()
