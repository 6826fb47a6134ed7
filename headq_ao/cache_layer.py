"""One layer of the packed cache: it appends exact rows, closes blocks of packed rows, and attends over both."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from headq_ao.codec import KeyCodec
from headq_ao.config import HeadQConfig
from headq_ao.layer_codec import Epoch, LayerCodec
from headq_ao.models import LayerShape
from headq_ao.ops import MappedQuery, Rows, decode_attention, encode_values, merge_segments
from headq_ao.state import ExactRows, RowCounts, RowStore, Span, int_tensor
from headq_ao.tensors import HeadQHistory, HeadQKeyTensor, HeadQValueTensor

ENCODE_TOKENS = 2048  # tokens encoded at a time: bounds the transient memory of closing blocks after a long prefill


@dataclass
class Incoming:
    """What the model's pre-hook found about the next call: slots seen before it, its length, each row's real span."""

    seen: int = 0
    length: int = 0
    spans: list[Span] | None = None


class HeadQCacheLayer(CacheLayerMixin):
    """One layer: exact sinks and window, packed blocks between them, and what their codecs need.

    Per layer, one stream of q, k, v gives identical codes whether it comes in one call or in many: blocks close at
    fixed slots, only with tokens older than ``residual_length``, and statistics are taken at fixed slots.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, config: HeadQConfig, shape: LayerShape, incoming: Incoming | None = None) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self.incoming = incoming if incoming is not None else Incoming()
        self.is_sliding = shape.sliding_window is not None
        self.sliding_window = shape.sliding_window
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.keys = self.values = None
        self.seen = 0
        self.rows: list[RowCounts] = []
        self.exact = ExactRows()
        self.store_k, self.store_v = RowStore(), RowStore()
        self.valid: Tensor | None = None
        self.epochs: list[Epoch] = []
        self.k_sum: Tensor | None = None
        self.rows_read = [0, 0]  # packed, all

    # What transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note the batch size, dtype and device of the first states."""
        b, h, _, d = key_states.shape
        if (h, d) != (self.shape.n_kv_heads, self.shape.head_dim) or value_states.shape[1:] != key_states.shape[1:]:
            raise ValueError(
                f"this layer caches {self.shape.n_kv_heads} heads of {self.shape.head_dim}, got keys "
                f"{tuple(key_states.shape)} and values {tuple(value_states.shape)}; use a cache made for this model"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.rows = [RowCounts() for _ in range(b)]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append exact rows ``[B, Hkv, S, D]``; packing waits for :meth:`commit`, which attention calls."""
        key_states, value_states = key_states.detach(), value_states.detach()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        b, _, s, _ = key_states.shape
        if b != len(self.rows):
            raise ValueError(f"the cache holds {len(self.rows)} sequences, got a batch of {b}; start a new cache")
        spans = self._spans(s)
        self._check_finite(key_states, value_states, spans)
        counts = [r.exact for r in self.rows]
        self.exact.append("k", key_states, counts, spans, self.exact_capacity)
        self.exact.append("v", value_states, counts, spans, self.exact_capacity)
        self.last_spans, self.last_counts, self.last_slots = spans, counts, s
        for row, span in zip(self.rows, spans, strict=True):
            row.tokens += span.length
            row.pads = s - span.stop if span.length else row.pads + s
        self.seen += s
        return HeadQHistory(self, key_states, self.seen), HeadQHistory(self, value_states, self.seen)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All slots seen and the new ones; attention over packed rows masks by counts, not by this mask."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Slots seen, padding included, as transformers counts."""
        return self.seen

    def get_max_length(self) -> int:
        """The sliding window, or -1: no limit."""
        return self.sliding_window if self.sliding_window is not None else -1

    def reset(self) -> None:
        """Forget everything."""
        self._clear()

    def offload(self) -> None:
        raise NotImplementedError("a HeadQ cache stays on its device; it is small: drop offloading=True")

    prefetch = offload

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder sequences for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self.batch_select_indices(torch.arange(len(self.rows)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep those sequences, in that order."""
        if not self.is_initialized:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        order = indices.tolist()
        if order == list(range(len(self.rows))):
            return
        self.exact.select(indices)
        self.store_k.select(indices)
        self.store_v.select(indices)
        if self.valid is not None:
            self.valid = self.valid.index_select(0, indices.to(self.valid.device))
        if self.k_sum is not None:
            self.k_sum = self.k_sum.index_select(0, indices.to(self.k_sum.device))
        for epoch in self.epochs:
            if epoch.per_sequence:
                epoch.codec = None if epoch.codec is None else epoch.codec.index(indices)
                epoch.ready = [epoch.ready[i] for i in order]
        self.rows = [self.rows[i].copy() for i in order]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens. Packed rows are invalidated, never encoded again."""
        self.check_crop(tokens_to_remove)
        n = min(-tokens_to_remove, self.seen)
        for b, row in enumerate(self.rows):
            removed, exact = self._removed(row, n)
            row.pads = max(row.pads - n, 0)
            row.tokens -= exact
            if removed > exact:
                self._crop_packed(b, row, removed - exact)
        self.seen -= n

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise where :meth:`crop` cannot be done: a window layer has let go of what it would need."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number, the tokens to remove, got {tokens_to_remove}")
        if self.sliding_window is None:
            return
        n = min(-tokens_to_remove, self.seen)
        for row in self.rows:
            removed, exact = self._removed(row, n)
            oldest_seen = row.tokens - removed - self.sliding_window + 1
            if removed > exact or (removed and row.dropped and oldest_seen < self.config.n_sink + row.dropped):
                raise RuntimeError(
                    f"cannot crop {n} tokens: a sliding-window layer holds what a crop of "
                    f"{self.config.residual_length} needs; start a new cache"
                )

    def _removed(self, row: RowCounts, n: int) -> tuple[int, int]:
        """Tokens of a row among its last ``n`` slots, and how many of them are exact rows."""
        removed = min(max(n - row.pads, 0), row.tokens)
        return removed, min(removed, row.exact - (self.config.n_sink if row.packed + row.dropped else 0))

    def _crop_packed(self, b: int, row: RowCounts, deep: int) -> None:
        """Invalidate the last ``deep`` packed tokens of a row, then its sinks."""
        if self.valid is None:
            self.valid = torch.zeros(len(self.rows), self.store_k.capacity, dtype=torch.bool, device=self.device)
            for i, other in enumerate(self.rows):
                self.valid[i, : other.slots] = True
        held = self.valid[b, : row.slots].nonzero().flatten()
        keep = held[: max(len(held) - deep, 0)]
        self.valid[b, keep[-1] + 1 if len(keep) else 0 :] = False
        row.tokens -= deep
        row.packed = len(keep)
        block = self.config.block_size
        row.slots = -(-(int(keep[-1]) + 1) // block) * block if len(keep) else 0

    # What attention calls

    def attend(self, q: Tensor, scaling: float, codec: LayerCodec) -> Tensor:
        """Attention of the new queries ``[B, Hq, S, D]`` over packed and exact rows; ``[B, Hq, S, D]`` in q's dtype."""
        s = q.shape[2]
        position = [
            [r.tokens - sp.length + i - sp.start if sp.start <= i < sp.stop else -1 for i in range(s)]
            for r, sp in zip(self.rows, self.last_spans, strict=True)
        ]
        parts = []
        if any(r.slots for r in self.rows):
            packed = merge_segments([self._attend_epoch(q, scaling, codec, e, position) for e in self._used_epochs()])
            if self.config.v_bits is not None:
                packed = (packed[0] @ codec.rotation_v.to(packed[0].dtype).T, packed[1])
            parts.append(packed)
        parts.append(self._attend_exact(q, scaling, position))
        self._count_reads(position)
        return merge_segments(parts)[0].to(q.dtype)

    def _attend_epoch(
        self, q: Tensor, scaling: float, codec: LayerCodec, e: int, position: list[list[int]]
    ) -> tuple[Tensor, Tensor]:
        begin, end = self._epoch_range(e)
        window = self.sliding_window
        start, stop = [], []
        for r, row_position in zip(self.rows, position, strict=True):
            low = self.config.n_sink + r.dropped  # position of slot 0
            start.append([0 if window is None else max(p - window + 1 - low - begin, 0) for p in row_position])
            stop.append([max(min(r.slots, end) - begin, 0) if p >= 0 else 0 for p in row_position])
        keys, values = self.segment(e, codec)
        if isinstance(keys, HeadQKeyTensor):
            query, key_rows = keys.codec.map_query(q, scaling, self.config.sign), keys.rows()
        else:
            query, key_rows = MappedQuery.exact(q, scaling), Rows(exact=keys)
        value_rows = values.rows() if isinstance(values, HeadQValueTensor) else Rows(exact=values)
        valid = None if self.valid is None else self.valid[:, begin:end]
        return decode_attention(
            query, key_rows, value_rows, int_tensor(start, q.device), int_tensor(stop, q.device), valid
        )

    def _attend_exact(self, q: Tensor, scaling: float, position: list[list[int]]) -> tuple[Tensor, Tensor]:
        n_sink, window = self.config.n_sink, self.sliding_window
        held = max(r.exact for r in self.rows)
        assert self.exact.k is not None and self.exact.v is not None
        start, stop = [], []
        for r, row_position in zip(self.rows, position, strict=True):
            gone = r.packed + r.dropped  # an exact row behind the sinks stands at index = position − gone
            first = [0 if window is None else max(p - window + 1, 0) for p in row_position]
            start.append([f if f <= n_sink else max(n_sink, f - gone) for f in first])
            stop.append([max(p - gone + 1, 0) for p in row_position])
        query = MappedQuery.exact(q, scaling)
        rows = Rows(exact=self.exact.k[:, :, :held]), Rows(exact=self.exact.v[:, :, :held])
        return decode_attention(query, *rows, int_tensor(start, q.device), int_tensor(stop, q.device))

    def commit(self, q: Tensor | None, codec: LayerCodec) -> None:
        """Close every block whose tokens have all left the window. Called once after each update.

        Args:
            q: the queries of this call ``[B, Hq, S, D]``; kept while a sequence's own query statistics are awaited.
            codec: of this layer.
        """
        if not self.epochs:
            self.epochs = codec.plan(len(self.rows))
        if q is not None and self._awaits_queries():
            self.exact.append("q", q.detach(), self.last_counts, self.last_spans, self.exact_capacity)
        groups: dict[tuple[int, ...], list[int]] = {}
        for b, row in enumerate(self.rows):
            groups.setdefault(dataclasses.astuple(row), []).append(b)
        for members in groups.values():
            blocks = self._closable(self.rows[members[0]], members[0])
            index = None if len(members) == len(self.rows) else torch.tensor(members, device=self.device)
            if blocks and self._never_packs:
                self._let_go(index, members, blocks)
            elif blocks:
                self._close(index, members, blocks, codec)
        if self.exact.q is not None and not self._awaits_queries():
            self.exact.q = None
        if self.k_sum is not None and all(all(e.ready) for e in self.epochs if e.per_sequence):
            self.k_sum = None
        self.exact.resize(max(self.exact_capacity, max(r.exact for r in self.rows) + 1))
        if self.sliding_window is not None:
            self._drop_old(self.sliding_window)

    @property
    def exact_capacity(self) -> int:
        """Exact rows to hold in the steady state: sinks, window, and one block in the making."""
        return self.config.n_sink + self._kept + self.config.block_size

    @property
    def _kept(self) -> int:
        """Newest tokens that stay exact; where nothing is packed, also what a crop by that many makes visible again."""
        window = self.sliding_window if self._never_packs else None
        return self.config.residual_length + (window or 0)

    @property
    def _never_packs(self) -> bool:
        """A sliding window that the exact rows cover: older tokens are let go, not packed."""
        return self.sliding_window is not None and self.sliding_window <= self.config.residual_length

    def _spans(self, s: int) -> list[Span]:
        incoming = self.incoming
        if incoming.spans is not None and (incoming.seen, incoming.length) == (self.seen, s):
            return incoming.spans
        return [Span(0, s) for _ in self.rows]

    def _check_finite(self, k: Tensor, v: Tensor, spans: Sequence[Span]) -> None:
        check = self.config.check_finite
        if k.device.type == "meta" or not (k.device.type == "cpu" if check is None else check):
            return
        for name, x in (("keys", k), ("values", v)):
            if bool(torch.isfinite(x).all()):
                continue
            for b, span in enumerate(spans):
                if not bool(torch.isfinite(x[b, :, span.start : span.stop]).all()):
                    raise ValueError(
                        f"{name} must be finite to be packed, got inf or nan in sequence {b} from slot {self.seen} on; "
                        "run the model in float32 or bfloat16, or pass check_finite=False to cache them as they are"
                    )

    def _awaits_queries(self) -> bool:
        return any(e.per_sequence and e.begin == 0 and not all(e.ready) for e in self.epochs)

    def _closable(self, row: RowCounts, b: int) -> int:
        block = self.config.block_size
        blocks = max(row.exact - self.config.n_sink - self._kept, 0) // block
        first = self.epochs[0]
        if (
            not self._never_packs
            and first.per_sequence
            and not first.ready[b]
            and blocks * block < self.config.first_epoch(self.shape.head_dim)
        ):
            return 0
        return blocks

    def _let_go(self, index: Tensor | None, members: list[int], blocks: int) -> None:
        """Drop exact rows that lie beyond a short sliding window."""
        n = blocks * self.config.block_size
        self.exact.shift(index, self.config.n_sink, n, self.rows[members[0]].exact)
        for b in members:
            self.rows[b].dropped += n

    def _close(self, index: Tensor | None, members: list[int], blocks: int, codec: LayerCodec) -> None:
        """Pack ``blocks`` blocks of the rows ``members``, which share their counts."""
        row, n_sink, block = self.rows[members[0]], self.config.n_sink, self.config.block_size
        slot, end = row.slots, row.slots + blocks * block
        if self.valid is not None:  # crops have made holes: mark the new slots
            grow = end - self.valid.shape[1]
            self.valid = nn.functional.pad(self.valid, (0, max(grow, 0)))
            self.valid[members, slot:end] = True
        count, taken = row.exact, n_sink

        def rows(x: Tensor, at: int, n: int) -> Tensor:
            return (x if index is None else x.index_select(0, index))[:, :, at : at + n]

        assert self.exact.k is not None and self.exact.v is not None
        while slot < end:
            e = max(i for i, epoch in enumerate(self.epochs) if epoch.begin <= slot)
            stop = min(end, self._epoch_end(e), slot + ENCODE_TOKENS)
            epoch = self.epochs[e]
            if epoch.per_sequence and not all(epoch.ready[b] for b in members):
                self._derive(epoch, index, members, codec)
            k = rows(self.exact.k, taken, stop - slot)
            v = rows(self.exact.v, taken, stop - slot)
            self._fold(k, index, members, e)
            self._write(index, slot, stop - slot, k, v, self._codec(e, codec, index), codec)
            taken += stop - slot
            slot = stop
        self.exact.shift(index, n_sink, taken - n_sink, count)
        for b in members:
            self.rows[b].packed += blocks * block
            self.rows[b].slots = end

    def _write(
        self,
        index: Tensor | None,
        slot: int,
        n: int,
        k: Tensor,
        v: Tensor,
        key_codec: KeyCodec | None,
        codec: LayerCodec,
    ) -> None:
        new_k = [k] if key_codec is None else flat(*key_codec.encode_rows(k, self.config.unbiased_scale))
        new_v = [v] if self.config.v_bits is None else flat(*encode_values(v, codec.rotation_v, **codec.value_options))
        self.store_k.write(index, slot, len(self.rows), new_k, n)
        self.store_v.write(index, slot, len(self.rows), new_v, n)

    def _derive(self, epoch: Epoch, index: Tensor | None, members: list[int], codec: LayerCodec) -> None:
        """Take the statistics of the rows ``members`` now, at a fixed slot, and keep their codec in fp16."""
        n, first = self.config.first_epoch(self.shape.head_dim), self.config.n_sink
        if epoch.begin == 0:
            assert self.exact.k is not None and self.exact.q is not None
            k, q = (x if index is None else x.index_select(0, index) for x in (self.exact.k, self.exact.q))
            new = codec.from_prompt(q[:, :, first : first + n], k[:, :, first : first + n])
        else:
            assert self.k_sum is not None
            k_sum = self.k_sum if index is None else self.k_sum.index_select(0, index)
            new = codec.from_prior(k_sum, self.rows[members[0]].folded)
        half = {name: t.half() for name, t in new.tensors().items() if name in new.own}
        new = new.replace(half)
        if index is None:
            epoch.codec = new
        else:
            if epoch.codec is None:
                b = len(self.rows)
                epoch.codec = new.replace({name: t.new_zeros((b, *t.shape[1:])) for name, t in half.items()})
            for name, t in half.items():
                epoch.codec.tensors()[name][index] = t
        for b in members:
            epoch.ready[b] = True

    def _fold(self, k: Tensor, index: Tensor | None, members: list[int], e: int) -> None:
        """Add keys to the moments of a later epoch, block by block: the order of additions never depends on calls."""
        if not any(epoch.per_sequence for epoch in self.epochs[e + 1 :]):
            return
        if self.k_sum is None:
            acc = torch.float64 if k.dtype == torch.float64 else torch.float32
            self.k_sum = torch.zeros(len(self.rows), k.shape[1], k.shape[3], dtype=acc, device=k.device)
        for tile in k.to(self.k_sum.dtype).split(self.config.block_size, dim=2):
            if index is None:
                self.k_sum += tile.sum(2)
            else:
                self.k_sum[index] += tile.sum(2)
        for b in members:
            self.rows[b].folded += k.shape[2]

    def _codec(self, e: int, codec: LayerCodec, index: Tensor | None = None) -> KeyCodec | None:
        key_codec = self.epochs[e].codec if self.epochs[e].per_sequence else codec.calibrated
        return key_codec if key_codec is None or index is None else key_codec.index(index)

    def _epoch_end(self, e: int) -> int:
        return self.epochs[e + 1].begin if e + 1 < len(self.epochs) else 2**62

    def _epoch_range(self, e: int) -> tuple[int, int]:
        longest = max(r.slots for r in self.rows)
        return min(self.epochs[e].begin, longest), min(self._epoch_end(e), longest)

    def _used_epochs(self) -> list[int]:
        ranges = (self._epoch_range(e) for e in range(len(self.epochs)))
        return [e for e, (begin, end) in enumerate(ranges) if begin < end]

    def segment(self, e: int, codec: LayerCodec) -> tuple[Tensor, Tensor]:
        """The packed rows of epoch ``e`` as tensors ``[B, Hkv, T, D]``: subclasses, or plain rows on an exact side."""
        begin, end = self._epoch_range(e)
        k, v = self.store_k.view(begin, end), self.store_v.view(begin, end)
        key_codec = self._codec(e, codec)
        keys, values = k[0], v[0]
        if key_codec is not None:
            zero = [k.pop()] if key_codec.weight is None else [None]
            keys = HeadQKeyTensor.from_planes(k[:-1], k[-1], zero[0], key_codec, self.dtype)
        if self.config.v_bits is not None:
            zero = [v.pop()] if self.config.v_zero_point else [None]
            values = HeadQValueTensor.from_planes(
                v[:-1], v[-1], zero[0], codec.rotation_v, self.config.v_bits, self.dtype
            )
        return keys, values

    def _drop_old(self, window: int) -> None:
        """Let go of blocks that lie beyond the window of any query to come, once they are half of what is stored."""
        block, low = self.config.block_size, 2**62
        for r in self.rows:
            oldest_seen = r.tokens - window + 1 - self.config.residual_length  # a crop may step back that far
            low = min(low, max(oldest_seen - self.config.n_sink - r.dropped, 0) // block * block)
        if (
            low == 0
            or low * 2 < max(r.slots for r in self.rows)
            or not all(all(e.ready) for e in self.epochs if e.per_sequence)
        ):
            return
        low = min(low, min(r.slots for r in self.rows))
        self.store_k.drop(low)
        self.store_v.drop(low)
        for r in self.rows:
            r.slots -= low
            r.packed -= low
            r.dropped += low
        for epoch in self.epochs:
            epoch.begin = max(epoch.begin - low, 0)
        while len(self.epochs) > 1 and self.epochs[1].begin == 0:
            self.epochs.pop(0)

    def _count_reads(self, position: list[list[int]]) -> None:
        for r, row_position in zip(self.rows, position, strict=True):
            gone = r.packed + r.dropped
            for p in row_position:
                if p >= 0:
                    reach = p + 1 if self.sliding_window is None else min(p + 1, self.sliding_window)
                    packed = min(r.packed, max(reach - (p + 1 - gone - self.config.n_sink), 0))
                    self.rows_read[0] += packed
                    self.rows_read[1] += reach

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

    def tensors(self) -> list[Tensor]:
        """Every tensor held for the sequences."""
        rest = [] if self.valid is None else [self.valid]
        rows = [t for t in (self.exact.k, self.exact.v) if t is not None]
        return rows + self.store_k.tensors + self.store_v.tensors + self.own_bases() + self.moments() + rest

    def own_bases(self) -> list[Tensor]:
        """Tensors of key codecs that belong to the sequences."""
        codecs = [e.codec for e in self.epochs if e.codec is not None]
        return [t for codec in codecs for name, t in codec.tensors().items() if name in codec.own]

    def moments(self) -> list[Tensor]:
        """Running sums, and the queries kept while a sequence's own statistics are awaited."""
        return [t for t in (self.k_sum, self.exact.q) if t is not None]

    def count_exact_reads(self) -> None:
        """Count the reads of a call that attended exactly (the first one)."""
        for span in self.last_spans:
            n, w = span.length, self.sliding_window or span.length
            self.rows_read[1] += n * (n + 1) // 2 - max(n - w, 0) * (max(n - w, 0) + 1) // 2

    def dequantize(self, codec: LayerCodec) -> tuple[Tensor, Tensor]:
        """All rows as the model sees them, ``[B, Hkv, T, D]``, for sequences of equal length without holes."""
        if len({dataclasses.astuple(r) for r in self.rows}) != 1 or self.valid is not None:
            raise ValueError("dequantize needs sequences of equal length and no deep crop")
        n_sink, held = self.config.n_sink, self.rows[0].exact
        parts: list[tuple[Tensor, Tensor]] = []
        assert self.exact.k is not None and self.exact.v is not None
        if self.rows[0].slots:
            for e in self._used_epochs():
                k, v = self.segment(e, codec)
                parts.append((k if type(k) is Tensor else k.dequantize(), v if type(v) is Tensor else v.dequantize()))
        ends = [(x[:, :, :n_sink], x[:, :, n_sink:held]) for x in (self.exact.k, self.exact.v)]
        return tuple(  # type: ignore[return-value]
            torch.cat([sink, *(p[i] for p in parts), window], 2) for i, (sink, window) in enumerate(ends)
        )


def flat(planes: list[Tensor], scale: Tensor, zero: Tensor | None) -> list[Tensor]:
    """What an encoder returns, as the list of tensors to store."""
    return [*planes, scale] if zero is None else [*planes, scale, zero]
