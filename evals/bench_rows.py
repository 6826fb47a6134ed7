"""Random packed rows for the decode benchmark, what they stand for, and the check that lets it report."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headq_ao.evals.bench_result import CheckFailedError
from headq_ao.ops import MappedQuery, Rows, decode_attention, encode_keys, encode_values, merge_segments
from headq_ao.ops.decode_attention import reference
from headq_ao.ops.decode_attention.op import SLOT_TILE
from headq_ao.ops.layout import unpack_keys, unpack_values

ENCODED = 2048  # rows that are really encoded; longer contexts repeat them, which no kernel can tell
ROW_TILE = 32  # contexts are multiples of it: rows of any bits then fill whole tiles
SCORE_SPREAD = 2.0  # standard deviation of the random scores, in nats
LIMIT = 1e-3  # of the relative error of packed attention
BF16_LIMIT = 1e-2  # of baselines, which round keys, values and, most of them, weights and output to bf16


@dataclass(frozen=True)
class Shape:
    """Query heads, KV heads and head_dim of an attention layer.

    Example:
        >>> from headq_ao.evals.bench_rows import Shape
        >>> Shape.parse("32/8/128").group, str(Shape(9, 3, 64))
        (4, '9/3/64')
    """

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """``"32/8/128"``; raises ValueError on anything else."""
        try:
            shape = cls(*map(int, text.split("/")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"a shape is HEADS/KV_HEADS/HEAD_DIM, like 32/8/128, got {text!r}") from error
        if min(dataclasses.astuple(shape)) < 1 or shape.heads % shape.kv_heads or shape.head_dim % 16:
            raise ValueError(f"heads must be a multiple of KV heads, and head_dim of 16, got {text!r}")
        return shape

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def scaling(self) -> float:
        """Of the scores."""
        return float(self.head_dim**-0.5)

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads}/{self.head_dim}"


@dataclass(frozen=True)
class Packed:
    """Packed rows of one layer, batch 1, with the bases that they are written in, and a query.

    ``q [Hkv, G, D]`` fp32 with bf16 values; ``key_mean``, ``value_mean`` ``[Hkv, D]``; ``key_read``, ``value_read``
    ``[Hkv, D, D]``; ``k_hat = key_mean + σ·step·(c − c0) @ key_readᵀ``, values likewise with their own step in σ.
    """

    shape: Shape
    q: Tensor
    keys: Rows
    values: Rows
    step: float
    key_mean: Tensor
    key_read: Tensor
    value_mean: Tensor
    value_read: Tensor

    @property
    def tokens(self) -> int:
        """Rows per KV head."""
        assert self.keys.scale is not None
        return self.keys.scale.shape[2]

    @property
    def n_bytes(self) -> int:
        """What attention reads: codes and scales of all KV heads."""
        return sum(x.nbytes for rows in (self.keys, self.values) for x in tensors(rows))

    def map_query(self) -> MappedQuery:
        """The query in the coordinates of the codes, scaling and step folded in."""
        codes = (self.q * self.shape.scaling) @ self.key_read * self.step
        middle = (2 ** self.keys.bits[0] - 1) / 2
        bias = -codes.sum(-1) * middle
        gauge = torch.einsum("hgd,hd->hg", self.q * self.shape.scaling, self.key_mean)
        one = (1, self.shape.heads, 1)
        return MappedQuery(
            codes.reshape(*one, -1), bias.reshape(one), torch.zeros_like(bias).reshape(one), gauge.reshape(one)
        )

    def readout(self, out: Tensor) -> Tensor:
        """``[Hkv, G, D]`` in the values' own basis from what ``decode_attention`` gives ``[1, Hq, 1, D]``."""
        grouped = out.reshape(self.shape.kv_heads, self.shape.group, -1)
        return grouped @ self.value_read.transpose(-1, -2) + self.value_mean[:, None]

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """``k_hat``, ``v_hat`` ``[Hkv, T, D]`` fp32."""
        sides = []
        k, v = self.keys, self.values
        of_keys = k, unpack_keys(k.planes, k.bits), self.key_read, self.key_mean, self.step
        of_values = v, unpack_values(v.planes, v.bits[0]), self.value_read, self.value_mean, 1.0
        for rows, codes, read, mean, step in (of_keys, of_values):
            assert rows.scale is not None
            scale = rows.scale.float().reshape(self.shape.kv_heads, -1, 1) * step
            y_hat = (codes[0].float() - (2 ** rows.bits[0] - 1) / 2) * scale
            sides.append(y_hat @ read.transpose(-1, -2) + mean[:, None])
        return sides[0], sides[1]

    def attend(self) -> Callable[[Rows, Rows], Tensor]:
        """``(keys, values) → [1, Hq, 1, D]`` by :func:`headq_ao.ops.decode_attention`, the query mapped once before."""
        query = self.map_query()
        start, stop = torch.tensor([[0]]), torch.tensor([[self.tokens]])
        return lambda keys, values: decode_attention(query, keys, values, start, stop)[0]

    def attend_compiled(self, compiled: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Rows, Rows], Tensor]:
        """The same by the op's reference under torch.compile, in tiles as without a C++ compiler."""
        query = self.map_query()
        q, bias, zero, gauge = (
            x.unflatten(1, (self.shape.kv_heads, -1)) for x in (query.codes, query.bias, query.zero, query.gauge)
        )
        start = torch.tensor([[0]])

        def attend(keys: Rows, values: Rows) -> Tensor:
            parts = []
            for a in range(0, self.tokens, SLOT_TILE):
                b = min(a + SLOT_TILE, self.tokens)
                k, v = cut(keys, a, b, key=True), cut(values, a, b, key=False)
                stop = torch.tensor([[b - a]])
                parts.append(
                    compiled(
                        q, bias, zero, gauge, None, k.planes, k.bits, k.scale, None,
                        None, v.planes, v.bits[0], v.scale, None, start, stop, None,
                    )
                )  # fmt: skip
            return merge_segments(parts)[0].flatten(1, 2)

        return attend

    def copies(self, n: int) -> list[tuple[Rows, Rows]]:
        """``n`` copies of the rows, each in memory of its own."""
        sides = []
        for rows in (self.keys, self.values):
            assert rows.scale is not None
            many = [x.repeat(n, *[1] * (x.ndim - 1)) for x in (*rows.planes, rows.scale)]
            of = [[x[i : i + 1] for x in many] for i in range(n)]
            sides.append([Rows(planes=x[:-1], bits=rows.bits, scale=x[-1]) for x in of])
        return list(zip(*sides, strict=True))


def random_packed(shape: Shape, tokens: int, k_bits: int, v_bits: int, seed: int = 0) -> Packed:
    """Random rows through the real encoders, with a codec of the shipped kind: whitened, rotated, a mean taken off.

    Codes are the nearest ones: error feedback chooses others, of the same number and form. Beyond 2048 rows they
    repeat.

    Args:
        shape: of the layer.
        tokens: a multiple of 32.
        k_bits, v_bits: code bits per coordinate.
        seed: of the numbers.

    Raises:
        ValueError: on another number of tokens.

    Example:
        >>> from headq_ao.evals.bench_rows import Shape, random_packed
        >>> packed = random_packed(Shape(4, 2, 64), 64, k_bits=2, v_bits=2)
        >>> packed.n_bytes * 8 / (2 * 2 * 64 * 64)  # bits per element, scales included
        2.25
    """
    if tokens < 1 or tokens % ROW_TILE:
        raise ValueError(f"contexts must be multiples of {ROW_TILE}, got {tokens}")
    g = torch.Generator().manual_seed(seed)
    heads, d, rows = shape.kv_heads, shape.head_dim, min(tokens, ENCODED)
    q = (SCORE_SPREAD * torch.randn(heads, shape.group, d, generator=g)).bfloat16().float()
    k, v = (torch.randn(1, heads, rows, d, generator=g) for _ in range(2))
    bases = []
    for _ in range(2):
        rotation = torch.linalg.qr(torch.randn(heads, d, d, generator=g))[0]
        spread = torch.exp(0.3 * torch.randn(heads, d, 1, generator=g))
        bases.append((rotation / spread, rotation * spread, 0.3 * torch.randn(heads, d, generator=g)))
    (key_encode, key_read, key_mean), (value_encode, value_read, value_mean) = bases
    step, ones = 3.4 / 2**k_bits, torch.ones(1, heads, d)
    planes, scale, _ = encode_keys(
        k, key_mean[None], key_encode[None], key_read[None], step * ones, [k_bits] * d, weight=ones
    )
    keys = Rows(planes=planes, bits=(k_bits,) * d, scale=scale)
    planes, scale, _ = encode_values(
        v, value_encode[None], v_bits, group_size=d, mean=value_mean[None], step=3.4 / 2**v_bits
    )
    values = Rows(planes=planes, bits=(v_bits,), scale=scale)
    keys, values = (repeated(x, tokens, key) for x, key in ((keys, True), (values, False)))
    return Packed(shape, q, keys, values, step, key_mean, key_read, value_mean, value_read)


def tensors(rows: Rows) -> list[Tensor]:
    """Planes and scale."""
    assert rows.scale is not None
    return [*rows.planes, rows.scale]


def cut(rows: Rows, first: int, last: int, key: bool) -> Rows:
    """Some rows of a segment, as views."""
    assert rows.scale is not None
    planes = []
    for plane in rows.planes:
        per_entry = rows.scale.shape[2] // plane.shape[2]
        planes.append(plane[:, :, first // per_entry : last // per_entry])
    return Rows(planes=planes, bits=rows.bits if key else (rows.bits[0],), scale=rows.scale[:, :, first:last])


def repeated(rows: Rows, tokens: int, key: bool) -> Rows:
    """The rows over and over, up to ``tokens``, in new memory."""
    assert rows.scale is not None
    times = -(-tokens // rows.scale.shape[2])
    many = [x.repeat(1, 1, times, *[1] * (x.ndim - 3)) for x in tensors(rows)]
    whole = cut(Rows(planes=many[:-1], bits=rows.bits, scale=many[-1]), 0, tokens, key)
    return Rows(
        planes=[x.contiguous() for x in whole.planes], bits=whole.bits, scale=many[-1][:, :, :tokens].contiguous()
    )


def exact_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """``Σ_j softmax_j(scaling · q·k_j) v_j`` in fp64, head by head: ``[Hkv, G, D]``."""
    heads = []
    for query, keys, values in zip(q, k, v, strict=True):
        a = (query.double() @ keys.double().T * scaling).softmax(-1)
        heads.append(a @ values.double())
    return torch.stack(heads)


def relative_error(out: Tensor, exact: Tensor) -> float:
    """``‖out − exact‖ / ‖exact‖``."""
    return float((out.double() - exact.double()).norm() / exact.double().norm())


def check(name: str, out: Tensor, exact: Tensor, limit: float, where: str) -> float:
    """The relative error of an output.

    Raises:
        CheckFailedError: when it is above the limit, or not a number.
    """
    error = relative_error(out, exact)
    if not error <= limit:
        raise CheckFailedError(
            f"{name} at {where}: output differs from exact attention over the same rows by {error:.2g} (relative), "
            f"more than {limit:g}; its time is not reported"
        )
    return error


compiled_reference = reference.decode_attention  # what attend_compiled's caller compiles
