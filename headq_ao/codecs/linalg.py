"""Eigenvectors, roots, ridges and rotations: the linear algebra of the codecs."""

import functools
from typing import Any

import torch
from torch import Tensor

from headq_ao.ambient import mode_neutral

RIDGE = 1e-6  # of the largest eigenvalue of C_q


@functools.lru_cache(maxsize=32)
@mode_neutral
def rotation_matrix(head_dim: int, hadamard: bool = True) -> Tensor:
    """Orthogonal ``[D, D]`` fp32 that mixes all coordinates: Hadamard ⊗ DCT of the odd part of D; or the identity.

    Example:
        >>> from headq_ao.codecs.linalg import rotation_matrix
        >>> r = rotation_matrix(80)
        >>> bool((r @ r.T - torch.eye(80)).abs().max() < 1e-6)
        True
    """
    if not hadamard:
        return torch.eye(head_dim, dtype=torch.float32, device="cpu")
    odd = head_dim
    double: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    h = torch.ones(1, 1, **double)
    while odd % 2 == 0:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], **double), h) / 2**0.5
        odd //= 2
    n = torch.arange(odd, **double)
    dct = torch.cos(torch.pi / odd * (n[None] + 0.5) * n[:, None]) * (2 / odd) ** 0.5
    dct[0] /= 2**0.5
    return torch.kron(h, dct).float()


def centred_moment(mean: Tensor, outer: Tensor) -> Tensor:
    """``E[x xᵀ] − μ μᵀ`` ``[.., D, D]``."""
    return outer - mean[..., :, None] * mean[..., None, :]


def ridged(matrix: Tensor, share: float) -> Tensor:
    """The matrix with that share of its mean eigenvalue added to all of them."""
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-20)[..., None, None]
    return matrix + share * mean * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def top_eigenvectors(matrix: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors of symmetric matrices, largest first, signs fixed; ``[.., D, rank]``."""
    u = eigh(matrix)[1].flip(-1)[..., :rank]
    largest = u.abs().argmax(-2, keepdim=True)
    return (u * u.gather(-2, largest).sign()).to(matrix.dtype)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors in fp64. Non-finite entries count as 0: such a sequence must not fail its batch."""
    values, vectors = torch.linalg.eigh(matrix.double().nan_to_num(0.0, 0.0, 0.0))
    return values, vectors


def square_roots(c_q: Tensor) -> tuple[Tensor, Tensor]:
    """``C_q^{1/2}`` and ``C_q^{−1/2}`` with a ridge of 1e-6 of the largest eigenvalue."""
    values, vectors = eigh(c_q)
    root = (values.clamp(min=0) + RIDGE * values[..., -1:]).clamp(min=1e-30).sqrt()
    half = (vectors * root[..., None, :]) @ vectors.transpose(-1, -2)
    inverse = (vectors / root[..., None, :]) @ vectors.transpose(-1, -2)
    return half.to(c_q.dtype), inverse.to(c_q.dtype)
