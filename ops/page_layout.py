"""What a page holds: packed tokens of all KV heads of one layer, as plain tensors.

A page has ``P`` tokens. Neighbouring KV heads whose codes have the same form are one *head group*; all groups share
one block table. The tensors of a group, in the order of :meth:`PageLayout.split`, with ``N`` physical pages and ``h``
heads of the group, any of them with any stride of pages and heads:

- keys:   planes ``[N, h, P/16, N_w/(4·8/w), 16, 4]`` uint8, widest first, ``scale [N, h, P]`` fp16 or
  uint8, ``zero`` fp16;
- values: planes ``[N, h, P/(4·8/w), D/16, 16, 4]`` uint8, low bits first, ``scale [N, h, P, groups]``, ``zero`` alike;
- a side that is not coded: ``[N, h, P, D]`` in the model's dtype;
- values that are their keys (:data:`SHARED`): none; both are read from the keys' codes.

See :mod:`headq_ao.ops.layout` for the bits in a plane, :mod:`headq_ao.ops.rounding` for a scale in a byte. Physical
page 0 belongs to no sequence: operators write there what is to be thrown away, so that a step needs no decision on the
host.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby, islice

import torch
from torch import Tensor

from headq_ao.ops.layout import PIECES, key_plane_shapes, value_plane_shapes

NULL_PAGE = 0
ALIGNED = 16  # bytes, where the tensors of a page in one piece begin
# Forms of keys and values that heads of such pages have had so far (:attr:`PageLayout.known_forms`).
KNOWN_FORMS: dict[tuple[int, ...], dict[tuple["Side", "Side"], None]] = {}


@dataclass(frozen=True)
class Side:
    """The form of one side's tokens: ``bits`` of each stored coordinate (``()``: not coded), of values one number;
    ``zero``: a zero beside the scale; ``groups``: scales of a value, 0: values that are their keys; ``scale_bits``: of
    a scale, 16 or 8."""

    bits: tuple[int, ...] = ()
    zero: bool = False
    groups: int = 1
    scale_bits: int = 16

    @property
    def shared(self) -> bool:
        """Of values: whether a token is one row, stored as its key, and both are read from that."""
        return self.groups == 0

    @property
    def spec(self) -> str:
        runs = "+".join(f"{b}*{len(list(run))}" for b, run in groupby(self.bits))
        short = "" if self.scale_bits == 16 else f",{self.scale_bits}"
        return f"{runs},{int(self.zero)},{self.groups}{short}"

    @classmethod
    def parse(cls, spec: str) -> "Side":
        runs, zero, groups, *scale_bits = spec.split(",")
        pairs = (run.split("*") for run in runs.split("+")) if runs else ()
        bits = tuple(int(b) for b, n in pairs for _ in range(int(n)))
        return cls(bits, zero == "1", int(groups), *map(int, scale_bits))

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of the stored scales."""
        return torch.uint8 if self.scale_bits == 8 else torch.float16


SHARED = Side(groups=0)
SHARED_SPEC = SHARED.spec


def values_are_keys(spec: str) -> bool:
    """Whether values are their keys, told by :attr:`PageLayout.spec` alone: traced code parses none."""
    return spec.endswith(SHARED_SPEC)


@dataclass(frozen=True)
class GroupLayout:
    """Neighbouring KV heads ``first:first + heads`` of one form."""

    first: int
    heads: int
    keys: Side
    values: Side

    @property
    def part(self) -> slice:
        """The KV heads."""
        return slice(self.first, self.first + self.heads)


@dataclass(frozen=True)
class PagedTokens:
    """One side of one head group: planes with ``bits`` and scales, or ``exact`` tokens; ``shared``: values that are
    read from the tensors of their keys."""

    planes: tuple[Tensor, ...] = ()
    bits: tuple[int, ...] = ()
    scale: Tensor | None = None
    zero: Tensor | None = None
    exact: Tensor | None = None
    shared: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """In the order of :meth:`PageLayout.split`; those of keys are not counted again."""
        return [] if self.shared else [*self.planes, *(t for t in (self.scale, self.zero, self.exact) if t is not None)]

    def map(self, fn) -> "PagedTokens":  # type: ignore[no-untyped-def]
        """The same form over other tensors."""
        scale, zero, exact = (None if t is None else fn(t) for t in (self.scale, self.zero, self.exact))
        return replace(self, planes=tuple(map(fn, self.planes)), scale=scale, zero=zero, exact=exact)


@dataclass(frozen=True)
class PagedGroup:
    """The tensors of a head group."""

    layout: GroupLayout
    keys: PagedTokens
    values: PagedTokens


@dataclass(frozen=True)
class PageLayout:
    """The form of a layer's pages.

    Example:
        >>> from headq_ao.ops.page_layout import GroupLayout, PageLayout, Side
        >>> layout = PageLayout(32, 64, 64, (GroupLayout(0, 3, Side((2,) * 64), Side((2,))),))
        >>> layout.spec
        '32;64;64;0:3:2*64,0,1:2*1,0,1'
        >>> PageLayout.parse(layout.spec) == layout
        True
    """

    page_tokens: int
    key_dim: int
    value_dim: int
    groups: tuple[GroupLayout, ...]

    @property
    def spec(self) -> str:
        """A text that says it all: how the layout passes through an operator's schema."""
        groups = (f"{g.first}:{g.heads}:{g.keys.spec}:{g.values.spec}" for g in self.groups)
        return ";".join([str(self.page_tokens), str(self.key_dim), str(self.value_dim), *groups])

    @classmethod
    def parse(cls, spec: str) -> "PageLayout":
        """:attr:`spec`, undone."""
        return _parsed(spec)

    @property
    def kv_heads(self) -> int:
        """KV heads of the layer."""
        return sum(g.heads for g in self.groups)

    @property
    def known_forms(self) -> tuple[tuple[Side, Side], ...]:
        """The forms of all heads in pages of this size that were ever allocated, these among them, in the order in
        which they came: a kernel that is compiled for all of them serves every layer of a model."""
        coded = [(g.keys, g.values) for g in self.groups if g.keys.bits and g.values.bits]
        coordinates = len(coded[0][0].bits) if coded else 0
        known = KNOWN_FORMS.setdefault((self.page_tokens, self.key_dim, self.value_dim, coordinates), {})
        known.update(dict.fromkeys(coded))
        return tuple(known)

    @cached_property
    def _forms(self) -> list[tuple[GroupLayout, str, Side, list[tuple[tuple[int, ...], torch.dtype | None]]]]:
        """Each side of each group, with the shape behind ``[N, h]`` and the dtype of each tensor, None: the model's."""
        p, made = self.page_tokens, []
        for g in self.groups:
            for name, side, dim in (("keys", g.keys, self.key_dim), ("values", g.values, self.value_dim)):
                forms: list[tuple[tuple[int, ...], torch.dtype | None]] = [((p, dim), None)]
                if side.bits:
                    keys = name == "keys"
                    planes = key_plane_shapes(side.bits, p) if keys else value_plane_shapes(side.bits[0], p, dim)
                    scale = (p,) if keys else (p, side.groups)
                    forms = [(s, torch.uint8) for s in planes]
                    forms += [(scale, side.scale_dtype)] + [(scale, torch.float16)] * side.zero
                elif side.shared:
                    forms = []
                made.append((g, name, side, forms))
        return made

    def allocate(self, pages: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Zeroed tensors of ``pages`` pages, in the order of :meth:`split`; the pages of a head lie side by side."""
        made, _ = [], self.known_forms
        for g, _, _, forms in self._forms:
            for shape, kind in forms:
                made.append(torch.zeros((g.heads, pages, *shape), dtype=kind or dtype, device=device).transpose(0, 1))
        return made

    def bytes_of_page(self, n_sink: int, dtype: torch.dtype) -> int:
        """Bytes of a page in one piece (:meth:`views`), with ``n_sink`` sinks of that dtype behind its tokens."""
        return self._places(n_sink, dtype)[-1][0]

    def _places(self, n_sink: int, dtype: torch.dtype) -> list[tuple[int, tuple[int, ...], torch.dtype]]:
        """Where each tensor of a page in one piece begins, keys' and values' sinks last; then the page's end."""
        sinks = [((self.kv_heads, n_sink, dim), dtype) for dim in (self.key_dim, self.value_dim)]
        places, at = [], 0
        for shape, kind in [*self.page_shapes(), *sinks]:
            kind = dtype if kind is None else kind
            places.append((at, shape, kind))
            at += -(-math.prod(shape) * kind.itemsize // ALIGNED) * ALIGNED
        return [*places, (at, (), dtype)]

    def views(self, raw: Tensor, n_sink: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
        """Pages in one piece each, as an engine allocates them, in the form of :meth:`allocate`.

        Args:
            raw: ``[N, bytes]`` uint8 of at least :meth:`bytes_of_page` bytes, which lie side by side.
            n_sink: sinks behind the tokens of each page.
            dtype: of the model.

        Returns:
            The tensors in the order of :meth:`split`, and the sinks of keys and of values, ``[N, Hkv, n_sink, D]``.

        Raises:
            ValueError: where a page's bytes are too few, or do not begin where numbers may lie.
        """
        *places, (end, _, _) = self._places(n_sink, dtype)
        if raw.dtype != torch.uint8 or raw.shape[1] < end or raw.stride(1) != 1:
            raise ValueError(f"raw must be uint8 [N, {end} or more] with bytes side by side, got {tuple(raw.shape)}")
        size = max(2, dtype.itemsize)
        if raw.stride(0) % size or raw.storage_offset() % size:
            raise ValueError(f"pages must begin on multiples of {size} bytes, got strides {raw.stride()}")
        found = []
        for at, shape, kind in places:
            part = raw[:, at : at + math.prod(shape) * kind.itemsize]
            found.append(
                part.view(kind).unflatten(1, shape) if part.shape[1] else part.new_zeros(len(raw), *shape).to(kind)
            )
        return found[:-2], found[-2], found[-1]

    def split(self, tensors: Sequence[Tensor]) -> list[PagedGroup]:
        """The tensors of a layer by head group and side."""
        rest, found = iter(tensors), dict[tuple[int, str], PagedTokens]()
        for g, name, side, forms in self._forms:
            own = list(islice(rest, len(forms)))
            if side.shared:
                found[g.first, name] = replace(found[g.first, "keys"], shared=True)
                continue
            if not side.bits:
                found[g.first, name] = PagedTokens(exact=own[0])
                continue
            n = len(forms) - 1 - side.zero
            zero = own[n + 1] if side.zero else None
            found[g.first, name] = PagedTokens(tuple(own[:n]), side.bits, own[n], zero)
        return [PagedGroup(g, found[g.first, "keys"], found[g.first, "values"]) for g in self.groups]

    def page_shapes(self) -> list[tuple[tuple[int, ...], torch.dtype | None]]:
        """Of each tensor in the order of :meth:`split`: its shape behind ``[N]``, and its dtype, None where a side is
        not coded."""
        return [((g.heads, *shape), kind) for g, _, _, forms in self._forms for shape, kind in forms]


@lru_cache(maxsize=256)
def _parsed(spec: str) -> PageLayout:
    page_tokens, key_dim, value_dim, *groups = spec.split(";")
    made = []
    for group in groups:
        first, heads, keys, values = group.split(":")
        made.append(GroupLayout(int(first), int(heads), Side.parse(keys), Side.parse(values)))
    return PageLayout(int(page_tokens), int(key_dim), int(value_dim), tuple(made))


def value_granule(bits: int) -> int:
    """Tokens that share the bytes of one value granule, over all planes of that many bits."""
    return max(32 // w for w in PIECES[bits])
