"""From statistics to the codecs of keys and values: bases, steps, and the map of a query into their coordinates."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from headq_ao.ambient import mode_neutral
from headq_ao.config import HeadQConfig
from headq_ao.ops import MappedQuery, encode_keys, encode_values, unit_factor
from headq_ao.ops.decode_attention.reference import dequantize_values, read_back
from headq_ao.ops.layout import PIECES, plane_pieces, unpack_keys
from headq_ao.state import int_tensor

# Distance of the levels of the uniform quantizer with least squared error on a unit normal (Max, 1960).
GAUSSIAN_STEP = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 8: 0.0308}
RIDGE = 1e-6  # of the largest eigenvalue of C_q
VISIBLE_RIDGE = 1.0  # of the mean eigenvalue of a calibration's C_q: other queries see other errors
PROMPT_RIDGE = 0.1  # of the mean eigenvalue of a prompt's own C_q
SPREAD_RIDGE = 1e-4  # of the mean eigenvalue of a covariance
SEEN_RANK = 16  # directions of a prompt's own C_q that are kept
STEP_GRID = tuple(0.6 + 0.1 * i for i in range(20))

AnyCodec = TypeVar("AnyCodec", "KeyCodec", "ValueCodec")


class Codec:
    """What codecs share: tensors as fields, their leading dimensions ``[B or 1, Hkv or 1]``.

    Heads may have different bits, ``head_bits [Hkv]``; it is empty where all have the same. Rows are coded run by run
    (:func:`runs_of`); a map of queries and a readout serve all heads at once.
    """

    head_bits: tuple[int, ...]
    parts: dict[tuple[int, int], Any]

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by field name."""
        pairs = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))  # type: ignore[arg-type]
        return {name: value for name, value in pairs if isinstance(value, Tensor)}

    def replace(self, tensors: dict[str, Tensor]) -> Self:
        """A copy with some tensors exchanged."""
        return dataclasses.replace(self, **tensors)  # type: ignore[type-var]

    def of_heads(self, part: slice) -> Self:
        """The codec of some of its KV heads, its tensors contiguous."""
        cut = self.part(part)
        return cut.replace({name: t.contiguous() for name, t in cut.tensors().items()})

    def part(self, heads: slice) -> Self:
        """The codec of some of its KV heads, over the same memory; made once."""
        found = self.parts.get((heads.start, heads.stop))
        if found is None:
            cut = self.replace({name: t[:, heads] for name, t in self.tensors().items() if t.shape[1] > 1})
            found = self.parts[heads.start, heads.stop] = cut.with_bits(self.head_bits[heads])
        return found

    def with_bits(self, head_bits: tuple[int, ...]) -> Self:
        """A copy whose heads have those bits; itself where none are given."""
        raise NotImplementedError


@dataclass(frozen=True)
class KeyCodec(Codec):
    """How the keys of one epoch are written and read. Leading dimensions are ``[B or 1, Hkv or 1]``.

    ``mean [.., D]``, ``encode``/``read`` ``[.., D, M0]``, ``step [.., M0]``, ``weight [.., M0]`` or None (affine),
    ``side_encode``/``side_read`` ``[.., D, R]`` and ``side_step [.., R]`` or None, ``bits`` of the M0 + R coordinates.
    ``metric [.., M0, M0]``, how an error of the coordinates is seen, turns error feedback on. The visible basis of a
    prompt's own statistics comes without matrices of its own: ``spread [.., D]`` stretches the basis
    (``diag(spread) @ read``, ``diag(1/spread) @ encode``), and ``seen [.., D, r]`` stands for ``C_q ∝ I + seen seenᵀ``.
    ``unit [.., 1]`` (:mod:`headq_ao.units`): all this is of ``k / unit``; None: of the keys as they are.
    ``own`` names the tensors that belong to the sequences of a batch: indexed with it, and charged to it.
    ``head_bits``: of the base of each KV head, where they differ; ``bits`` are then those of the first.
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
    metric: Tensor | None = None
    spread: Tensor | None = None
    seen: Tensor | None = None
    unit: Tensor | None = None
    mapped: Tensor | None = None  # query_map, where it is kept
    head_bits: tuple[int, ...] = ()
    parts: dict[tuple[int, int], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by field name, without the kept map."""
        return {name: x for name, x in super().tensors().items() if name != "mapped"}

    def index(self, rows: Tensor) -> "KeyCodec":
        """The codec of those batch rows."""
        if not self.own:
            return self
        return self.replace(
            {n: t.index_select(0, rows.to(t.device)) for n, t in self.tensors().items() if n in self.own}
        )

    def replace(self, tensors: dict[str, Tensor]) -> Self:
        """A copy with other tensors and no kept map; a side basis that reads as it encodes stays one tensor."""
        if self.side_read is self.side_encode and "side_encode" in tensors:
            tensors = tensors | {"side_read": tensors["side_encode"]}
        return dataclasses.replace(self, mapped=None, **tensors)  # type: ignore[arg-type]

    def with_bits(self, head_bits: tuple[int, ...]) -> "KeyCodec":
        """A copy whose bases have those bits, by KV head; their steps are in ``step`` already."""
        if not head_bits:
            return self
        base = self.read.shape[-1]
        bits = (head_bits[0],) * base + self.bits[base:]
        return dataclasses.replace(self, bits=bits, head_bits=head_bits if len(set(head_bits)) > 1 else ())

    def encode_rows(self, k: Tensor, unbiased: bool) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """:func:`headq_ao.ops.encode_keys` with this codec, whose heads have the same bits."""
        encode = self.encode if self.spread is None else self.encode / self.spread.float().unsqueeze(-1)
        k = k if self.unit is None else k / self.unit.unsqueeze(-1)
        return encode_keys(
            k, self.mean, encode, self.reader, self.step, self.bits, weight=self.weight, metric=self.error_metric(),
            factor=self.factor, side_encode=self.side_encode, side_step=self.side_step, unbiased=unbiased,
        )  # fmt: skip

    @property
    def row_bits(self) -> tuple[int, ...]:
        """What :class:`headq_ao.ops.Rows` of these rows calls ``bits``."""
        return self.bits

    @property
    def planes(self) -> int:
        """How many planes a row has."""
        return len(plane_pieces(self.bits))

    @property
    def has_zero(self) -> bool:
        """Whether a row stores a zero beside its scale."""
        return self.weight is None

    @functools.cached_property
    def factor(self) -> Tensor | None:
        """:func:`headq_ao.ops.unit_factor` of the metric, kept: it takes as long as the codes of a block."""
        return None if self.metric is None else unit_factor(self.metric)

    @property
    def reader(self) -> Tensor:
        """``[.., D, M0]``: ``(q @ reader)·ŷ`` is what the coordinates ``ŷ`` add to a score, by the unit."""
        return self.read if self.spread is None else self.read * self.spread.float().unsqueeze(-1)

    def error_metric(self) -> Tensor | None:
        """``readerᵀ C_q reader`` ``[.., M0, M0]``, or None: every code is the nearest."""
        if self.seen is None:
            return self.metric
        read = self.reader.float()
        shown = read.transpose(-1, -2) @ self.seen.float()
        return read.transpose(-1, -2) @ read + shown @ shown.transpose(-1, -2)

    def map_query(self, q: Tensor, scaling: float, sign: int = 1) -> MappedQuery:
        """``q [B, Hq, S, D]`` in the coordinates of the codes, so that a score is one dot product of integers.

        ``k_hat = mean + zero·1 + σ·step·(c − c0)`` in the base and ``(q @ P)·z`` for the side code give
        ``s = σ (q̃·c + b) + m h + q·μ`` with ``q̃ = [(q @ read)·step, sign·(q @ side_read)·side_step]``.
        """
        q = MappedQuery.scaled(q, scaling)
        mapping, (b, hq, s, head_dim) = self.query_map(sign, q.dtype), q.shape
        grouped = q.reshape(b, self.mean.shape[1], -1, head_dim)  # [B, Hkv, G·S, D]
        if b > 1 and mapping.shape[0] == 1:  # one product for each head: a batched one would copy the mapping
            mapped = (grouped.transpose(0, 1).flatten(1, 2) @ mapping[0]).unflatten(1, (b, -1)).transpose(0, 1)
        else:
            mapped = grouped @ mapping
        mapped = mapped.reshape(b, hq, s, -1)
        return MappedQuery(mapped[..., :-3], *mapped[..., -3:].unbind(-1))

    def query_map(self, sign: int, dtype: torch.dtype) -> Tensor:
        """``[.., D, M + 3]``: what takes a scaled query to ``q̃``, ``b``, ``h`` and ``q·μ`` in one product."""
        if self.mapped is not None and self.mapped.dtype == dtype:
            return self.mapped
        read, step = self.reader.to(dtype), self.step.to(dtype)
        columns = [read * step.unsqueeze(-2)]
        if self.side_read is not None and self.side_step is not None:
            columns.append(self.side_read.to(dtype) * (sign * self.side_step.to(dtype)).unsqueeze(-2))
        mean = self.mean.to(dtype).unsqueeze(-1)
        lead = torch.broadcast_shapes(mean.shape[:2], *(c.shape[:2] for c in columns))
        codes = torch.cat([c.expand(*lead, -1, -1) for c in columns], -1)
        rest = [-codes @ self.centre(codes).unsqueeze(-1), read.sum(-1, keepdim=True), mean]
        mapping = torch.cat([codes, *(x.expand(*lead, -1, -1) for x in rest)], -1)
        return mapping if self.unit is None else mapping * self.unit.to(dtype).unsqueeze(-1)

    def centre(self, like: Tensor) -> Tensor:
        """The code that stands for zero, ``[M]`` or ``[Hkv, M]``: 0 where rows store a zero, else the middle level."""
        base = self.read.shape[-1]
        of_heads = [(b,) * base + self.bits[base:] for b in self.head_bits] or [self.bits]
        middle = (2 ** int_tensor(of_heads, like.device) - 1).to(like.dtype) / 2
        if self.weight is None:
            middle[:, :base] = 0.0
        return middle if self.head_bits else middle[0]

    def dequantize(self, planes: list[Tensor], scale: Tensor, zero: Tensor | None, side: int = 1) -> Tensor:
        """``k_hat + side · P z`` of packed rows, ``[B, Hkv, T, D]`` fp32; with ``side`` 0, ``k_hat`` alone.

        For heads of the same bits.
        """
        codes = unpack_keys(planes, self.bits).float()
        codes = (codes - self.centre(codes)) * scale.float()[..., None]
        base = self.read.shape[-1]
        y_hat = codes[..., :base] * self.step.float().unsqueeze(-2)
        if zero is not None:
            y_hat = y_hat + zero.float()[..., None]
        k_hat = self.mean.float().unsqueeze(-2) + y_hat @ self.reader.float().transpose(-1, -2)
        if side and self.side_read is not None and self.side_step is not None:
            z = codes[..., base:] * (side * self.side_step.float()).unsqueeze(-2)
            k_hat = k_hat + z @ self.side_read.float().transpose(-1, -2)
        return k_hat if self.unit is None else k_hat * self.unit.unsqueeze(-1)


@functools.lru_cache(maxsize=32)
@mode_neutral
def rotation_matrix(head_dim: int, hadamard: bool = True) -> Tensor:
    """Orthogonal ``[D, D]`` fp32 that mixes all coordinates: Hadamard ⊗ DCT of the odd part of D; or the identity.

    Example:
        >>> from headq_ao.codec import rotation_matrix
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
    base = base_codec(config, mean if config.key_gauge else torch.zeros_like(mean))
    return with_side_code(config, base, c_q, rows)


def with_side_code(config: HeadQConfig, base: KeyCodec, c_q: Tensor, rows: Tensor) -> KeyCodec:
    """``base`` with a side code of its error on ``rows``; ``base`` itself at rank 0."""
    mean, rank = base.mean, config.side_rank(base.mean.shape[-1])
    if rank == 0:
        return base
    planes, scale, zero = base.encode_rows(rows, config.unbiased_scale)
    k_err = rows.to(mean.dtype) - base.dequantize(planes, scale, zero).to(mean.dtype)
    encode, read = side_basis(config, rank, c_q, rows.to(mean.dtype), k_err)
    z = (k_err @ encode) / scale.to(mean.dtype)[..., None]
    bits = config.key_bits(mean.shape[-1])
    return dataclasses.replace(
        base, side_encode=encode, side_read=read, side_step=fit_steps(z, config.side_bits), bits=bits
    )


def visible_codec(config: HeadQConfig, c_q: Tensor, mean: Tensor, covariance: Tensor) -> KeyCodec:
    """A base with equal bits for each coordinate of ``y = (k − mean) C_k^{−τ/2} R``, rounded with error feedback.

    The whitening ``C_k^{−τ/2}`` evens out the coordinates, the Hadamard rotation ``R`` mixes them, and codes are
    chosen for a small ``(y − ŷ)ᵀ M (y − ŷ)``, ``M = Rᵀ C_k^{τ/2} C_q C_k^{τ/2} R``: the error that the scores show.
    With τ = 1 and a fine code the error is that of reverse water-filling, ``det(C_q C_k)^{1/D} 2^{−2b}``, though every
    coordinate has the same bits.

    Args:
        config: what to build.
        c_q: ``C_q``, ``[B or 1, Hkv, D, D]``.
        mean, covariance: of the keys, ``[B or 1, Hkv, D]`` and ``[B or 1, Hkv, D, D]``.
    """
    base = base_codec(config, mean if config.key_gauge else torch.zeros_like(mean))
    encode, read = whitening(covariance, config.whitening, base.read)
    metric = read.transpose(-1, -2) @ ridged(c_q, VISIBLE_RIDGE) @ read if config.error_feedback else None
    return dataclasses.replace(base, encode=encode, read=read, metric=metric)


def prompt_visible_codec(config: HeadQConfig, c_q: Tensor, mean: Tensor, variance: Tensor) -> KeyCodec:
    """:func:`visible_codec` in the little that a sequence can afford: variances ``[B, Hkv, D]`` instead of a
    covariance, and the leading :data:`SEEN_RANK` directions of ``C_q``."""
    base = base_codec(config, mean if config.key_gauge else torch.zeros_like(mean))
    ridge = SPREAD_RIDGE * variance.mean(-1, keepdim=True)
    spread = (variance + ridge).clamp(min=1e-12).pow(config.whitening / 2)
    spread = spread / spread.log().mean(-1, keepdim=True).exp()  # around 1, as fp16 likes it
    seen = None
    if config.error_feedback:
        values, vectors = _eigh(ridged(c_q, PROMPT_RIDGE))
        rank = min(SEEN_RANK, values.shape[-1] // 2)
        floor = values[..., :-rank].mean(-1, keepdim=True).clamp(min=1e-30)
        seen = (vectors[..., -rank:] * (values[..., -rank:] / floor - 1).clamp(min=0).sqrt()[..., None, :]).to(
            mean.dtype
        )
    return dataclasses.replace(base, spread=spread.to(mean.dtype), seen=seen)


def whitening(matrix: Tensor, power: float, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """``C^{−τ/2} R`` and ``C^{τ/2} R`` for symmetric matrices ``[.., D, D]`` and an orthogonal ``R``."""
    values, vectors = _eigh(ridged(matrix, SPREAD_RIDGE))
    values, r = values.clamp(min=1e-30), rotation.to(values)
    encode, read = (
        (vectors * values.pow(p / 2)[..., None, :]) @ vectors.transpose(-1, -2) @ r for p in (-power, power)
    )
    return encode.to(matrix.dtype), read.to(matrix.dtype)


def centred_moment(mean: Tensor, outer: Tensor) -> Tensor:
    """``E[x xᵀ] − μ μᵀ`` ``[.., D, D]``."""
    return outer - mean[..., :, None] * mean[..., None, :]


def ridged(matrix: Tensor, share: float) -> Tensor:
    """The matrix with that share of its mean eigenvalue added to all of them."""
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-20)[..., None, None]
    return matrix + share * mean * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


@dataclass(frozen=True)
class ValueCodec(Codec):
    """How values are written and read: ``encode``/``read`` ``[1, Hkv or 1, D, D]``; ``mean [1, Hkv, D]`` or None.

    ``metric [1, Hkv, D, D]``, how an error of the coordinates reaches the output, turns error feedback on.
    ``head_bits``: of each KV head, where they differ; ``bits`` and ``step`` are then those of the first.
    ``unit [B, Hkv, 1]`` (:mod:`headq_ao.units`), of sequences without a mean: all this is of ``v / unit``; None: of the
    values as they are.
    """

    encode: Tensor
    read: Tensor
    bits: int
    group_size: int
    step: float
    unbiased: bool
    mean: Tensor | None = None
    metric: Tensor | None = None
    unit: Tensor | None = None
    head_bits: tuple[int, ...] = ()
    parts: dict[tuple[int, int], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def in_unit(self, unit: Tensor) -> "ValueCodec":
        """The codec of values ``unit [1, Hkv, 1]`` times as large, in the same codes and scales."""
        by = unit[..., None]
        mean = None if self.mean is None else self.mean * unit
        return dataclasses.replace(self, encode=self.encode / by, read=self.read * by, mean=mean)

    def with_bits(self, head_bits: tuple[int, ...]) -> "ValueCodec":
        """A copy with those bits, by KV head, and the steps that go with them."""
        if not head_bits:
            return self
        bits, mixed = head_bits[0], len(set(head_bits)) > 1
        step = GAUSSIAN_STEP[bits] if self.step else 0.0
        return dataclasses.replace(self, bits=bits, step=step, head_bits=head_bits if mixed else ())

    def encode_rows(self, v: Tensor) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """:func:`headq_ao.ops.encode_values` with this codec, whose heads have the same bits."""
        v = v if self.unit is None else v / self.unit.unsqueeze(-1)
        return encode_values(
            v, self.encode, self.bits, group_size=self.group_size, mean=self.mean, metric=self.metric,
            factor=self.factor, step=self.step, unbiased=self.unbiased,
        )  # fmt: skip

    @property
    def row_bits(self) -> tuple[int, ...]:
        """What :class:`headq_ao.ops.Rows` of these rows calls ``bits``."""
        return (self.bits,)

    @property
    def planes(self) -> int:
        """How many planes a row has."""
        return len(PIECES[self.bits])

    @property
    def has_zero(self) -> bool:
        """Whether a row stores a zero beside its scale."""
        return not self.step

    @functools.cached_property
    def factor(self) -> Tensor | None:
        """:func:`headq_ao.ops.unit_factor` of the metric, kept."""
        return None if self.metric is None else unit_factor(self.metric)

    @functools.cached_property
    def reader(self) -> Tensor:
        """``read`` by the unit, kept: ``[B or 1, Hkv or 1, D, D]``."""
        return self.read if self.unit is None else self.read * self.unit.unsqueeze(-1)

    def index(self, rows: Tensor) -> "ValueCodec":
        """The codec of those batch rows."""
        unit = self.unit
        return self if unit is None else self.replace({"unit": unit.index_select(0, rows.to(unit.device))})

    def own_tensors(self) -> list[Tensor]:
        """Those that belong to the sequences of a batch: the unit, and ``reader`` once it was asked for."""
        if self.unit is None:
            return []
        return [self.unit, self.reader] if "reader" in vars(self) else [self.unit]

    def dequantize(self, planes: list[Tensor], scale: Tensor, zero: Tensor | None) -> Tensor:
        """``v_hat`` of packed rows in the model's basis, ``[B, Hkv, T, D]`` fp32."""
        return dequantize_value_rows(planes, self.bits, scale, zero, self.reader, self.mean)

    def readout(self, out: Tensor) -> Tensor:
        """``Σ_j a_j v̂_j`` from ``Σ_j a_j ŷ_j`` ``[B, Hq, S, D]``, the weights of these rows summing to one."""
        return read_back(out, self.reader, self.mean)


@dataclass(frozen=True)
class Run:
    """Neighbouring KV heads whose rows have the same form, and their codecs; None where a side is exact."""

    heads: slice
    keys: KeyCodec | None
    values: ValueCodec | None


def runs_of(keys: KeyCodec | None, values: ValueCodec | None) -> list[Run]:
    """The heads of a layer in as few runs as their bits allow.

    Example:
        >>> import torch
        >>> from headq_ao.codec import base_codec, runs_of
        >>> from headq_ao.config import HeadQConfig
        >>> codec = base_codec(HeadQConfig(), torch.zeros(1, 3, 16))
        >>> [run.heads for run in runs_of(codec.with_bits((3, 3, 1)), None)]
        [slice(0, 2, None), slice(2, 3, None)]
    """
    bits = [codec.head_bits for codec in (keys, values) if codec is not None and codec.head_bits]
    if not bits:
        return [Run(slice(None), keys, values)]
    runs, start = [], 0
    for _, group in itertools.groupby(zip(*bits, strict=True)):
        heads = slice(start, start + len(list(group)))
        runs.append(Run(heads, keys and keys.part(heads), values and values.part(heads)))
        start = heads.stop
    return runs


def by_head(codecs: Mapping[int, AnyCodec], head_bits: tuple[int, ...]) -> AnyCodec:
    """One codec for heads of different bits.

    Args:
        codecs: of all heads, by bits.
        head_bits: of each head.
    """
    first = codecs[head_bits[0]]
    tensors: dict[str, Tensor] = {}
    for name, t in first.tensors().items():
        if len(codecs) > 1 and (t.shape[1] > 1 or name == "step"):
            all_heads = (codecs[b].tensors()[name].expand(-1, len(head_bits), *t.shape[2:]) for b in head_bits)
            tensors[name] = torch.cat([x[:, h : h + 1] for h, x in enumerate(all_heads)], 1)
    return first.replace(tensors).with_bits(head_bits)


def dequantize_value_rows(
    planes: list[Tensor], bits: int, scale: Tensor, zero: Tensor | None, read: Tensor, mean: Tensor | None
) -> Tensor:
    """``v_hat = ŷ readᵀ + mean`` of packed rows, ``[B, Hkv, T, D]`` fp32."""
    y_hat = dequantize_values(planes, bits, scale, zero, torch.float32)
    v_hat = y_hat @ read.float().transpose(-1, -2)
    return v_hat if mean is None else v_hat + mean.float().unsqueeze(-2)


def rotated_value_codec(config: HeadQConfig, head_dim: int) -> ValueCodec:
    """Nearest codes in a Hadamard-rotated basis."""
    bits, group = config.v_bits, config.v_group_size
    assert bits is not None
    rotation = rotation_matrix(head_dim, config.rotation)[None, None]
    step = 0.0 if config.v_zero_point else GAUSSIAN_STEP[bits]
    return ValueCodec(rotation, rotation, bits, head_dim if group is None else group, step, config.unbiased_scale)


def visible_value_codec(config: HeadQConfig, mean: Tensor, outer: Tensor) -> ValueCodec:
    """Equal bits for each coordinate of ``y = (v − mean) C_v^{−τ/2} R``, rounded with error feedback for a small
    ``‖v − v̂‖²``; statistics weighted by A², as values are seen.

    Args:
        config: what to build.
        mean, outer: of the values, ``[1, Hkv, D]`` and their second moment ``[1, Hkv, D, D]``.
    """
    base = rotated_value_codec(config, mean.shape[-1])
    encode, read = whitening(centred_moment(mean, outer), config.whitening, base.read)
    metric = read.transpose(-1, -2) @ read if config.error_feedback else None
    return dataclasses.replace(base, encode=encode, read=read, mean=mean, metric=metric)


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
