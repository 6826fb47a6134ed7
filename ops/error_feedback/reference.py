"""Rounding with GPTQ-style error feedback: integer codes whose error is small in the directions that matter.

An error ``e`` of a token costs ``eᵀ H e``, ``H`` the hessian of the loss: ``C_q`` of a key, for scores; in the basis of
the codes. See GPTQ (arXiv 2210.17323) and Babai's nearest plane.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from headq_ao.ops.rounding import scale_by_gain, stored_scale

SPREADS = (0.7, 0.78, 0.86, 0.94, 1.02, 1.1, 1.18, 1.26)  # scales that are tried, in units of the token's RMS
KEPT = 2  # of them, those of the least error so far, are improved by coordinate descent
PASSES = 2  # of it


def feedback_codes(
    y: Tensor, hessian: Tensor, factor: Tensor, step: Tensor, bits: int, spreads: Sequence[float], kept: int,
    passes: int, unbiased: bool, scale_bits: int = 16,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`headq_ao.ops.feedback_codes` as it reads."""
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    y, hessian, factor, step = (x.to(dtype) for x in (y, hessian, factor, step))
    highest = 2**bits - 1
    rms = y.square().mean(-1, keepdim=True).sqrt()
    tried = torch.stack([stored_scale(rms * spread, scale_bits) for spread in spreads])  # [spreads, B, H, T, 1]

    def decoded(codes: Tensor, scale: Tensor) -> Tensor:
        return scale * step.unsqueeze(-2) * (codes - highest / 2)

    rounded = torch.stack([sequential_round(y, factor, scale * step.unsqueeze(-2), highest) for scale in tried])
    left = [y - decoded(codes, scale) for codes, scale in zip(rounded, tried, strict=True)]
    errors = torch.stack([quadratic_form(e, hessian, e) for e in left])
    best: list[Tensor] = []
    for at in errors.sort(dim=0, stable=True).indices[:kept]:
        scale, codes = (x.take_along_dim(at[None], 0)[0] for x in (tried, rounded))
        for _ in range(passes):
            codes = coordinate_descent(y, hessian, scale * step.unsqueeze(-2), highest, codes)
        y_hat = decoded(codes, scale)
        if unbiased:
            gains = quadratic_form(y, hessian, y), quadratic_form(y, hessian, y_hat)
            stored = scale_by_gain(scale, *gains, scale_bits)
            y_hat, scale = y_hat * (stored / scale), stored
        new = [quadratic_form(y - y_hat, hessian, y - y_hat), scale, codes]
        best = [torch.where(new[0] < best[0], a, b) for a, b in zip(new, best, strict=True)] if best else new
    return best[2].to(torch.uint8), best[1].squeeze(-1).half()


def sequential_round(y: Tensor, factor: Tensor, delta: Tensor, highest: int) -> Tensor:
    """Coordinate by coordinate, each rounded to where it makes up for the errors before it."""
    codes, error = torch.empty_like(y), torch.zeros_like(y)
    for i in range(y.shape[-1]):
        target = y[..., i] + (error[..., :i] * factor[..., :i, i].unsqueeze(-2)).sum(-1)
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


def ldl_factor(hessian: Tensor) -> Tensor:
    """``H = N D Nᵀ``, ``N`` upper triangular with a diagonal of ones: ``N`` above the diagonal and ``D`` on it, zeros
    below; in fp64, with 1e-7 of the mean diagonal added to ``H``.

    The identity where rounding or non-finite entries left no positive definite matrix: its head must not fail others.

    Example:
        >>> import torch
        >>> from headq_ao.ops import ldl_factor
        >>> ldl_factor(torch.tensor([[5.0, 2.0], [2.0, 1.0]])).round(decimals=4).tolist()
        [[1.0, 2.0], [0.0, 1.0]]
    """
    m = hessian.double().nan_to_num(0.0, 0.0, 0.0)
    diagonal = m.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-30)
    one = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    lower, failed = torch.linalg.cholesky_ex((m + 1e-7 * diagonal * one).flip(-1, -2))
    upper = torch.where((failed > 0)[..., None, None], one, lower.flip(-1, -2))  # a triangle R, H = R Rᵀ
    root = upper.diagonal(dim1=-2, dim2=-1)
    return ((upper / root[..., None, :]).triu(1) + torch.diag_embed(root.square())).to(hessian.dtype).contiguous()
