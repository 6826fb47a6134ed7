"""Random packed tokens for the decode benchmark, what they stand for, and the check that lets it report."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headq_ao.codecs.base import GAUSSIAN_STEP, MOST_BYTE_BITS
from headq_ao.evals.benchmarks.bench_result import CheckFailedError
from headq_ao.ops import Encoder, cache_update, paged_attention, plan_attention
from headq_ao.ops.page_layout import GroupLayout, PageLayout, Side
from headq_ao.ops.paged_attention import reference
from headq_ao.ops.types import PagedKV, Readers

ENCODED = 2048  # tokens that are really encoded; longer contexts repeat them, which no kernel can tell
PAGE = 32  # tokens, as caches have them by default; contexts are multiples of it
SCORE_SPREAD = 2.0  # standard deviation of the random scores, in nats
LIMIT = 1e-3  # of the relative error of packed attention
BF16_LIMIT = 1e-2  # of baselines, which round keys, values and, most of them, weights and output to bf16


@dataclass(frozen=True)
class Shape:
    """Query heads, KV heads and head_dim of an attention layer.

    Example:
        >>> from headq_ao.evals.benchmarks.bench_rows import Shape
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
    """Packed tokens of one layer, batch 1, with the bases that they are written in, and a query.

    ``q [Hkv, G, D]`` fp32 with bf16 values; ``kv`` without a token in its window; ``key_mean [Hkv, D]``, ``key_read``
    ``[Hkv, D, D]``; ``k_hat = key_mean + σ·step·(c − c0) @ key_readᵀ``; values as ``readers`` take them back.
    """

    shape: Shape
    q: Tensor
    kv: PagedKV
    readers: Readers
    step: float
    key_mean: Tensor
    key_read: Tensor

    @property
    def tokens(self) -> int:
        """Per KV head."""
        return self.kv.table.shape[1] * PAGE

    @property
    def n_bytes(self) -> int:
        """What attention reads: codes and scales of all KV heads."""
        return sum(x[1:].nbytes for x in self.kv.pages)

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """``k_hat``, ``v_hat`` ``[Hkv, T, D]`` fp32."""
        (group,) = PageLayout.parse(self.kv.layout).split(self.kv.pages)
        assert group.keys.scale is not None and self.readers.read is not None and self.readers.mean is not None
        table = self.kv.table.long()
        codes = reference.gathered(group.keys, table, torch.float32, keys=True)[0]
        scale = reference.numbers(group.keys.scale, table, torch.float32)[0, :, :, None] * self.step
        k_hat = (codes - (2 ** group.keys.bits[0] - 1) / 2) * scale @ self.key_read.mT + self.key_mean[:, None]
        y_hat = reference.gathered(group.values, table, torch.float32, keys=False)
        return k_hat, (y_hat @ self.readers.read.mT)[0] + self.readers.mean[0, :, None]

    def attend(self, kv: PagedKV | None = None) -> Callable[[], Tensor]:
        """Attention of the query by :func:`headq_ao.ops.paged_attention`, planned once, ``[1, Hq, 1, D]``; over a copy
        of the tokens, where one is given."""
        kv, q = self.kv if kv is None else kv, self.q.reshape(1, self.shape.heads, 1, -1)
        step, scaling = plan_attention(kv, self.readers, self.shape.heads), self.shape.scaling
        if step is None:
            return lambda: paged_attention(q, scaling, kv, self.readers)[0]
        return lambda: step(q, scaling)

    def attend_compiled(
        self, compiled: Callable[..., tuple[Tensor, Tensor]], kv: PagedKV | None = None
    ) -> Callable[[], Tensor]:
        """The same by the operator's reference under torch.compile."""
        kv, q = self.kv if kv is None else kv, self.q.reshape(1, self.shape.heads, 1, -1)
        return lambda: compiled(q, self.shape.scaling, kv, self.readers)[0]

    def copies(self, n: int) -> list[PagedKV]:
        """``n`` copies of the tokens, each in memory of its own."""
        return [dataclasses.replace(self.kv, pages=[x.clone() for x in self.kv.pages]) for _ in range(n)]


def random_packed(shape: Shape, tokens: int, k_bits: int, v_bits: int, seed: int = 0) -> Packed:
    """Random tokens through the real encoders, with a codec of the shipped kind: whitened, rotated, a mean taken off.

    Error feedback is that of equal directions: another metric chooses other codes, of the same number and form. Beyond
    2048 tokens they repeat.

    Args:
        shape: of the layer.
        tokens: a multiple of 32.
        k_bits, v_bits: code bits per coordinate.
        seed: of the numbers.

    Raises:
        ValueError: on another number of tokens.

    Example:
        >>> from headq_ao.evals.benchmarks.bench_rows import Shape, random_packed
        >>> packed = random_packed(Shape(4, 2, 64), 64, k_bits=2, v_bits=2)
        >>> packed.n_bytes * 8 / (2 * 2 * 64 * 64)  # bits per element, scales included
        2.125
    """
    if tokens < 1 or tokens % PAGE:
        raise ValueError(f"contexts must be multiples of {PAGE}, got {tokens}")
    g = torch.Generator().manual_seed(seed)
    heads, d = shape.kv_heads, shape.head_dim
    q = (SCORE_SPREAD * torch.randn(heads, shape.group, d, generator=g)).bfloat16().float()
    k, v = (torch.randn(1, heads, min(tokens, ENCODED), d, generator=g) for _ in range(2))
    bases = []
    for _ in range(2):
        rotation = torch.linalg.qr(torch.randn(heads, d, d, generator=g))[0]
        spread = torch.exp(0.3 * torch.randn(heads, d, 1, generator=g))
        bases.append((rotation / spread, rotation * spread, 0.3 * torch.randn(heads, d, generator=g)))
    (key_encode, key_read, key_mean), (value_encode, value_read, value_mean) = bases
    encoders, eye = [], torch.eye(d)[None, None]
    for bits, encode, mean in ((k_bits, key_encode, key_mean), (v_bits, value_encode, value_mean)):
        steps, scale_bits = torch.full((1, heads, d), GAUSSIAN_STEP[bits]), 8 if bits <= MOST_BYTE_BITS else 16
        encoders.append(Encoder(encode[None], (bits,), steps, mean=mean[None], hessian=eye, scale_bits=scale_bits))
    key_encoder, value_encoder = encoders
    step, value_read = GAUSSIAN_STEP[k_bits], value_read * GAUSSIAN_STEP[v_bits]
    sides = Side((k_bits,) * d, scale_bits=key_encoder.scale_bits), Side((v_bits,), scale_bits=value_encoder.scale_bits)
    layout = PageLayout(PAGE, d, d, (GroupLayout(0, heads, *sides),))
    kv = packed_pages(layout, tokens, k, v, key_encoder, value_encoder)
    codes = key_read * step
    bias, nothing = -codes.sum(-1, keepdim=True) * (2**k_bits - 1) / 2, torch.zeros(heads, d, 1)
    query_map = torch.cat([codes, bias, nothing, key_mean[..., None]], -1)
    return Packed(
        shape, q, kv, Readers(query_map[None, None], value_read[None], value_mean[None]), step, key_mean, key_read
    )


def packed_pages(
    layout: PageLayout, tokens: int, k: Tensor, v: Tensor, key_encoder: Encoder, value_encoder: Encoder
) -> PagedKV:
    """A cache of one sequence of ``tokens`` packed tokens, ``k`` and ``v`` over and over."""
    columns, given = tokens // PAGE, k.shape[2]
    pages = layout.allocate(columns + 1, torch.float32, torch.device("cpu"))

    def length(n: int) -> Tensor:
        return torch.full((1,), n, dtype=torch.int64)

    window_k, window_v = (torch.zeros(1, layout.kv_heads, 1, d) for d in (layout.key_dim, layout.value_dim))
    table = torch.arange(1, columns + 1, dtype=torch.int32)[None]
    empty = PagedKV(pages, layout.spec, table, None, length(0), length(0), length(given), window_k, window_v, 0)
    cache_update(empty, k, v, length(given), given, [key_encoder], [value_encoder])
    for x in pages:
        x[1:] = x[1 + torch.arange(columns) % (given // PAGE)]
    return dataclasses.replace(empty, packed=length(tokens), held=length(tokens), total=length(tokens))


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
            f"{name} at {where}: output differs from exact attention over the same tokens by {error:.2g} (relative), "
            f"more than {limit:g}; its time is not reported"
        )
    return error
