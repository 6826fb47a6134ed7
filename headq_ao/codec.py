"""From statistics to a key codec: bases, steps, and the map of a query into the integers' coordinates."""

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from headq_ao.config import HeadQConfig
from headq_ao.ops import MappedQuery, encode_keys
from headq_ao.ops.layout import unpack_keys

# Distance of the levels of the uniform quantizer with least squared error on a unit normal (Max, 1960).
GAUSSIAN_STEP = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 8: 0.0308}
RIDGE = 1e-6  # of the largest eigenvalue of C_q
STEP_GRID = tuple(0.6 + 0.1 * i for i in range(20))


@dataclass(frozen=True)
class KeyCodec:
    """How the keys of one epoch are written and read. Leading dimensions are ``[B or 1, Hkv or 1]``.

    ``mean [.., D]``, ``encode``/``read`` ``[.., D, M0]``, ``step [.., M0]``, ``weight [.., M0]`` or None (affine),
    ``side_encode``/``side_read`` ``[.., D, R]`` and ``side_step [.., R]`` or None, ``bits`` of the M0 + R coordinates.
    ``own`` names the tensors that belong to the sequences of a batch: indexed with it, and charged to it.
    """

    mean: Tensor
    encode: Tensor
    read: Tensor
    step: Tensor
    weight: Tensor | None
    side_encode: Tensor | None
    side_read: Tensor | None
    side_step: Tensor | None
    bits: tuple[int, ...]
    own: frozenset[str] = frozenset()

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by field name."""
        pairs = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: value for name, value in pairs if isinstance(value, Tensor)}

    def index(self, rows: Tensor) -> "KeyCodec":
        """The codec of those batch rows."""
        return self.replace(
            {n: t.index_select(0, rows.to(t.device)) for n, t in self.tensors().items() if n in self.own}
        )

    def of_heads(self, part: slice) -> "KeyCodec":
        """The codec of some of its KV heads."""
        return self.replace({n: t[:, part].contiguous() for n, t in self.tensors().items() if t.shape[1] > 1})

    def replace(self, tensors: dict[str, Tensor]) -> "KeyCodec":
        """A copy with some tensors exchanged; a side basis that reads as it encodes stays one tensor."""
        if self.side_read is self.side_encode and "side_encode" in tensors:
            tensors = tensors | {"side_read": tensors["side_encode"]}
        return dataclasses.replace(self, **tensors)  # type: ignore[arg-type]

    def encode_rows(self, k: Tensor, unbiased: bool) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """:func:`headq_ao.ops.encode_keys` with this codec."""
        return encode_keys(
            k, self.mean, self.encode, self.read, self.step, self.bits,
            weight=self.weight, side_encode=self.side_encode, side_step=self.side_step, unbiased=unbiased,
        )  # fmt: skip

    def map_query(self, q: Tensor, scaling: float, sign: int = 1) -> MappedQuery:
        """``q [B, Hq, S, D]`` in the coordinates of the codes, so that a score is one dot product of integers.

        ``k_hat = mean + zero·1 + σ·step·(c − c0)`` in the base and ``(q @ P)·z`` for the side code give
        ``s = σ (q̃·c + b) + m h + q·μ`` with ``q̃ = [(q @ read)·step, sign·(q @ side_read)·side_step]``.
        """
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        hkv = self.mean.shape[1]
        g = q.to(dtype).unflatten(1, (hkv, -1)) * scaling  # [B, Hkv, G, S, D]

        def project(basis: Tensor) -> Tensor:
            return g @ basis.to(dtype).unsqueeze(2)

        base = project(self.read)
        coordinates = [base * self.step.to(dtype)[:, :, None, None]]
        if self.side_read is not None and self.side_step is not None:
            coordinates.append(project(self.side_read) * (sign * self.side_step.to(dtype))[:, :, None, None])
        codes = torch.cat(coordinates, -1)
        bias = -(codes * self.centre(codes)).sum(-1)
        gauge = project(self.mean.unsqueeze(-1)).squeeze(-1)
        return MappedQuery(*(x.flatten(1, 2) for x in (codes, bias, base.sum(-1), gauge)))

    def centre(self, like: Tensor) -> Tensor:
        """The code that stands for zero, per coordinate: 0 where the row stores a zero, else the middle level."""
        base = self.read.shape[-1]
        middle = [(2**b - 1) / 2 for b in self.bits]
        return like.new_tensor(middle if self.weight is not None else [0.0] * base + middle[base:])

    def dequantize(self, planes: list[Tensor], scale: Tensor, zero: Tensor | None, side: int = 1) -> Tensor:
        """``k_hat + side · P z`` of packed rows, ``[B, Hkv, T, D]`` fp32; with ``side`` 0, ``k_hat`` alone."""
        codes = unpack_keys(planes, self.bits).float()
        codes = (codes - self.centre(codes)) * scale.float()[..., None]
        base = self.read.shape[-1]
        y_hat = codes[..., :base] * self.step.float().unsqueeze(-2)
        if zero is not None:
            y_hat = y_hat + zero.float()[..., None]
        k_hat = self.mean.float().unsqueeze(-2) + y_hat @ self.read.float().transpose(-1, -2)
        if side and self.side_read is not None and self.side_step is not None:
            z = codes[..., base:] * (side * self.side_step.float()).unsqueeze(-2)
            k_hat = k_hat + z @ self.side_read.float().transpose(-1, -2)
        return k_hat


@functools.lru_cache(maxsize=32)
def rotation_matrix(head_dim: int, hadamard: bool = True) -> Tensor:
    """Orthogonal ``[D, D]`` fp32 that mixes all coordinates: Hadamard ⊗ DCT of the odd part of D; or the identity.

    Example:
        >>> from headq_ao.codec import rotation_matrix
        >>> r = rotation_matrix(80)
        >>> bool((r @ r.T - torch.eye(80)).abs().max() < 1e-6)
        True
    """
    if not hadamard:
        return torch.eye(head_dim)
    odd = head_dim
    h = torch.ones(1, 1, dtype=torch.float64)
    while odd % 2 == 0:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), h) / 2**0.5
        odd //= 2
    n = torch.arange(odd, dtype=torch.float64)
    dct = torch.cos(torch.pi / odd * (n[None] + 0.5) * n[:, None]) * (2 / odd) ** 0.5
    dct[0] /= 2**0.5
    return torch.kron(h, dct).float()


def base_codec(config: HeadQConfig, mean: Tensor) -> KeyCodec:
    """The codec without a side code: all but ``mean [B or 1, Hkv, D]`` is constant."""
    head_dim = mean.shape[-1]
    bits = config.key_bits(head_dim)[:head_dim]
    rotation = rotation_matrix(head_dim, config.rotation).to(mean.device, mean.dtype)[None, None]
    ones = mean.new_ones(1, 1, head_dim)
    step, weight = (ones, None) if config.k_zero_point else (ones * GAUSSIAN_STEP[bits[0]], ones)
    return KeyCodec(mean, rotation, rotation, step, weight, None, None, None, bits)


def affine_codec(config: HeadQConfig, c_q: Tensor, mean: Tensor, rows: Tensor) -> KeyCodec:
    """A base with equal bits for each rotated coordinate, and a side code of its error.

    Args:
        config: what to build.
        c_q: ``C_q = E[q qᵀ]``, ``[B or 1, Hkv, D, D]``.
        mean: of the keys, ``[B or 1, Hkv, D]``.
        rows: exact keys to fit steps and ``C_e`` on, ``[B or 1, Hkv, n, D]``, ``n`` a multiple of 16.
    """
    head_dim = mean.shape[-1]
    bits, rank = config.key_bits(head_dim), config.side_rank(head_dim)
    base = base_codec(config, mean if config.key_gauge else torch.zeros_like(mean))
    if rank == 0:
        return base
    planes, scale, zero = base.encode_rows(rows, config.unbiased_scale)
    k_err = rows.to(mean.dtype) - base.dequantize(planes, scale, zero).to(mean.dtype)
    encode, read = side_basis(config, rank, c_q, rows.to(mean.dtype), k_err)
    z = (k_err @ encode) / scale.to(mean.dtype)[..., None]
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
        g = torch.Generator().manual_seed(config.seed)
        u = torch.linalg.qr(torch.randn(c_q.shape[-3:], generator=g, dtype=torch.float64))[0][..., :rank]
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


def top_eigenvectors(matrix: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors of symmetric matrices, largest first, signs fixed; ``[.., D, rank]``."""
    u = _eigh(matrix)[1].flip(-1)[..., :rank]
    largest = u.abs().argmax(-2, keepdim=True)
    return (u * u.gather(-2, largest).sign()).to(matrix.dtype)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors in fp64. Non-finite entries count as 0: such a sequence must not fail its batch."""
    values, vectors = torch.linalg.eigh(matrix.double().nan_to_num(0.0, 0.0, 0.0))
    return values, vectors


def square_roots(c_q: Tensor) -> tuple[Tensor, Tensor]:
    """``C_q^{1/2}`` and ``C_q^{−1/2}`` with a ridge of 1e-6 of the largest eigenvalue."""
    values, vectors = _eigh(c_q)
    root = (values.clamp(min=0) + RIDGE * values[..., -1:]).clamp(min=1e-30).sqrt()
    half = (vectors * root[..., None, :]) @ vectors.transpose(-1, -2)
    inverse = (vectors / root[..., None, :]) @ vectors.transpose(-1, -2)
    return half.to(c_q.dtype), inverse.to(c_q.dtype)


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
