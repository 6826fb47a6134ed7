"""One layer of a packed cache, as an engine drives it. It knows no engine."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headq_ao.ambient import mode_neutral
from headq_ao.cache.reading import ReadingLayer
from headq_ao.cache.tensors import QuantizedKV


class PackedLayer(ReadingLayer):
    """A layer: :meth:`update` and :meth:`attend` in each call, the other methods between calls.

    Both take a short way where a decoding step goes on as the last one did.
    """

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[B, Hkv, S, D]``.

        Returns:
            All keys and all values, as :class:`QuantizedKV`.

        Raises:
            ValueError: where they do not fit the cache or are not finite; it then holds what it held before.
        """
        if torch.compiler.is_compiling():
            self.append(k.detach(), v.detach())
            return self.tensors_of(k, v)
        lengths, step = self.batch.lengths, self.step
        if step is None and k.shape[2] == 1:
            step = self.prepare()
        if (
            step is not None
            and type(k) is Tensor
            and k.dtype == v.dtype == self.dtype
            and k.shape[2] == 1 == lengths.new
            and self.call != lengths.calls
            and self.seen + 1 == lengths.seen
            and k.shape[0] == lengths.batch
            and not lengths.padded
            and step.place[step.name] is step.found
            and (step.found is None or step.found.data_ptr() == step.address)
        ):
            try:
                step.update(k, v)
            except BaseException:
                self.batch.take_back()
                raise
            self.call, self.seen, lengths.open = lengths.calls, lengths.seen, False
        else:
            self.append(k.detach(), v.detach())
        return self.tensors_of(k, v)

    def tensors_of(self, k: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What :meth:`update` returns for a call's keys and values."""
        v = k if v is None else v
        if torch.compiler.is_compiling():
            keys, values = QuantizedKV(k, k.shape[2]), QuantizedKV(v, v.shape[2])
        else:  # without the detour through the class
            form = (*k.shape[:2], self.batch.lengths.seen, k.shape[3])
            keys = Tensor._make_wrapper_subclass(QuantizedKV, form, dtype=k.dtype, device=k.device)
            values = Tensor._make_wrapper_subclass(QuantizedKV, form, dtype=v.dtype, device=v.device)
            keys.new, values.new = k, v
        keys.layer = values.layer = self
        keys.side, values.side = "key", "value"
        return keys, values

    def attend(
        self, q: Tensor, scaling: float, k: Tensor, v: Tensor, mask: Tensor | None = None,
        is_causal: bool | None = None, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of a call's queries ``[B, Hq, S, D]`` over all tokens, and packing of what it leaves behind.

        Args:
            q: the queries.
            scaling: of the scores.
            k, v: the call's own keys and values ``[B, Hkv, S, D]``.
            mask, is_causal: as :mod:`headq_ao.cache.masks` reads them.
            sinks: logits ``[Hq]`` that are in the softmax's denominator and have no value, or None.

        Returns:
            ``[B, Hq, S, D]`` in q's dtype.

        Raises:
            ValueError: where the mask cannot be served.
        """
        if torch.compiler.is_compiling():
            return self._attend(q, scaling, k, v, mask, is_causal, sinks)
        step, batch = self.step, self.batch
        if (
            step is not None
            and sinks is None
            and not self.shape.chunked  # what a prepared step sees slides
            and q.shape == step.form
            and q.stride(3) == 1
            and (mask is None or not batch.metadata.custom)
            and q.dtype != torch.float64
            and batch.metadata.hidden is None
            and not batch.lengths.padded
            and self.call == batch.lengths.calls
        ):
            out: Tensor = step.attend(q, scaling)
            return out.to(q.dtype)
        return self._attend(q, scaling, k, v, mask, is_causal, sinks)

    @mode_neutral
    def undo(self, done: bool) -> None:
        """Follow :meth:`Lengths.take_back`; ``done``: whether the call had come through this layer."""
        self.pending, self.due = None, False
        if not self.is_initialized:
            return
        lengths = self.batch.lengths
        if not lengths.seen:
            return self.clear()
        self.fit()  # room was made for the call, and there it stays
        self.seen = min(self.seen, lengths.seen)
        most = max(after - before for after, before in zip(lengths.packed(), lengths.coded, strict=True))
        if most and self.packs and not done:
            self.codec.pack(self._paged(self.counts.coded, self.counts.total), None, None, self.counts.packed, most)
        self.call = lengths.calls

    @mode_neutral
    def select(self, index: Tensor, copies: Sequence[tuple[int, int]]) -> None:
        """Keep those sequences, in that order; ``copies``: physical pages ``(from, to)`` to be copied."""
        if not self.is_initialized:
            return
        codec, counts = self.codec.index(index), self.batch.lengths.counts(self.device)
        if codec is not self.codec or counts is not self.counts:  # else all lies where a prepared step finds it
            self.step = None
        self.codec, self.counts = codec, counts
        self.window.select(index)
        if self.codec.warmup:
            self.learned = [self.learned[b] for b in index.tolist()]
        elif len(self.learned) != len(index):
            self.learned = [True] * len(index)
        if len(self.no_table) != len(index):
            self.no_table = torch.zeros(len(index), 1, dtype=torch.int32, device=self.device)
        self.copy_pages(copies)

    def cropped(self, copies: Sequence[tuple[int, int]]) -> None:
        """Follow :meth:`Lengths.crop`: sequences that have no packed token left bring statistics once more."""
        lengths = self.batch.lengths
        self.seen = min(self.seen, lengths.seen)
        if self.is_initialized and self.codec.warmup:
            self.learned = [done and n > 0 for done, n in zip(self.learned, lengths.packed(), strict=True)]
        self.copy_pages(copies)

    @mode_neutral
    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Follow the block table, and copy physical pages ``(from, to)``."""
        if self.is_initialized:
            self.fit()
            assert self.pool is not None
            self.pool.copy(pairs if self.packs else ())

    def check_crop(self, slots: int) -> None:
        """Raise RuntimeError where :meth:`Lengths.crop` would need tokens that a sliding window has let go, or would
        end within tokens that are coded together."""
        lengths = self.batch.lengths
        plan = lengths.schedule
        removed, tops, packed = lengths.removed(slots), lengths.highest(), lengths.packed()
        for total, n, top, coded in zip(lengths.totals(), removed, tops, packed, strict=True):
            body = max(total - n - plan.n_sink, 0)
            problem = self.codec.crop_problem(body, coded) if self.is_initialized and self.packs else None
            if problem is not None:
                raise RuntimeError(f"cannot crop {slots} tokens: {problem}; start a new cache")
            if self.sliding_window is None or not n:
                continue
            if max(total - n - self.sliding_window + 1 - plan.n_sink, 0) < self._oldest(top, coded):
                raise RuntimeError(
                    f"cannot crop {slots} tokens: a sliding-window layer holds what a crop of {plan.slack} needs; "
                    "start a new cache"
                )

    @property
    def tokens_read(self) -> tuple[int, int]:
        """Packed tokens that attention has read, and all, summed over queries."""
        packed, every = (0, 0) if self.reads is None else self.reads.tolist()
        return packed, every + self.dense_reads
