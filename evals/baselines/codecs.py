"""How other quantizers write and read one side, in plain PyTorch: affine groups, Lloyd-Max levels, low-rank residuals.

A codec packs ``x [B, Hkv, n, D]`` into tensors ``[B, Hkv, n / unit, ...]`` (codes as packed bytes, scales in fp16)
and reads them back as ``scores(q) = q @ x_hatᵀ`` and ``readout(a) = a @ x_hat``, q and a ``[B, Hkv, G, S, ·]``.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headq_ao.codecs.linalg import rotation_matrix


@dataclass(frozen=True)
class Frame:
    """What a codec may know of its layer.

    Args:
        mean: of the rows ``[1, Hkv, D]`` from a calibration, or None.
        span: orthonormal query directions that errors are to stay out of ``[B, Hkv, D, r]``, or None.
        span_weight: of these directions against the others.
    """

    mean: Tensor | None = None
    span: Tensor | None = None
    span_weight: float = 0.0


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes of ``bits`` bits ``[..., n]`` as bytes ``[..., n·bits/8]``, lowest bit first.

    Raises:
        ValueError: when ``n · bits`` is no multiple of 8.

    Example:
        >>> import torch
        >>> from headq_ao.evals.baselines.codecs import pack_bits, unpack_bits
        >>> packed = pack_bits(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0]), 3)
        >>> packed.shape, unpack_bits(packed, 3).tolist()
        (torch.Size([3]), [1, 2, 3, 4, 5, 6, 7, 0])
    """
    if codes.shape[-1] * bits % 8:
        raise ValueError(f"{codes.shape[-1]} codes of {bits} bits do not fill whole bytes")
    shifts = torch.arange(bits, device=codes.device)
    stream: Tensor = (codes.to(torch.int32)[..., None] >> shifts & 1).flatten(-2).unflatten(-1, (-1, 8))
    return (stream << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """:func:`pack_bits`, undone; uint8."""
    if bits in (1, 2, 4):
        shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
        whole: Tensor = (packed[..., None] >> shifts & (2**bits - 1)).flatten(-2)
        return whole
    stream = (packed[..., None] >> torch.arange(8, device=packed.device) & 1).flatten(-2)
    codes: Tensor = stream.unflatten(-1, (-1, bits))
    return (codes << torch.arange(bits, device=packed.device)).sum(-1).to(torch.uint8)


class Codec:
    """A codec of keys or of values; it gives ``forms``, ``encode`` and ``decode``."""

    unit: int = 1  # tokens that are coded together

    def forms(self, head_dim: int) -> dict[str, tuple[tuple[int, ...], torch.dtype, int]]:
        """What :meth:`encode` gives, in its order: shape of an entry, dtype, tokens that share one."""
        raise NotImplementedError

    def check_head_dim(self, head_dim: int) -> None:
        """Raise ValueError where tokens of that size cannot be coded."""

    def encode(self, x: Tensor, frame: Frame) -> list[Tensor]:
        """Pack ``x [B, Hkv, n, D]``."""
        raise NotImplementedError

    def decode(self, packed: Sequence[Tensor], frame: Frame) -> Tensor:
        """``x_hat [B, Hkv, n, D]`` fp32."""
        raise NotImplementedError

    def scores(self, q: Tensor, packed: Sequence[Tensor], frame: Frame) -> Tensor:
        """``q @ x_hatᵀ``, ``[B, Hkv, G, S, n]``."""
        return q @ self.decode(packed, frame)[:, :, None].transpose(-1, -2)

    def readout(self, a: Tensor, packed: Sequence[Tensor], frame: Frame) -> Tensor:
        """``a @ x_hat``, ``[B, Hkv, G, S, D]``."""
        return a @ self.decode(packed, frame)[:, :, None]


@dataclass(frozen=True)
class Affine(Codec):
    """Min-max codes with fp16 scale and zero: per token in groups of coordinates, or per channel in groups of tokens.

    ``x_hat = zero + scale · c``, ``zero = min``, ``scale = (max − min) / (2^bits − 1)`` of the group (KIVI, 2402.02750:
    keys per channel, values per token).

    Args:
        bits: per code.
        group: coordinates per scale along a token, or tokens per scale along a channel.
        per_channel: which of the two.
        rotate: code the row in a Hadamard basis (QuaRot, 2404.00456).
        subtract_mean: subtract the calibrated mean first.
    """

    bits: int
    group: int
    per_channel: bool = False
    rotate: bool = False
    subtract_mean: bool = False

    @property
    def unit(self) -> int:  # type: ignore[override]
        return self.group if self.per_channel else 1

    def forms(self, head_dim: int) -> dict[str, tuple[tuple[int, ...], torch.dtype, int]]:
        scales = ((head_dim,), torch.float16, self.group) if self.per_channel else (
            (head_dim // self.group,), torch.float16, 1
        )  # fmt: skip
        return {"codes": ((head_dim * self.bits // 8,), torch.uint8, 1), "scale": scales, "zero": scales}

    def check_head_dim(self, head_dim: int) -> None:
        if not self.per_channel and head_dim % self.group:
            raise ValueError(f"a group of coordinates must divide head_dim {head_dim}, got {self.group}")

    def encode(self, x: Tensor, frame: Frame) -> list[Tensor]:
        x = self._into(x.float(), frame)
        scale, zero = self._range(x)
        if frame.span is not None:
            factor = error_factor(frame.span.float(), frame.span_weight)
            return [pack_bits(self._pushed(x, scale, zero, factor), self.bits), scale, zero]
        return [pack_bits(self._round(x, self._spread(scale), self._spread(zero)), self.bits), scale, zero]

    def decode(self, packed: Sequence[Tensor], frame: Frame) -> Tensor:
        codes, scale, zero = packed
        x = self._spread(zero) + self._spread(scale) * unpack_bits(codes, self.bits)
        return self._out_of(x, frame)

    def _into(self, x: Tensor, frame: Frame) -> Tensor:
        if self.subtract_mean and frame.mean is not None:
            x = x - frame.mean.unsqueeze(-2)
        return x @ rotation_matrix(x.shape[-1]).to(x) if self.rotate else x

    def _out_of(self, x: Tensor, frame: Frame) -> Tensor:
        x = x @ rotation_matrix(x.shape[-1]).to(x).T if self.rotate else x
        return x + frame.mean.unsqueeze(-2) if self.subtract_mean and frame.mean is not None else x

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``scale`` and ``zero``: ``[.., n / group, D]`` per channel, ``[.., n, D / group]`` per token."""
        grouped = x.unflatten(-2, (-1, self.group)) if self.per_channel else x.unflatten(-1, (-1, self.group))
        low, high = grouped.aminmax(dim=-2 if self.per_channel else -1)
        return ((high - low) / (2**self.bits - 1)).half(), low.half()

    def _spread(self, x: Tensor) -> Tensor:
        return x.float().repeat_interleave(self.group, dim=-2 if self.per_channel else -1)

    def _round(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return ((x - zero) / scale.clamp_min(1e-8)).round_().clamp_(0, 2**self.bits - 1)

    def _pushed(self, x: Tensor, scale: Tensor, zero: Tensor, factor: Tensor) -> Tensor:
        """Codes coordinate by coordinate, each one's error made up for by those to come (GPTQ, 2210.17323)."""
        x, scale, zero = x.clone(), self._spread(scale), self._spread(zero)
        codes = torch.empty_like(x)
        for i in range(x.shape[-1]):
            codes[..., i] = self._round(x[..., i], scale[..., i], zero[..., i])
            error = x[..., i] - (zero[..., i] + scale[..., i] * codes[..., i])
            row = factor[:, :, i, i:] / factor[:, :, i, i : i + 1]
            x[..., i:] -= error[..., None] * row[:, :, None]
        return codes


@dataclass(frozen=True)
class LloydMax(Codec):
    """Norm in fp16, a random rotation, and the levels of least squared error for a coordinate of a random direction.

    ``x_hat = ‖x‖ · R · level[c]`` (TurboQuant, 2504.19874, without its residual sketch): ``bits + 16/D`` bits.

    Args:
        bits: per coordinate.
        seed: of the rotation.
        subtract_mean: subtract the calibrated mean first.
    """

    bits: int
    seed: int = 0
    subtract_mean: bool = False

    def forms(self, head_dim: int) -> dict[str, tuple[tuple[int, ...], torch.dtype, int]]:
        return {"codes": ((head_dim * self.bits // 8,), torch.uint8, 1), "norm": ((), torch.float16, 1)}

    def encode(self, x: Tensor, frame: Frame) -> list[Tensor]:
        x = x.float() if frame.mean is None or not self.subtract_mean else x.float() - frame.mean.unsqueeze(-2)
        norm = x.norm(dim=-1).half()
        y = (x / norm.float().clamp_min(1e-8)[..., None]) @ random_rotation(x.shape[-1], self.seed).to(x)
        levels = sphere_levels(x.shape[-1], self.bits).to(x)
        return [pack_bits(torch.bucketize(y, (levels[1:] + levels[:-1]) / 2), self.bits), norm]

    def decode(self, packed: Sequence[Tensor], frame: Frame) -> Tensor:
        codes, norm = packed
        index = unpack_bits(codes, self.bits).long()
        y = sphere_levels(index.shape[-1], self.bits).to(norm.device)[index] * norm.float()[..., None]
        x = y @ random_rotation(y.shape[-1], self.seed).to(y).T
        return x + frame.mean.unsqueeze(-2) if self.subtract_mean and frame.mean is not None else x


@functools.lru_cache(maxsize=32)
def random_rotation(head_dim: int, seed: int) -> Tensor:
    """A Haar-random orthogonal ``[D, D]``."""
    normal: Tensor = torch.randn(head_dim, head_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    rotation: Tensor = q * r.diagonal().sign()
    return rotation.float()


@functools.lru_cache(maxsize=32)
def sphere_levels(head_dim: int, bits: int, iterations: int = 300) -> Tensor:
    """Lloyd-Max levels ``[2^bits]`` for one coordinate of a random unit vector, density ``∝ (1 − x²)^((D − 3) / 2)``.

    Example:
        >>> from headq_ao.evals.baselines.codecs import sphere_levels
        >>> [round(x, 2) for x in (sphere_levels(4096, 2) * 64).tolist()]  # tends to the normal law's
        [-1.51, -0.45, 0.45, 1.51]
    """
    x = torch.linspace(-1, 1, 400_001, dtype=torch.float64)
    weight = (1 - x.square()).clamp_min(0).pow((head_dim - 3) / 2)
    mass, moment = weight.cumsum(0), (weight * x).cumsum(0)
    k = 2**bits
    levels: Tensor = torch.linspace(-1, 1, k + 2, dtype=torch.float64)[1:-1] * 3 / head_dim**0.5
    zero = x.new_zeros(1)
    for _ in range(iterations):
        edges = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        m, s = (torch.cat([zero, c[edges - 1], c[-1:]]).diff() for c in (mass, moment))
        levels = s / m
    return levels.float()


@dataclass(frozen=True)
class LowRank(Codec):
    """A base code and, per block, a rank-r fp16 factorization of its residual (GEAR, 2403.05527, without outliers).

    ``x_hat = base_hat + A Bᵀ``, ``A [n, r]``, ``B [D, r]`` from the singular vectors of the block's residual.

    Args:
        base: the codec of the rows.
        rank: r.
        block: tokens that share one factorization.
    """

    base: Affine
    rank: int
    block: int

    def __post_init__(self) -> None:
        if self.block % self.base.unit:
            raise ValueError(f"groups of {self.base.unit} tokens must divide its blocks of {self.block}")

    @property
    def unit(self) -> int:  # type: ignore[override]
        return self.block

    def forms(self, head_dim: int) -> dict[str, tuple[tuple[int, ...], torch.dtype, int]]:
        a, b = ((self.rank,), torch.float16, 1), ((head_dim, self.rank), torch.float16, self.block)
        return {**self.base.forms(head_dim), "a": a, "b": b}

    def check_head_dim(self, head_dim: int) -> None:
        self.base.check_head_dim(head_dim)

    def encode(self, x: Tensor, frame: Frame) -> list[Tensor]:
        packed = self.base.encode(x, frame)
        residual = (x.float() - self.base.decode(packed, frame)).unflatten(-2, (-1, self.block))
        u, s, vh = torch.linalg.svd(residual, full_matrices=False)
        root = s[..., None, : self.rank].sqrt()
        a = (u[..., : self.rank] * root).flatten(-3, -2)
        b = vh[..., : self.rank, :].transpose(-1, -2) * root
        return [*packed, a.half(), b.half()]

    def decode(self, packed: Sequence[Tensor], frame: Frame) -> Tensor:
        *base, a, b = packed
        low_rank: Tensor = a.float().unflatten(-2, (-1, self.block)) @ b.float().transpose(-1, -2)
        return self.base.decode(base, frame) + low_rank.flatten(-3, -2)

    def scores(self, q: Tensor, packed: Sequence[Tensor], frame: Frame) -> Tensor:
        *base, a, b = packed
        per_block = torch.einsum("bhgsd,bhndr->bhgsnr", q, b.to(q.dtype))
        a = a.to(q.dtype).unflatten(-2, (-1, self.block))
        return self.base.scores(q, base, frame) + torch.einsum("bhgsnr,bhntr->bhgsnt", per_block, a).flatten(-2)


def query_span(q: Tensor, n_kv_heads: int, rank: int) -> Tensor:
    """The top right singular directions of a prompt's queries ``q [B, Hq, S, D]``: ``[B, Hkv, D, rank]`` fp16."""
    rows: Tensor = q.double().unflatten(1, (n_kv_heads, -1)).flatten(2, 3)
    directions: Tensor = torch.linalg.eigh(rows.transpose(-1, -2) @ rows).eigenvectors
    return directions[..., -rank:].half()


def error_factor(span: Tensor, weight: float) -> Tensor:
    """Upper Cholesky factor of ``(I + weight · U Uᵀ)⁻¹``, the metric under which key errors are pushed on.

    The error of a coordinate is made up for by later ones so as to stay out of the span of U, the prompt's queries
    (SQuat, 2503.24358).

    Args:
        span: U, orthonormal columns ``[B, Hkv, D, r]``.
        weight: of the directions of U against the others.

    Returns:
        ``[B, Hkv, D, D]``.
    """
    outer = span @ span.transpose(-1, -2)
    inverse = torch.eye(span.shape[-2], dtype=span.dtype, device=span.device) - weight / (1 + weight) * outer
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
