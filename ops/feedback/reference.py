"""Rounding with error feedback: integer codes whose error is small where it is seen, not where it is not."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headq_ao.ops.rounding import gained, half

SPREADS = (0.7, 0.85, 1.0, 1.15, 1.3)  # scales that are tried, in units of the row's RMS
PASSES = 2


def plain_codes(
    y: Tensor, metric: Tensor, step: Tensor, bits: int, *, factor: Tensor | None = None, unbiased: bool = True
) -> tuple[Tensor, Tensor]:
    """:func:`headq_ao.ops.feedback_codes` by the function below, whatever the device."""
    factor = unit_factor(metric) if factor is None else factor
    return feedback_codes(y, metric, factor, step, bits, SPREADS, PASSES, unbiased)


def feedback_codes(
    y: Tensor, metric: Tensor, feedback: Tensor, step: Tensor, bits: int, spreads: Sequence[float], passes: int,
    unbiased: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    y, metric, feedback, step = (x.to(dtype) for x in (y, metric, feedback, step))
    top = 2**bits - 1
    rms = y.square().mean(-1, keepdim=True).sqrt()
    best: list[Tensor] = []
    for spread in spreads:
        scale = half(rms * spread)  # [B, H, T, 1]
        width = scale * step.unsqueeze(-2)
        codes = eliminate(y, feedback, width, top)
        for _ in range(passes):
            codes = descend(y, metric, width, top, codes)
        y_hat = width * (codes - top / 2)
        if unbiased:
            kept = gained(scale, form(y, metric, y), form(y, metric, y_hat))
            y_hat, scale = y_hat * (kept / scale), kept
        error = form(y - y_hat, metric, y - y_hat)
        new = [error, scale, codes]
        best = [torch.where(error < best[0], a, b) for a, b in zip(new, best, strict=True)] if best else new
    return best[2].to(torch.uint8), best[1].squeeze(-1).half()


def eliminate(y: Tensor, feedback: Tensor, width: Tensor, top: int) -> Tensor:
    """Coordinate by coordinate, each rounded to where it makes up for the errors before it."""
    codes, error = torch.empty_like(y), torch.zeros_like(y)
    for i in range(y.shape[-1]):
        target = y[..., i] + (error[..., :i] * feedback[..., :i, i].unsqueeze(-2)).sum(-1)
        codes[..., i] = (target / width[..., i] + top / 2).round().clamp(0, top)
        error[..., i] = y[..., i] - width[..., i] * (codes[..., i] - top / 2)
    return codes


def descend(y: Tensor, metric: Tensor, width: Tensor, top: int, codes: Tensor) -> Tensor:
    """One pass of coordinate descent: each code moves to where the error of all the others wants it."""
    codes, error = codes.clone(), y - width * (codes - top / 2)
    for i in range(y.shape[-1]):
        pull = (error @ metric[..., :, i, None]).squeeze(-1) / metric[..., i, i].unsqueeze(-1)
        target = y[..., i] - error[..., i] + pull
        codes[..., i] = (target / width[..., i] + top / 2).round().clamp(0, top)
        error[..., i] = y[..., i] - width[..., i] * (codes[..., i] - top / 2)
    return codes


def form(x: Tensor, metric: Tensor, y: Tensor) -> Tensor:
    """``xᵀ M y`` of each row, ``[B, H, T, 1]``."""
    return ((x @ metric) * y).sum(-1, keepdim=True)


def unit_factor(metric: Tensor) -> Tensor:
    """``N`` of ``M = N D Nᵀ``, unit upper triangular; in fp64, with 1e-7 of the mean diagonal added to it.

    The identity where rounding or non-finite entries left no positive definite matrix: its head must not fail others.
    """
    m = metric.double().nan_to_num(0.0, 0.0, 0.0)
    diagonal = m.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-30)
    one = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    lower, failed = torch.linalg.cholesky_ex((m + 1e-7 * diagonal * one).flip(-1, -2))
    upper = torch.where((failed > 0)[..., None, None], one, lower.flip(-1, -2))  # a triangle R, M = R Rᵀ
    return (upper / upper.diagonal(dim1=-2, dim2=-1)[..., None, :]).to(metric.dtype)
