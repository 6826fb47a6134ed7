"""From statistics to the codecs of keys and values: bases, steps, and the map of a query into their coordinates."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from headq_ao.ops import Encoder, ldl_factor, quantize
from headq_ao.ops.rounding import highest_codes
from headq_ao.ops.types import SegmentFrame

# Distance of the levels of the uniform quantizer with least squared error on a unit normal (Max, 1960).
GAUSSIAN_STEP = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 8: 0.0308}

# Code bits up to which a scale may be in a byte: beyond, the rounding of the scale shows beside that of the codes.
MOST_BYTE_BITS = 4

AnyCodec = TypeVar("AnyCodec", "KeyCodec", "ValueCodec")


def scale_bits(byte_scales: bool, bits: int) -> int:
    """That the scale of a token with so many code bits is stored in, where ``byte_scales`` are in use or not."""
    return 8 if byte_scales and bits <= MOST_BYTE_BITS else 16


class Codec:
    """What codecs share: tensors as fields, their leading dimensions ``[B or 1, Hkv or 1]``.

    Heads may have different bits, ``head_bits [Hkv]``; it is empty where all have the same. Rows are coded run by run
    (:func:`head_groups`); a map of queries and a readout serve all heads at once.
    """

    head_bits: tuple[int, ...]
    byte_scales: bool
    parts: dict[tuple[int, int], Any]

    def scale_bits_of(self, bits: int) -> int:
        """That the scale of a token is stored in, whose codes have so many bits."""
        return scale_bits(self.byte_scales, bits)

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
    """How the keys of a segment are written and read. Leading dimensions are ``[B or 1, Hkv or 1]``.

    ``mean [.., D]``, ``encode``/``read`` ``[.., D, M0]``, ``step [.., M0]``; ``symmetric``: levels stand
    around the mean, without a zero; ``side_encode``/``side_read`` ``[.., D, R]`` and ``side_step [.., R]`` or None;
    ``bits`` of the M0 + R coordinates. ``hessian [.., M0, M0]`` of the score error turns error feedback on.
    The basis of a prompt's own statistics has no matrices of its own: ``spread [.., D]`` stretches the shared basis
    (``diag(spread) @ read``, ``diag(1/spread) @ encode``), and ``q_factor [.., D, r]`` stands for ``C_q ∝ I + F Fᵀ``.
    ``unit [.., 1]`` (:mod:`headq_ao.statistics.units`): all this is of ``k / unit``; None: of the keys as they are.
    ``own`` names the tensors that belong to the sequences of a batch: indexed with it, and charged to it.
    ``head_bits``: of the base of each KV head, where they differ; ``bits`` are then those of the first.
    ``byte_scales``: whether scales of up to :data:`MOST_BYTE_BITS` code bits are in a byte
    (:mod:`headq_ao.ops.rounding`).
    """

    mean: Tensor
    encode: Tensor
    read: Tensor
    step: Tensor
    symmetric: bool
    side_encode: Tensor | None
    side_read: Tensor | None
    side_step: Tensor | None
    bits: tuple[int, ...]
    own: frozenset[str] = frozenset()
    hessian: Tensor | None = None
    spread: Tensor | None = None
    q_factor: Tensor | None = None
    unit: Tensor | None = None
    mapped: Tensor | None = None  # query_map, where it is kept
    head_bits: tuple[int, ...] = ()
    byte_scales: bool = False
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

    def encoder(self, unbiased: bool, frame: SegmentFrame | None = None) -> Encoder:
        """How tokens are written, of heads with the same bits; ``frame``: that they are taken into first."""
        encode = self.encode if self.spread is None else self.encode / self.spread.float().unsqueeze(-1)
        side = self.side_encode is not None
        return Encoder(
            encode, self.bits, self.step if self.symmetric else None, mean=self.mean, unit=self.unit,
            hessian=self.error_hessian(), ldl=self.factor, read=self.reader if side else None,
            side_encode=self.side_encode, side_step=self.side_step, unbiased=unbiased, scale_bits=self.scale_bits,
            frame=frame,
        )  # fmt: skip

    def quantize(self, k: Tensor, unbiased: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes ``[B, h, n, M]`` uint8 of keys ``[B, h, n, D]``, scales and zeros ``[B, h, n]``, of heads with the same
        bits."""
        codes, scale, zero = quantize(k, self.encoder(unbiased))
        return codes, scale[..., 0], None if zero is None else zero[..., 0]

    def own_tensors(self) -> dict[str, Tensor]:
        """Those that belong to the sequences of a batch; a side basis that reads as it encodes is one."""
        own = {name: t for name, t in self.tensors().items() if name in self.own}
        if self.side_read is self.side_encode:
            own.pop("side_read", None)
        return own

    def owning(self, names: frozenset[str]) -> "KeyCodec":
        """A copy whose tensors of those names belong to the sequences."""
        return dataclasses.replace(self, own=names)

    @property
    def has_zero(self) -> bool:
        """Whether a row stores a zero beside its scale."""
        return not self.symmetric

    @property
    def scale_bits(self) -> int:
        """That the scale of a row is stored in, of heads with the same bits."""
        return self.scale_bits_of(self.bits[0])

    @functools.cached_property
    def factor(self) -> Tensor | None:
        """:func:`headq_ao.ops.ldl_factor` of the hessian, kept: it takes as long as the codes of a block."""
        return None if self.hessian is None else ldl_factor(self.hessian)

    @property
    def reader(self) -> Tensor:
        """``[.., D, M0]``: ``(q @ reader)·ŷ`` is what the coordinates ``ŷ`` add to a score, by the unit."""
        return self.read if self.spread is None else self.read * self.spread.float().unsqueeze(-1)

    def error_hessian(self) -> Tensor | None:
        """``readerᵀ C_q reader`` ``[.., M0, M0]``, or None: every code is the nearest."""
        if self.q_factor is None:
            return self.hessian
        read = self.reader.float()
        shown = read.transpose(-1, -2) @ self.q_factor.float()
        return read.transpose(-1, -2) @ read + shown @ shown.transpose(-1, -2)

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

    def as_values(self) -> tuple[Tensor, Tensor]:
        """Of rows that are keys and values: what takes ``Σ_j a_j σ_j (c_j − c0)`` to ``Σ_j a_j x̂_j``, ``[.., D, D]``,
        and the mean ``[.., D]`` to be added."""
        read, mean = self.reader.float() * self.step.float().unsqueeze(-2), self.mean.float()
        return (read, mean) if self.unit is None else (read * self.unit.unsqueeze(-1), mean * self.unit)

    def centre(self, like: Tensor) -> Tensor:
        """The code that stands for zero, ``[M]`` or ``[Hkv, M]``: 0 where rows store a zero, else the middle level."""
        base = self.read.shape[-1]
        of_heads = [(b,) * base + self.bits[base:] for b in self.head_bits] or [self.bits]
        middle = torch.stack([highest_codes(bits, like) for bits in of_heads]) / 2
        if not self.symmetric:
            middle[:, :base] = 0.0
        return middle if self.head_bits else middle[0]

    def dequantize(self, codes: Tensor, scale: Tensor, zero: Tensor | None, side: int = 1) -> Tensor:
        """``k_hat + side · P z`` of :meth:`quantize`'s codes, ``[B, h, n, D]`` fp32; ``side`` 0: ``k_hat`` alone."""
        codes = codes.float()
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


@dataclass(frozen=True)
class ValueCodec(Codec):
    """How values are written and read: ``encode``/``read`` ``[1, Hkv or 1, D, D]``; ``mean [1, Hkv, D]`` or None.

    ``hessian [1, Hkv, D, D]``, how an error of the coordinates reaches the output, turns error feedback on.
    ``head_bits``: of each KV head, where they differ; ``bits`` and ``step`` are then those of the first.
    ``unit [B, Hkv, 1]`` (:mod:`headq_ao.statistics.units`), of sequences without a mean: all this is of ``v / unit``;
    None: of the values as they are.
    ``byte_scales``: as of keys. A scale in a byte is ``σ``, one in fp16 ``σ · step``.
    """

    encode: Tensor
    read: Tensor
    bits: int
    group_size: int
    step: float
    unbiased: bool
    mean: Tensor | None = None
    hessian: Tensor | None = None
    unit: Tensor | None = None
    head_bits: tuple[int, ...] = ()
    byte_scales: bool = False
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

    def encoder(self) -> Encoder:
        """How tokens are written, of heads with the same bits."""
        groups = 0 if self.group_size == self.read.shape[-2] else self.group_size
        step: Tensor | float | None = self.step or None
        if self.scale_bits == 8:
            step = self.encode.new_full((1, 1, self.encode.shape[-1]), self.step)
        return Encoder(
            self.encode, (self.bits,), step, groups, mean=self.mean, unit=self.unit, hessian=self.hessian,
            ldl=self.factor, unbiased=self.unbiased, scale_bits=self.scale_bits,
        )  # fmt: skip

    @property
    def has_zero(self) -> bool:
        """Whether a row stores a zero beside its scale."""
        return not self.step

    @property
    def scale_bits(self) -> int:
        """That the scale of a row is stored in, of heads with the same bits."""
        return self.scale_bits_of(self.bits)

    @functools.cached_property
    def factor(self) -> Tensor | None:
        """:func:`headq_ao.ops.ldl_factor` of the hessian, kept."""
        return None if self.hessian is None else ldl_factor(self.hessian)

    @property
    def reader(self) -> Tensor:
        """``read`` by the unit, and by what a stored scale lacks: ``[B or 1, Hkv or 1, D, D]``."""
        read = self.read if self.unit is None else self.read * self.unit.unsqueeze(-1)
        if not self.byte_scales:
            return read
        bits_of_heads = self.head_bits or (self.bits,)
        steps = [GAUSSIAN_STEP[bits] if self.scale_bits_of(bits) == 8 else 1.0 for bits in bits_of_heads]
        # made on its device: a sequence's own readers are made in each step, which must not wait for a copy
        return read * torch.cat([read.new_full((1, 1, 1), step) for step in steps])

    @property
    def own(self) -> frozenset[str]:
        """Names of tensors that belong to the sequences of a batch."""
        return frozenset() if self.unit is None else frozenset({"unit"})

    def index(self, sequences: Tensor) -> "ValueCodec":
        """The codec of those sequences."""
        unit = self.unit
        return self if unit is None else self.replace({"unit": unit.index_select(0, sequences.to(unit.device))})

    def own_tensors(self) -> dict[str, Tensor]:
        """Those that belong to the sequences of a batch."""
        return {} if self.unit is None else {"unit": self.unit}

    def owning(self, names: frozenset[str]) -> "ValueCodec":
        """The codec itself: its unit is a sequence's own wherever there is one."""
        return self

    def quantize(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes ``[B, h, n, D]`` uint8 of values, scales and zeros ``[B, h, n, groups]``, of heads alike in bits."""
        return quantize(v, self.encoder())

    def dequantize(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """``v_hat = ŷ readᵀ + mean`` of :meth:`quantize`'s codes, ``[B, h, n, D]`` fp32."""
        scale = scale.float()
        zero = -scale * ((2**self.bits - 1) / 2) if zero is None else zero.float()
        y_hat = (codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale[..., None] + zero[..., None]).flatten(-2)
        v_hat: Tensor = y_hat @ self.reader.float().transpose(-1, -2)
        return v_hat if self.mean is None else v_hat + self.mean.float().unsqueeze(-2)


@dataclass(frozen=True)
class HeadGroup:
    """Neighbouring KV heads whose rows have the same form, and their codecs; None where a side is exact."""

    heads: slice
    keys: KeyCodec | None
    values: ValueCodec | None


def head_groups(keys: KeyCodec | None, values: ValueCodec | None) -> list[HeadGroup]:
    """The heads of a layer in as few runs as their bits allow.

    Example:
        >>> import torch
        >>> from headq_ao.codecs.affine import base_codec
        >>> from headq_ao.codecs.base import head_groups
        >>> from headq_ao.config import HeadQConfig
        >>> codec = base_codec(HeadQConfig(), torch.zeros(1, 3, 16))
        >>> [run.heads for run in head_groups(codec.with_bits((3, 3, 1)), None)]
        [slice(0, 2, None), slice(2, 3, None)]
    """
    bits = [codec.head_bits for codec in (keys, values) if codec is not None and codec.head_bits]
    if not bits:
        return [HeadGroup(slice(None), keys, values)]
    runs, start = [], 0
    for _, group in itertools.groupby(zip(*bits, strict=True)):
        heads = slice(start, start + len(list(group)))
        runs.append(HeadGroup(heads, keys and keys.part(heads), values and values.part(heads)))
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


class HeadBits(NamedTuple):
    """Code bits of the KV heads of one layer, keys and values; empty where a side is exact."""

    k: tuple[int, ...]
    v: tuple[int, ...]
