"""Reading the cache: attention over packed rows and exact rows, joined by log-sum-exp."""

import operator
import weakref

import torch
from torch import Tensor

from headq_ao.ambient import mode_neutral
from headq_ao.layer_codec import LayerCodec
from headq_ao.layer_state import LayerState, over_heads
from headq_ao.masks import MaskView, causal_mask, mask_view
from headq_ao.ops import ExactRows, MappedQuery, Rows, attend_runs, decode_attention, merge_segments
from headq_ao.ops.decode_attention import cpu_kernel
from headq_ao.ops.decode_attention.reference import softmax_readout
from headq_ao.state import int_tensor

NEW_TILE = 256  # queries whose scores of the new tokens are held at a time, where a mask says which they see


Ranges = tuple[list[list[int]], list[list[int]]]  # by sequence and query: first token seen, and their end


class ReadingLayer(LayerState):
    """The read side of a layer."""

    @mode_neutral
    def attend(
        self, q: Tensor, scaling: float, codec: LayerCodec, new: tuple[Tensor, Tensor] | None = None,
        view: MaskView | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of the new queries ``[B, Hq, S, D]`` over packed and exact rows; ``[B, Hq, S, D]`` in q's dtype.

        With a ``view``, of the ``new`` keys and values ``[B, Hkv, S, D]`` and the cached tokens that it shows.
        """
        if view is not None:
            assert new is not None
            return self._attend_view(q, scaling, codec, new, view).to(q.dtype)
        out = self._attend_token(q, scaling, codec)
        if out is None:
            position = self._positions()
            out = self._attend_rows(q, scaling, codec, self._seen_ranges(position))
            self._count_reads(position)
        return out.to(q.dtype)

    def _positions(self) -> list[list[int]]:
        """Position in its sequence of each new slot, -1 where it is padding."""
        return [
            [r.tokens - sp.length + i - sp.start if sp.start <= i < sp.stop else -1 for i in range(self.last_slots)]
            for r, sp in zip(self.rows, self.last_spans, strict=True)
        ]

    def view(self, mask: Tensor | None, is_causal: bool | None = None) -> MaskView | None:
        """:func:`headq_ao.masks.mask_view` of a mask in this call; None where counts say all. The layers of a call
        share the answer.

        Raises:
            ValueError: where the mask hides or shows cached tokens in a way that cannot be served.
        """
        incoming, before, new = self.incoming, self.seen - self.last_slots, self.last_slots
        known = (incoming.seen, incoming.length) == (before, new)
        hidden, given = incoming.hidden if known else None, mask
        if known and not incoming.custom and mask is not None:
            # of cached tokens a model's own masks tell padding and windows, which the counts know: see `hidden`
            mask = None if new == 1 else mask[..., -new:]
        if mask is None and hidden is None and (is_causal is not False or new == 1):
            return None
        key = (id(given), before, new, self.sliding_window)
        told, view = incoming.views.get(key, (None, None))
        if given is None or told is None or told() is not given:
            if mask is None:
                among_new = causal_mask(new, self.sliding_window, self.device) | (is_causal is False)
                mask = among_new[None, None]
            view = mask_view(mask, self.rows, self.last_spans, before, self.sliding_window, hidden)
            if given is not None:
                incoming.views[key] = weakref.ref(given), view
        if view is not None:
            self._check_held(view)
        return view

    def _check_held(self, view: MaskView) -> None:
        """Raise ValueError where a view shows cached tokens that are gone, or ends within a cache with holes."""
        for b, (row, span, lows, highs) in enumerate(zip(self.rows, self.last_spans, view.low, view.high, strict=True)):
            before = row.tokens - span.length
            whole = all(low == 0 and high == before for low, high in zip(lows, highs, strict=True))
            oldest = self.config.n_sink + row.dropped
            gone = row.dropped and any(low < min(oldest, high) for low, high in zip(lows, highs, strict=True))
            if gone or (self.valid is not None and not whole):
                why = (
                    "shows tokens that a sliding-window layer has let go" if gone else "hides tokens of a cropped cache"
                )
                raise ValueError(f"the attention mask of sequence {b} {why}; start a new cache for it")

    def _attend_view(
        self, q: Tensor, scaling: float, codec: LayerCodec, new: tuple[Tensor, Tensor], view: MaskView
    ) -> Tensor:
        """The cached tokens that a view shows, and the new ones by its mask, joined."""
        ranges = (view.low, view.high)
        k, v, start, stop = self._exact_rows(q, ranges)
        parts = [decode_attention(MappedQuery.exact(q, scaling), Rows(exact=k), Rows(exact=v), start, stop)]
        if any(r.slots for r in self.rows):
            parts.append(self._attend_packed(q, scaling, codec, ranges))
        parts.append(attend_new(MappedQuery.scaled(q, scaling), *new, view.new))
        packed, cached = 0, 0
        for r, lows, highs in zip(self.rows, view.low, view.high, strict=True):
            first = self.config.n_sink + r.dropped
            packed += sum(max(min(h, first + r.packed) - max(n, first), 0) for n, h in zip(lows, highs, strict=True))
            cached += sum(highs) - sum(lows)
        self.rows_read[0] += packed
        self.rows_read[1] += cached + int(view.new.sum()) * (len(self.rows) // view.new.shape[0])
        return merge_segments(parts)[0]

    def _attend_token(self, q: Tensor, scaling: float, codec: LayerCodec) -> Tensor | None:
        """One new token of each sequence over all rows, by the kernel's call that is put together once; None where it
        does not serve."""
        if q.shape[2] != 1 or (e := self._one_epoch()) is None or (step := self._step(q, e, codec)) is None:
            return None
        key_codec, rows = self._codec(e, codec), self.rows
        assert key_codec is not None
        query_map = key_codec.query_map(self.config.sign, torch.float32)
        out = step(q.float().contiguous(), query_map, scaling, [r.slots for r in rows], [r.exact for r in rows])
        self.rows_read[0] += sum([r.packed for r in rows])
        self.rows_read[1] += sum([r.tokens for r in rows])
        return out

    def _attend_rows(self, q: Tensor, scaling: float, codec: LayerCodec, ranges: Ranges) -> Tensor:
        """In one call where one codec reads all packed rows."""
        e = self._one_epoch()
        if e is None:
            return self._attend_parts(q, scaling, codec, ranges)
        scaled, values = MappedQuery.scaled(q, scaling), self._values(codec)
        assert values is not None
        exact = ExactRows(scaled, *self._exact_rows(q, ranges), values.reader, values.mean)
        runs = [(run.heads, keys, rows) for run, keys, rows in self.packed_rows(e, codec)]
        return attend_runs(*self._packed_query(scaled, 1.0, codec, e, ranges), runs, exact)

    def _one_epoch(self) -> int | None:
        """The epoch of all packed rows; None where there are more or none, or where a side is exact."""
        epochs = self._used_epochs()
        return epochs[0] if len(epochs) == 1 and len(self.packed_sides) == 2 else None

    def _step(self, q: Tensor, e: int, codec: LayerCodec) -> cpu_kernel.Step | None:
        """The kernel's call for one new token of each sequence, where it serves; made anew where rows have moved."""
        k, v, values = self.exact.k, self.exact.v, self._values(codec)
        assert k is not None and v is not None and values is not None
        all_slots = self.valid is None and not self.is_sliding and not self.epochs[e].begin
        served = q.is_cpu and q.dtype != torch.float64 and k.dtype in cpu_kernel.EXACT_DTYPES
        watched = torch.compiler.is_compiling() or (q.requires_grad and torch.is_grad_enabled())
        one_token = all([span.length == 1 for span in self.last_spans])
        if not (one_token and all_slots and served) or watched or (lib := cpu_kernel.library()) is None:
            return None
        parts = (k, v, *self.store_k.tensors, *self.store_v.tensors, values.reader)
        if self.step is None or len(parts) != len(self.step_of) or not all(map(operator.is_, parts, self.step_of)):
            runs = self.packed_rows(e, codec, self.store_k.capacity)
            if not all(cpu_kernel.one_query(tuple(keys.bits)) for _, keys, _ in runs):
                return None
            rows, groups = [(keys, values) for _, keys, values in runs], q.shape[1] // k.shape[1]
            self.step = cpu_kernel.Step(lib, rows, k, v, values.reader, values.mean, groups)
            self.step_of = parts
        return self.step

    def _attend_parts(self, q: Tensor, scaling: float, codec: LayerCodec, ranges: Ranges) -> Tensor:
        k, v, start, stop = self._exact_rows(q, ranges)
        parts = [decode_attention(MappedQuery.exact(q, scaling), Rows(exact=k), Rows(exact=v), start, stop)]
        if any(r.slots for r in self.rows):
            parts.append(self._attend_packed(q, scaling, codec, ranges))
        return merge_segments(parts)[0]

    def _attend_packed(self, q: Tensor, scaling: float, codec: LayerCodec, ranges: Ranges) -> tuple[Tensor, Tensor]:
        parts = []
        for e in self._used_epochs():
            query, start, stop, valid = self._packed_query(q, scaling, codec, e, ranges)
            group, outs, lses = q.shape[1] // self.shape.n_kv_heads, [], []
            for run, keys, values in self.packed_rows(e, codec):
                first, last, _ = run.heads.indices(self.shape.n_kv_heads)
                of_run = query.of_heads(slice(first * group, last * group))
                out, lse = decode_attention(of_run, keys, values, start, stop, valid)
                outs.append(out)
                lses.append(lse)
            parts.append((over_heads(outs), over_heads(lses)))
        out, lse = merge_segments(parts)
        of_values = self._values(codec)
        return (out if of_values is None else of_values.readout(out)), lse

    def _packed_query(
        self, q: Tensor, scaling: float, codec: LayerCodec, e: int, ranges: Ranges
    ) -> tuple[MappedQuery, Tensor, Tensor, Tensor | None]:
        """Queries for the packed rows of epoch ``e``, the slots that they see, and which of those are no holes."""
        begin, end = self._epoch_range(e)
        start, stop = (int_tensor(x, q.device) for x in self._visible_slots(begin, end, ranges))
        key_codec, sign = self._codec(e, codec), self.config.sign
        query = MappedQuery.exact(q, scaling) if key_codec is None else key_codec.map_query(q, scaling, sign)
        return query, start, stop, None if self.valid is None else self.valid[:, begin:end]

    def _seen_ranges(self, position: list[list[int]]) -> Ranges:
        """First token and end of what each query at those positions sees, by the counts."""
        window = self.sliding_window
        low = [[0 if window is None else max(p - window + 1, 0) for p in row] for row in position]
        return low, [[p + 1 for p in row] for row in position]

    def _visible_slots(self, begin: int, end: int, ranges: Ranges) -> Ranges:
        """First slot and end, counted from ``begin``, of the tokens in each range among slots ``begin:end``."""
        start, stop = [], []
        for r, lows, highs in zip(self.rows, *ranges, strict=True):
            first = self.config.n_sink + r.dropped + begin  # position of slot ``begin``
            held = max(min(r.slots, end) - begin, 0)
            behind = self.config.n_sink + r.dropped + r.packed  # a range that ends there has all slots, holes too
            start.append([max(low - first, 0) for low in lows])
            stop.append([held if high >= behind else max(min(high - first, held), 0) for high in highs])
        return start, stop

    def _exact_rows(self, q: Tensor, ranges: Ranges) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Exact keys and values, and which of them lie in each query's range."""
        n_sink = self.config.n_sink
        held = max(r.exact for r in self.rows)
        assert self.exact.k is not None and self.exact.v is not None
        start: list[list[int]] = []
        stop: list[list[int]] = []
        for r, *of_row in zip(self.rows, *ranges, strict=True):
            gone = r.packed + r.dropped  # an exact row behind the sinks stands at index = position − gone
            for found, positions in zip((start, stop), of_row, strict=True):
                found.append([p if p <= n_sink else max(n_sink, p - gone) for p in positions])
        k, v = self.exact.k[:, :, :held], self.exact.v[:, :, :held]
        return k, v, int_tensor(start, q.device), int_tensor(stop, q.device)

    @mode_neutral
    def attention_weights(self, q: Tensor, scaling: float, codec: LayerCodec, view: MaskView | None) -> Tensor:
        """Weights ``[B, Hq, S, T]`` over all T slots, in q's dtype: :meth:`attend`'s, from dequantized keys.

        Slots of padding, and tokens that a sliding window has let go, have the weight 0.

        Raises:
            ValueError: where sequences differ in length, or a deep crop has left holes.
        """
        try:
            keys, _ = self.dequantize(codec)
        except ValueError as error:
            raise ValueError(f"output_attentions=True cannot be served from this cache: {error}") from error
        low, high = self._seen_ranges(self._positions()) if view is None else (view.low, view.high)
        (row, *_), n_sink, device = self.rows, self.config.n_sink, q.device
        held = torch.arange(row.tokens, device=device)
        held = torch.cat([held[:n_sink], held[n_sink + row.dropped :]])  # their positions
        start, stop = (int_tensor(x, device)[..., None] for x in (low, high))
        visible = (held >= start) & (held < stop)  # [B, S, held]
        if view is not None:
            span = self.last_spans[0]
            visible = visible.clone()
            visible[..., visible.shape[-1] - span.length :] = view.new[..., span.start : span.stop]
        query = MappedQuery.scaled(q, scaling).unflatten(1, (keys.shape[1], -1))
        s = (query @ keys.to(query.dtype).transpose(-1, -2).unsqueeze(2)).flatten(1, 2)
        weights = s.masked_fill(~visible[:, None], float("-inf")).softmax(-1).nan_to_num(0.0).to(q.dtype)
        out = weights.new_zeros((*weights.shape[:-1], self.seen))
        out[..., self.seen - row.pads - row.tokens + held] = weights
        return out

    @property
    def first_call(self) -> bool:
        """Whether the last update was the first: attention is then exact, over the new rows alone."""
        return self.seen == self.last_slots

    def _count_reads(self, position: list[list[int]]) -> None:
        for r, row_position in zip(self.rows, position, strict=True):
            gone = r.packed + r.dropped
            for p in row_position:
                if p >= 0:
                    reach = p + 1 if self.sliding_window is None else min(p + 1, self.sliding_window)
                    packed = min(r.packed, max(reach - (p + 1 - gone - self.config.n_sink), 0))
                    self.rows_read[0] += packed
                    self.rows_read[1] += reach

    def count_exact_reads(self) -> None:
        """Count the reads of a call that attended exactly (the first one)."""
        for span in self.last_spans:
            n, w = span.length, self.sliding_window or span.length
            self.rows_read[1] += n * (n + 1) // 2 - max(n - w, 0) * (max(n - w, 0) + 1) // 2


def attend_new(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of scaled queries ``q [B, Hq, S, D]`` over the new keys and values ``[B, Hkv, S, D]`` of the same
    call: ``o`` and ``lse`` as :func:`headq_ao.ops.decode_attention`, ``visible [B or 1, S, S]``."""
    grouped, k, v = q.unflatten(1, (k.shape[1], -1)), k.to(q.dtype), v.to(q.dtype)
    parts = []
    for tile in torch.arange(q.shape[2], device=q.device).split(NEW_TILE):
        s = torch.einsum("bhgsd,bhtd->bhgst", grouped[:, :, :, tile], k)
        parts.append(softmax_readout(s, v, visible[:, tile].expand(q.shape[0], -1, -1)))
    out, lse = (torch.cat(x, 3) for x in zip(*parts, strict=True))
    return out.flatten(1, 2), lse.flatten(1, 2)
