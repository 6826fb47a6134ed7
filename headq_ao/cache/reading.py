"""How a layer is read: attention over packed pages, the window and a call's own tokens, under any mask it can serve."""

import dataclasses

import torch
from torch import Tensor

from headq_ao.ambient import mode_neutral
from headq_ao.cache.masks import (
    MaskView,
    attend_new,
    contiguous_ranges,
    first_visible,
    sink_share,
    view_of_call,
    visible_slots,
)
from headq_ao.cache.writing import WritingLayer
from headq_ao.codecs.tokenwise import TokenCodec
from headq_ao.ops.paged_attention.reference import merge
from headq_ao.ops.types import Visible

NO_GRADIENTS = (
    "a call that reads packed tokens has no gradients to give, and gradients are wanted: call it under "
    "torch.no_grad() or torch.inference_mode(), or pass use_cache=False"
)


class ReadingLayer(WritingLayer):
    """Attends, and packs what attention has read."""

    @mode_neutral
    def _attend(
        self, q: Tensor, scaling: float, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool | None,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        view, kv = self.view(mask, is_causal), self._reading()
        if view is None:
            visible = self.visible(q.shape[2])  # it says what a sliding window shows
            sliding = self.sliding_window or 0 if visible is None else 0
            out, lse = self.codec.attend(q, scaling, kv, visible, sliding, self.reads)
        else:
            cached = dataclasses.replace(kv, new_k=None, new_v=None, new_start=None, total=self.counts.held)
            parts = [self.codec.attend(q, scaling, cached, visible, 0, self.reads) for visible in view.ranges]
            parts.append(attend_new(q, scaling, k, v, view.new, self.shape.softcap))
            self.dense_reads += int(view.new.sum()) * (len(q) // len(view.new))
            out, lse = merge(parts)
        if sinks is not None:
            out = out * sink_share(lse, sinks)
        self.commit(q, scaling)
        return out.to(q.dtype)

    def view(self, mask: Tensor | None, is_causal: bool | None = None) -> MaskView | None:
        """What a call's mask says that the counts do not; None: nothing. A model's own mask of chunks says nothing: it
        may count them from padding, or from the call's first slot."""
        if not self.shows_more:
            mask = None
        if torch.compiler.is_compiling():
            return None if mask is None else self._traced_view(mask)
        given = mask, is_causal, self.batch.lengths, self.batch.metadata
        view = view_of_call(*given, self.sliding_window, self.device, self.shape.chunked)
        if view is not None and self.sliding_window is not None:
            self._check_held(view)
        if view is not None and view.more and isinstance(self.codec, TokenCodec) and self.codec.has_extra:
            raise ValueError(
                f"the attention mask hides cached tokens between others that it shows, and {self.codec.name} attends "
                "beside tokens to what it keeps of all of them: crop the cache, or start a new one"
            )
        return view

    @property
    def shows_more(self) -> bool:
        """Whether masks of this call may show what the counts do not."""
        told = self.batch.metadata
        return not self.shape.chunked or told.custom or told.by_slot

    def _check_held(self, view: MaskView) -> None:
        """Raise ValueError where a view shows cached tokens that a sliding window has let go."""
        lengths = self.batch.lengths
        for b, (held, top, coded) in enumerate(zip(lengths.before()[0], lengths.highest(), lengths.coded, strict=True)):
            usual = held - (self.sliding_window or 0)
            low = int(torch.where(view.low[b] < view.high[b], view.low[b], held).min())
            if low < usual and low < lengths.schedule.n_sink + self._oldest(top, coded):
                raise ValueError(
                    f"the attention mask of sequence {b} shows tokens that a sliding-window layer has let go; start a "
                    "new cache for it"
                )

    def _traced_view(self, mask: Tensor) -> MaskView:
        """A mask ``[B or 1, 1, S, S or T]`` in a traced call; one of the new slots alone shows all cached tokens
        but the oldest that the call's 2-D mask hides."""
        slots, shown = mask.shape[2], visible_slots(mask)
        held = self.counts.held[:, None].expand(-1, slots)
        if self.batch.metadata.custom and mask.shape[3] > slots:
            return MaskView(*contiguous_ranges(shown[..., :-slots], self.counts.held), shown[..., -slots:])
        hidden = self.batch.metadata.hidden
        low = torch.zeros_like(held) if hidden is None else hidden.to(held.device)[:, None].expand(-1, slots)
        if self.sliding_window is not None:
            low = low.maximum(self._sees_from(held + torch.arange(slots, device=held.device)))
        return MaskView(low, held, shown[..., -slots:])

    def visible(self, slots: int) -> Visible | None:
        """What a call's queries see where some of them are padding; None: what their order says."""
        counts, hidden, start = self.counts, self.batch.metadata.hidden, self.batch.lengths.start(self.device)
        if start is None and hidden is None and not self.shape.chunked:
            return None
        first = counts.held if start is None else counts.held - start
        position = first[:, None] + torch.arange(slots, device=self.device)
        real = (position >= counts.held[:, None]) & (position < counts.total[:, None])
        low = self._sees_from(position)
        if hidden is not None:
            low = low.maximum(hidden.to(self.device)[:, None])
        return Visible(low, torch.where(real, position + 1, 0))

    def _sees_from(self, position: Tensor) -> Tensor:
        """The first token that queries at those positions see."""
        return first_visible(position, self.sliding_window, self.shape.chunked)

    def visible_new(self, slots: int) -> Tensor | None:
        """Which of its own slots a first call's queries see, bool ``[B or 1, 1, S, S]``; None: all up to their own."""
        window, start = self.sliding_window, self.batch.lengths.start(self.device)
        if start is None and (window is None or window >= slots):
            return None
        at = torch.arange(slots, device=self.device)
        position = at[None] if start is None else at - start[:, None]
        seen = (at[:, None] >= at) & (position[:, None] >= self._sees_from(position)[:, :, None])
        if start is not None:
            stop = start + self.counts.total - self.counts.held
            seen = seen & ((at >= start[:, None]) & (at < stop[:, None]))[:, None]
        return seen[:, None]

    def count_first(self) -> None:
        """Count what the queries of a first call read: as many tokens as stand before them, and themselves."""
        assert self.reads is not None
        n = self.counts.total
        if self.shape.chunked and self.sliding_window is not None:
            size, rest = self.sliding_window, n % self.sliding_window
            self.reads[1] += (n // size * (size * (size + 1) // 2) + rest * (rest + 1) // 2).sum()
            return
        past = torch.zeros_like(n) if self.sliding_window is None else (n - self.sliding_window).clamp(min=0)
        self.reads[1] += (n * (n + 1) // 2 - past * (past + 1) // 2).sum()

    @mode_neutral
    def in_order(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values ``[B, Hkv, T, D]`` as attention reads them, and their positions ``[T]``, for sequences of
        equal length: those of a sliding window that are still held, and all of any other layer.

        Raises:
            ValueError: where sequences differ in length.
        """
        lengths, window = self.batch.lengths, self.window
        totals = set(lengths.totals())
        if len(totals) != 1:
            raise ValueError("sequences differ in length")
        kv = self._reading()
        long = lengths.first or lengths.new > lengths.schedule.slack
        if self.packs and self.pending is None:  # the ring may have less than attention has read there
            packed_now = self.counts.packed if long else kv.packed.maximum(self.counts.ring_low)
            kv = dataclasses.replace(kv, packed=packed_now)
        total, held, packed = totals.pop(), int(kv.held[0]), int(kv.packed[0])
        oldest = 0 if self.sliding_window is None else max(total - lengths.new - self.sliding_window + 1, 0)
        first = max(oldest - window.n_sink, 0)
        if self.pending is None and self.is_sliding:  # a long call's own tokens have taken the place of older ones
            first = max(first, self._oldest(lengths.highest()[0], lengths.packed()[0]))
        sinks = torch.arange(min(window.n_sink, held), device=self.device)
        ring = torch.arange(window.n_sink + max(packed, first), max(held, window.n_sink + packed), device=self.device)
        coded = torch.arange(min(first, packed), packed, device=self.device) + window.n_sink
        parts = []
        for name, i in (("k", 0), ("v", 1)):
            near = [window.at(name, x.expand(lengths.batch, -1)) for x in (sinks, ring)]
            new = [] if self.pending is None else [self.pending[i].to(near[0].dtype)]
            middle = [self.codec.decode(kv, min(first, packed), packed)[i].to(near[0].dtype)] if len(coded) else []
            parts.append(torch.cat([near[0], *middle, near[1], *new], 2))
        new_positions = torch.arange(held, total, device=self.device)
        return parts[0], parts[1], torch.cat([sinks, coded, ring, new_positions])

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """:meth:`in_order` without their positions."""
        k, v, _ = self.in_order()
        return k, v
