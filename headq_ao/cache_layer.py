"""One layer of the packed cache, as transformers drives it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from headq_ao.ambient import mode_neutral
from headq_ao.closing import ClosingLayer
from headq_ao.reading import ReadingLayer
from headq_ao.state import RowCounts, Span
from headq_ao.tensors import HeadQHistory


class HeadQCacheLayer(ClosingLayer, ReadingLayer, CacheLayerMixin):
    """Exact sinks and window, packed blocks between them: ``update`` appends, attention reads, ``commit`` packs."""

    is_compileable = False
    is_croppable = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note the batch size, dtype and device of the first states."""
        b, h, _, d = key_states.shape
        if (h, d) != (self.shape.n_kv_heads, self.shape.head_dim) or value_states.shape[1:] != key_states.shape[1:]:
            raise ValueError(
                f"this layer caches {self.shape.n_kv_heads} heads of {self.shape.head_dim}, got keys "
                f"{tuple(key_states.shape)} and values {tuple(value_states.shape)}; use a cache made for this model"
            )
        self.dtype, self.device = torch.promote_types(key_states.dtype, value_states.dtype), key_states.device
        self.rows = [RowCounts() for _ in range(b)]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append exact rows ``[B, Hkv, S, D]``; packing waits for :meth:`commit`, which attention calls."""
        try:
            self._append(key_states.detach(), value_states.detach())
        except BaseException:
            self.take_back()
            raise
        history = HeadQHistory(self, key_states, value_states, self.seen)
        return history, history

    @mode_neutral
    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        b, _, s, _ = key_states.shape
        if b != len(self.rows):
            raise ValueError(f"the cache holds {len(self.rows)} sequences, got a batch of {b}; start a new cache")
        spans = self._spans(s)
        self._check_finite(key_states, value_states, spans)
        counts = [r.exact for r in self.rows]
        if key_states.dtype != value_states.dtype or key_states.dtype != self.dtype:
            both = torch.promote_types(key_states.dtype, value_states.dtype)
            self.dtype = torch.promote_types(self.dtype, both)
            key_states, value_states = key_states.to(self.dtype), value_states.to(self.dtype)
        self.exact.append({"k": key_states, "v": value_states}, counts, spans, self.exact_capacity)
        self.last_spans, self.last_counts, self.last_slots = spans, counts, s
        for row, span in zip(self.rows, spans, strict=True):
            row.tokens += span.length
            row.pads = s - span.stop if span.length else row.pads + s
        self.seen += s
        self.pending = True

    def take_back(self) -> None:
        """After a failure in this layer: leave the whole cache as it was before the call, as far as that can be."""
        cache = None if self.incoming.cache is None else self.incoming.cache()
        before = self.seen - (self.last_slots if self.pending else 0)
        if cache is None or before != self.incoming.seen:
            self.undo_update()  # a layer of its own, or a call that did not come through the model's pre-hook
        else:
            cache.roll_back()

    def undo_update(self) -> None:
        """Take back an update whose call failed before :meth:`commit`: the cache is then as it was before the call."""
        if not self.pending:
            return
        self.pending = False
        self.seen -= self.last_slots
        if self.seen == 0:
            return self._clear()
        for row, span in zip(self.rows, self.last_spans, strict=True):
            row.tokens -= span.length
            row.pads = 0 if span.length else row.pads - self.last_slots  # real tokens follow no pads

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
        self.batch_select_indices(torch.arange(len(self.rows), device="cpu").repeat_interleave(repeats))

    @mode_neutral
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
        if self.value_codec is not None:
            self.value_codec = self.value_codec.index(indices)
        for epoch in self.epochs:
            if epoch.per_sequence:
                epoch.codec = None if epoch.codec is None else epoch.codec.index(indices)
                epoch.ready = [epoch.ready[i] for i in order]
        self.rows = [self.rows[i].copy() for i in order]

    @mode_neutral
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens. Packed rows are invalidated, never encoded again."""
        self.check_crop(tokens_to_remove)
        n = min(-tokens_to_remove, self.seen)
        if n == self.seen:
            return self._clear()
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
            raise ValueError(
                f"crop takes a negative number, the tokens to remove, got {tokens_to_remove}; "
                f"crop(-{tokens_to_remove}) removes the last {tokens_to_remove}"
            )
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

    def _spans(self, s: int) -> list[Span]:
        incoming = self.incoming
        if incoming.spans is not None and (incoming.seen, incoming.length) == (self.seen, s):
            return incoming.spans
        return [Span(0, s) for _ in self.rows]

    def _check_finite(self, k: Tensor, v: Tensor, spans: Sequence[Span]) -> None:
        check = self.config.check_finite
        if k.is_meta or not (k.is_cpu if check is None else check):
            return
        for name, x in (("keys", k), ("values", v)):
            if math.isfinite(torch.linalg.vector_norm(x, math.inf)):
                continue
            for b, span in enumerate(spans):
                if not bool(torch.isfinite(x[b, :, span.start : span.stop]).all()):
                    raise ValueError(
                        f"{name} must be finite to be packed, got inf or nan in sequence {b} from slot {self.seen} on; "
                        "run the model in float32 or bfloat16, or pass check_finite=False to cache them as they are"
                    )
