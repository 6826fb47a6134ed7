"""HeadQ's side code: a low-rank code of the base's error."""

import dataclasses

import torch
from torch import Tensor

from headq_ao.codecs.base import (
    GAUSSIAN_STEP,
    KeyCodec,
)
from headq_ao.codecs.linalg import square_roots, top_eigenvectors
from headq_ao.config import HeadQConfig

STEP_GRID = tuple(0.6 + 0.1 * i for i in range(20))


def with_side_code(config: HeadQConfig, base: KeyCodec, c_q: Tensor, rows: Tensor) -> KeyCodec:
    """``base`` with a side code of its error on ``rows``; ``base`` itself at rank 0."""
    mean, rank = base.mean, config.side_rank(base.mean.shape[-1])
    if rank == 0:
        return base
    codes, scale, zero = base.quantize(rows, config.unbiased_scale)
    k_err = rows.to(mean.dtype) - base.dequantize(codes, scale, zero).to(mean.dtype)
    encode, read = side_basis(config, rank, c_q, rows.to(mean.dtype), k_err)
    z = (k_err @ encode) / scale.to(mean.dtype)[..., None]
    bits = config.key_bits(mean.shape[-1])
    return dataclasses.replace(
        base, side_encode=encode, side_read=read, side_step=fit_steps(z, config.side_bits), bits=bits
    )


def side_basis(config: HeadQConfig, rank: int, c_q: Tensor, rows: Tensor, k_err: Tensor) -> tuple[Tensor, Tensor]:
    """Encoder ``E`` and reader ``P`` ``[.., D, R]`` of the side code.

    ``"query_pca"``: ``E = P = U``, top eigenvectors of ``C_q`` (HeadQ, arXiv 2605.03562, withdrawn).
    ``"score_optimal"``: ``E = C_q^{1/2} W``, ``P = C_q^{−1/2} W``, ``W`` the top eigenvectors of
    ``C_q^{1/2} C_e C_q^{1/2}``, the rank-R pair of least ``E[(q·(k_err − P Eᵀ k_err))²]``.
    """
    if config.basis == "random":
        g = torch.Generator("cpu").manual_seed(config.seed)
        u = torch.linalg.qr(torch.randn(c_q.shape[-3:], generator=g, dtype=torch.float64, device="cpu"))[0][..., :rank]
        u = u.to(c_q.device, c_q.dtype).expand(c_q.shape[0], -1, -1, -1)
        return u, u
    if config.basis == "key_pca":
        centred = rows - rows.mean(-2, keepdim=True)
        u = top_eigenvectors(centred.transpose(-1, -2) @ centred, rank)
        return u, u
    if config.basis == "query_pca":
        u = top_eigenvectors(c_q, rank)
        return u, u
    root, inverse = square_roots(c_q)
    centred = k_err - k_err.mean(-2, keepdim=True)
    c_e = centred.transpose(-1, -2) @ centred / k_err.shape[-2]
    w = top_eigenvectors(root @ c_e @ root, rank)
    return root @ w, inverse @ w


def fit_steps(z: Tensor, bits: int) -> Tensor:
    """Level distance of least squared error for each coordinate of ``z [.., n, R]``, around the Gaussian one."""
    rms = z.square().mean(-2).sqrt().clamp(min=1e-12)
    best, best_err = rms, torch.full_like(rms, float("inf"))
    middle = (2**bits - 1) / 2
    for factor in STEP_GRID:
        step = rms * (GAUSSIAN_STEP[bits] * factor)
        width = step.unsqueeze(-2)
        err = (z - width * ((z / width + middle).round().clamp(0, 2 * middle) - middle)).square().mean(-2)
        best, best_err = torch.where(err < best_err, step, best), torch.minimum(err, best_err)
    return best
