"""HeadQ's codec of a layer: a codec of keys and one of values over the pages' planes."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from headq_ao.codecs.base import KeyCodec, ValueCodec, head_groups
from headq_ao.codecs.protocol import Codec
from headq_ao.ops import Encoder, cache_update, paged_attention, plan_attention, plan_update
from headq_ao.ops.layout import unpack_keys, unpack_values
from headq_ao.ops.page_layout import NULL_PAGE, SHARED, GroupLayout, PagedTokens, PageLayout, Side
from headq_ao.ops.paged_attention.reference import by_sequence
from headq_ao.ops.rounding import scale_of
from headq_ao.ops.types import PagedKV, Plan, Readers, SegmentFrame, Visible, in_vectors

SideCodec = TypeVar("SideCodec", KeyCodec, ValueCodec)
# of q, k, v [n, H, T, D], scaling and sliding window: the codecs of those sequences
Learner = Callable[[Tensor, Tensor, Tensor, float, int | None], tuple[KeyCodec | None, ValueCodec | None]]


@dataclass(frozen=True, eq=False)
class PlaneCodec(Codec):
    """Keys and values coded token by token; a side without a codec is kept in full precision.

    Args:
        keys, values: the codecs, of all heads.
        kv_heads, key_dim, value_dim: of the layer.
        sign: of the side code (a control takes the wrong one).
        unbiased: whether the scales of keys make ``⟨y, ŷ⟩ = ‖y‖²``.
        granularity, warmup: see :class:`Codec`; 1 and 0 under a calibration. A sequence's own hessians take as long
            as the codes of many tokens, so they are made again for each ``granularity`` of them and not kept.
        learner: of a sequence's own statistics; None: all belongs to the model.
        batch: sequences, where they have their own.
        first: another codec of the keys in the first ``warmup`` tokens' pages, of the same form; None: ``keys``.
        frame: that keys are coded in; None: the model's own.
        shared: whether a value is its key: one row a token, which ``keys`` code; there are then no ``values``.
    """

    keys: KeyCodec | None
    values: ValueCodec | None
    kv_heads: int
    key_dim: int
    value_dim: int
    sign: int = 1
    unbiased: bool = True
    granularity: int = 1
    warmup: int = 0
    learner: Learner | None = None
    batch: int = 0
    first: KeyCodec | None = None
    frame: SegmentFrame | None = None
    shared: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        """For messages."""
        if self.captured:
            return "HeadQ"
        return "HeadQ without a calibration" if self.first is None else "HeadQ with adapt='prompt'"

    @property
    def segments(self) -> int:  # type: ignore[override]
        """See :class:`Codec`: the pages of ``first``, and the others."""
        return 1 if self.first is None else 2

    def segment(self, page: Tensor, page_tokens: int) -> Tensor:
        """See :class:`Codec`."""
        return (page >= self.warmup // page_tokens).long()

    @property
    def captured(self) -> bool:  # type: ignore[override]
        """See :class:`Codec`."""
        return self.learner is None

    @property
    def packed_sides(self) -> tuple[str, ...]:  # type: ignore[override]
        """Which sides are coded."""
        return tuple(name for name, side in (("key", self.keys), ("value", self.values)) if side is not None)

    def put_together(self) -> None:
        """Make what is kept from call to call: a traced call finds it, and does not make it part of its graph."""
        _ = self._readers, [e and e.flat for side in self._encoders for e in side]

    def layout(self, page_tokens: int) -> PageLayout:
        """See :class:`Codec`."""
        groups = []
        for group in head_groups(self.keys, self.values):
            first, end, _ = group.heads.indices(self.kv_heads)
            keys = Side()
            if (k := group.keys) is not None:
                keys = Side(k.bits, k.has_zero, scale_bits=k.scale_bits)
            values = SHARED if self.shared else Side()
            if (v := group.values) is not None:
                values = Side((v.bits,), v.has_zero, self.value_dim // v.group_size, v.scale_bits)
            groups.append(GroupLayout(first, end - first, keys, values))
        return PageLayout(page_tokens, self.key_dim, self.value_dim, tuple(groups))

    @property
    def readers(self) -> Readers:
        """How its tokens are read; made again where they belong to the sequences: they take more than codes do."""
        return self._readers if self.learner is None else self._make_readers()

    @functools.cached_property
    def _readers(self) -> Readers:
        return self._make_readers()

    def _make_readers(self) -> Readers:
        query_map = None if self.keys is None else self.keys.query_map(self.sign, torch.float32)[None]
        if self.first is not None and query_map is not None:
            of_first = self.first.query_map(self.sign, torch.float32).expand(query_map.shape[1:])
            query_map = torch.cat([of_first[None], query_map])
        if self.frame is not None and query_map is not None:
            query_map = in_vectors(query_map)  # as the CPU kernel reads it
        if self.shared and self.keys is not None:
            read, mean = self.keys.as_values()
            return Readers(query_map, read.mT.contiguous().mT, mean, self.frame)
        if self.values is None:
            return Readers(query_map, None, None, self.frame)
        read = self.values.reader.mT.contiguous().mT  # as the CPU kernel reads it: no plan makes a copy of its own
        return Readers(query_map, read, self.values.mean, self.frame)

    def encoders(self) -> tuple[list[Encoder | None], list[Encoder | None]]:
        """How tokens of each head group are written: of keys, and of values."""
        return self._encoders if self.learner is None else self._make_encoders()

    @functools.cached_property
    def _encoders(self) -> tuple[list[Encoder | None], list[Encoder | None]]:
        return self._make_encoders()

    def _make_encoders(self) -> tuple[list[Encoder | None], list[Encoder | None]]:
        return self._encoders_of(self.keys)

    def _encoders_of(self, of_keys: KeyCodec | None) -> tuple[list[Encoder | None], list[Encoder | None]]:
        groups = head_groups(of_keys, self.values)
        keys = [None if g.keys is None else g.keys.encoder(self.unbiased, self.frame) for g in groups]
        return keys, [None if g.values is None else g.values.encoder() for g in groups]

    def pack(
        self, kv: PagedKV, k: Tensor | None, v: Tensor | None, packed: Tensor, most: int, keep: Tensor | None = None
    ) -> None:
        """See :class:`Codec`."""
        if k is None or v is None:
            k, v = kv.window_k[:, :, :0], kv.window_v[:, :, :0]
        if most or self.captured:
            keys, values = self.encoders()
        else:
            keys = values = [None] * len(head_groups(self.keys, self.values))
        if most and self.first is not None:
            until = packed.minimum(kv.packed.clamp(min=self.warmup))
            before = dataclasses.replace(kv, total=kv.held)  # nothing is appended yet
            cache_update(before, k, v, until, min(most, self.warmup), *self._encoders_of(self.first))
            self._note_segments(kv, packed, most)
            kv = dataclasses.replace(kv, packed=until)
        cache_update(kv, k, v, packed, most, keys, values)

    def _note_segments(self, kv: PagedKV, packed: Tensor, most: int) -> None:
        """Write the codec ids of the pages that hold tokens ``kv.packed ≤ j < packed``."""
        assert kv.segment is not None
        p = PageLayout.parse(kv.layout).page_tokens
        page = kv.packed[:, None] // p + torch.arange(most // p + 2, device=packed.device)
        at = kv.table.long().gather(1, page % kv.table.shape[1])
        at = torch.where(page * p < packed[:, None], at, NULL_PAGE)
        kv.segment[at] = self.segment(page, p).to(kv.segment.dtype)

    def plan(
        self, before: PagedKV, packed: Tensor, reading: PagedKV, q_heads: int, sliding: int, reads: Tensor | None,
        check_finite: bool,
    ) -> tuple[Plan, Plan] | None:  # fmt: skip
        """See :class:`Codec`."""
        update = plan_update(before, packed, *self.encoders(), check_finite)
        attend = plan_attention(reading, self.readers, q_heads, sliding, reads)
        return None if update is None or attend is None else (update, attend)

    def attend(
        self, q: Tensor, scaling: float, kv: PagedKV, visible: Visible | None, sliding: int, reads: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Codec`."""
        return paged_attention(q, scaling, kv, self.readers, visible, sliding, reads)

    def decode(self, kv: PagedKV, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """See :class:`Codec`."""
        layout = PageLayout.parse(kv.layout)
        p = layout.page_tokens
        pages = torch.arange(begin // p, -(-end // p), device=kv.table.device) % kv.table.shape[1]
        table = kv.table[:, pages].long()
        inside = slice(begin - begin // p * p, end - begin // p * p)
        keys, values = [], []
        first = self.keys if self.first is None else self.first
        of_first = torch.arange(begin, end, device=table.device)[:, None] < (0 if self.first is None else self.warmup)
        groups = head_groups(self.keys, self.values), head_groups(first, self.values)
        for group, codecs, firsts in zip(layout.split(kv.pages), *groups, strict=True):
            of_keys, of_values = (
                side.map(lambda t: by_sequence(t, table).flatten(2, 3)) for side in (group.keys, group.values)
            )
            k = self._decoded(of_keys, codecs.keys)[:, :, inside]
            if self.first is not None:
                k = torch.where(of_first, self._decoded(of_keys, firsts.keys)[:, :, inside], k)
            if self.frame is not None and codecs.keys is not None:
                body = torch.arange(begin, end, device=k.device)
                k = self.frame.into(k, self.frame.of(body), back=True)
            keys.append(k)
            values.append(k if self.shared else self._decoded(of_values, codecs.values)[:, :, inside])
        return torch.cat(keys, 1), torch.cat(values, 1)

    def _decoded(self, held: PagedTokens, codec: KeyCodec | ValueCodec | None) -> Tensor:
        if codec is None:
            assert held.exact is not None
            return held.exact.float()
        assert held.scale is not None
        scale = scale_of(held.scale)
        if isinstance(codec, KeyCodec):
            return codec.dequantize(unpack_keys(held.planes, held.bits), scale, held.zero, self.sign)
        return codec.dequantize(unpack_values(held.planes, held.bits[0]), scale, held.zero)

    def learn(
        self, members: Sequence[int], q: Tensor, k: Tensor, v: Tensor, scaling: float, sliding: int | None
    ) -> "PlaneCodec":
        """See :class:`Codec`."""
        assert self.learner is not None
        keys, values = self.learner(q, k, v, scaling, sliding)
        at = torch.tensor(members, device=q.device)
        return dataclasses.replace(
            self,
            keys=with_members(self.keys, keys, at, self.batch),
            values=with_members(self.values, values, at, self.batch),
        )

    def index(self, sequences: Tensor) -> "PlaneCodec":
        """See :class:`Codec`."""
        if self.learner is None:
            return self
        keys = None if self.keys is None else self.keys.index(sequences)
        values = None if self.values is None else self.values.index(sequences)
        return dataclasses.replace(self, keys=keys, values=values, batch=len(sequences))

    def tensors_by_side(self, tensors: Sequence[Tensor], layout: PageLayout) -> dict[str, list[Tensor]]:
        """See :class:`Codec`."""
        groups = layout.split(tensors)
        return {
            "key": [t for g in groups for t in g.keys.tensors],
            "value": [t for g in groups for t in g.values.tensors],
        }

    def own_tensors(self) -> dict[str, Tensor]:
        """See :class:`Codec`."""
        sides = {"key": self.keys, "value": self.values}
        return {f"{name}.{n}": t for name, x in sides.items() if x is not None for n, t in x.own_tensors().items()}


def with_members(whole: Any, new: Any, at: Tensor, batch: int) -> Any:
    """The codec ``whole`` of a batch with the tensors of some of its sequences from ``new``, which owns them."""
    if new is None or not new.own | whole.own:
        return whole
    tensors = {}
    for name, t in new.own_tensors().items():
        t = (t if name == "unit" else t.half()).contiguous()
        held = getattr(whole, name)
        if held is None or name not in whole.own or held.shape[0] != batch:
            held = t.new_ones(batch, *t.shape[1:]) if name == "unit" else t.new_zeros(batch, *t.shape[1:])
        tensors[name] = held.index_copy(0, at.to(held.device), t)
    for name in whole.own - tensors.keys():  # a unit that others have and these do not need
        held = getattr(whole, name)
        tensors[name] = held.index_fill(0, at.to(held.device), 1.0 if name == "unit" else 0.0)
    return new.replace(tensors).owning(frozenset(tensors))
