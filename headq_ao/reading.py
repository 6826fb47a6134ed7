"""Reading the cache: attention over packed rows and exact rows, joined by log-sum-exp."""

import operator

import torch
from torch import Tensor

from headq_ao.layer_codec import LayerCodec
from headq_ao.layer_state import LayerState, over_heads
from headq_ao.ops import ExactRows, MappedQuery, Rows, attend_runs, decode_attention, merge_segments
from headq_ao.ops.decode_attention import cpu_kernel
from headq_ao.state import int_tensor


class ReadingLayer(LayerState):
    """The read side of a layer."""

    def attend(self, q: Tensor, scaling: float, codec: LayerCodec) -> Tensor:
        """Attention of the new queries ``[B, Hq, S, D]`` over packed and exact rows; ``[B, Hq, S, D]`` in q's dtype."""
        out = self._attend_token(q, scaling, codec)
        if out is None:
            s = q.shape[2]
            position = [
                [r.tokens - sp.length + i - sp.start if sp.start <= i < sp.stop else -1 for i in range(s)]
                for r, sp in zip(self.rows, self.last_spans, strict=True)
            ]
            out = self._attend_rows(q, scaling, codec, position)
            self._count_reads(position)
        return out.to(q.dtype)

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

    def _attend_rows(self, q: Tensor, scaling: float, codec: LayerCodec, position: list[list[int]]) -> Tensor:
        """In one call where one codec reads all packed rows."""
        e = self._one_epoch()
        if e is None:
            return self._attend_parts(q, scaling, codec, position)
        scaled, values = MappedQuery.scaled(q, scaling), self._values(codec)
        assert values is not None
        exact = ExactRows(scaled, *self._exact_rows(q, position), values.reader, values.mean)
        runs = [(run.heads, keys, rows) for run, keys, rows in self.packed_rows(e, codec)]
        return attend_runs(*self._packed_query(scaled, 1.0, codec, e, position), runs, exact)

    def _one_epoch(self) -> int | None:
        """The epoch of all packed rows; None where there are more or none, or where a side is exact."""
        epochs = self._used_epochs()
        return epochs[0] if len(epochs) == 1 and len(self.packed_sides) == 2 else None

    def _step(self, q: Tensor, e: int, codec: LayerCodec) -> cpu_kernel.Step | None:
        """The kernel's call for one new token of each sequence, where it serves; made anew where rows have moved."""
        k, v, values = self.exact.k, self.exact.v, self._values(codec)
        assert k is not None and v is not None and values is not None
        all_slots = self.valid is None and not self.is_sliding and not self.epochs[e].begin
        served = q.is_cpu and q.dtype != torch.float64 and k.dtype == v.dtype
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

    def _attend_parts(self, q: Tensor, scaling: float, codec: LayerCodec, position: list[list[int]]) -> Tensor:
        parts = [self._attend_exact(q, scaling, position)]
        if any(r.slots for r in self.rows):
            parts.append(self._attend_packed(q, scaling, codec, position))
        return merge_segments(parts)[0]

    def _attend_packed(
        self, q: Tensor, scaling: float, codec: LayerCodec, position: list[list[int]]
    ) -> tuple[Tensor, Tensor]:
        parts = []
        for e in self._used_epochs():
            query, start, stop, valid = self._packed_query(q, scaling, codec, e, position)
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
        self, q: Tensor, scaling: float, codec: LayerCodec, e: int, position: list[list[int]]
    ) -> tuple[MappedQuery, Tensor, Tensor, Tensor | None]:
        """Queries for the packed rows of epoch ``e``, the slots that they see, and which of those are no holes."""
        begin, end = self._epoch_range(e)
        start, stop = (int_tensor(x, q.device) for x in self._visible_slots(begin, end, position))
        key_codec, sign = self._codec(e, codec), self.config.sign
        query = MappedQuery.exact(q, scaling) if key_codec is None else key_codec.map_query(q, scaling, sign)
        return query, start, stop, None if self.valid is None else self.valid[:, begin:end]

    def _visible_slots(
        self, begin: int, end: int, position: list[list[int]]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """First slot and end, counted from ``begin``, that each query sees among slots ``begin:end``."""
        window = self.sliding_window
        start, stop = [], []
        for r, row_position in zip(self.rows, position, strict=True):
            low = self.config.n_sink + r.dropped  # position of slot 0
            start.append([0 if window is None else max(p - window + 1 - low - begin, 0) for p in row_position])
            stop.append([max(min(r.slots, end) - begin, 0) if p >= 0 else 0 for p in row_position])
        return start, stop

    def _exact_rows(self, q: Tensor, position: list[list[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Exact keys and values, and which of them each query sees."""
        n_sink, window = self.config.n_sink, self.sliding_window
        held = max(r.exact for r in self.rows)
        assert self.exact.k is not None and self.exact.v is not None
        start, stop = [], []
        for r, row_position in zip(self.rows, position, strict=True):
            gone = r.packed + r.dropped  # an exact row behind the sinks stands at index = position − gone
            first = [0 if window is None else max(p - window + 1, 0) for p in row_position]
            start.append([f if f <= n_sink else max(n_sink, f - gone) for f in first])
            stop.append([max(p - gone + 1, 0) for p in row_position])
        k, v = self.exact.k[:, :, :held], self.exact.v[:, :, :held]
        return k, v, int_tensor(start, q.device), int_tensor(stop, q.device)

    def _attend_exact(self, q: Tensor, scaling: float, position: list[list[int]]) -> tuple[Tensor, Tensor]:
        k, v, start, stop = self._exact_rows(q, position)
        return decode_attention(MappedQuery.exact(q, scaling), Rows(exact=k), Rows(exact=v), start, stop)

    @property
    def first_call(self) -> bool:
        """Whether the last update was the first: attention is then exact, over the new rows alone."""
        return self.seen == self.last_slots

    def check_mask(self, mask: Tensor | None) -> None:
        """Where the pre-hook was bypassed, refuse a mask that hides cached rows: counts would not know it."""
        known = (self.incoming.seen, self.incoming.length) == (self.seen - self.last_slots, self.last_slots)
        if mask is None or known or self.is_sliding:
            return
        last = mask[:, :, -1] if mask.dtype == torch.bool else mask[:, :, -1] == 0
        if not bool(last.all()):
            raise ValueError(
                "padding reached the cache without the model's pre-hook; call the model that quantize_ was given"
            )

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
