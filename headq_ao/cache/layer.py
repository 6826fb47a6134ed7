"""One layer of a packed cache: a codec, pages and a window. It knows no engine."""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from headq_ao.ambient import mode_neutral
from headq_ao.cache.batch import Batch
from headq_ao.cache.lengths import Counts
from headq_ao.cache.masks import (
    MaskView,
    attend_new,
    causal_mask,
    contiguous_ranges,
    view_of_call,
    visible_slots,
)
from headq_ao.cache.pages import PagePool, PageTable
from headq_ao.cache.tensors import QuantizedKV
from headq_ao.cache.window import ROOM, Window
from headq_ao.codecs.protocol import Codec, CodecSource
from headq_ao.layer_shape import LayerShape
from headq_ao.ops.cache_update.reference import append, at
from headq_ao.ops.paged_attention.reference import merge
from headq_ao.ops.types import PagedKV, Visible


class Step(NamedTuple):
    """A decoding step put together once: what appends and packs, what attends, and where a model that has moved
    shows."""

    update: Callable[[Tensor, Tensor], None]
    attend: Callable[[Tensor, float], Tensor]
    place: Mapping[str, Any]
    name: str
    found: Any


class PackedLayer:
    """Packed pages between full-precision sinks and window.

    :meth:`update` appends: a few tokens go to the ring at once, and what leaves the window into its page; a longer
    chunk is attended as it came and packed after that, by :meth:`attend` or the next call.

    Args:
        shape: of the layer.
        source: of its codec.
        batch: what all layers of the cache share.
        check_finite: raise on keys or values that are not finite; None: on the CPU.
    """

    keys = values = None  # transformers' layers have tensors of these names
    dtype: torch.dtype  # of full-precision tokens
    device: torch.device
    counts: Counts
    codec: Codec
    learned: list[bool]  # which sequences have statistics of their own, where the codec takes them
    block_table: Tensor | None = None
    no_table: Tensor

    def __init__(self, shape: LayerShape, source: CodecSource, batch: Batch, check_finite: bool | None = None) -> None:
        super().__init__()
        plan = batch.lengths.schedule
        self.shape, self.source, self.batch, self.check_finite = shape, source, batch, check_finite
        self.sliding_window, self.is_sliding = shape.sliding_window, shape.sliding_window is not None
        self.packs = shape.sliding_window is None or shape.sliding_window > plan.window
        self.table_key = batch.table_key(shape.sliding_window, source.prototype) if self.packs else None
        self.table: PageTable | None = batch.tables[self.table_key] if self.packs else None
        self.ring = plan.ring if shape.sliding_window is None or self.packs else shape.sliding_window + plan.window
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self.call, self.seen = self.batch.lengths.calls, 0  # the last model call that came through, and slots after it
        self.window = Window(self.batch.lengths.schedule.n_sink, min(self.ring, ROOM))
        self.pool: PagePool | None = None
        self.reads: Tensor | None = None  # int64 [2]: packed tokens that attention has read, and all
        self.dense_reads = 0  # tokens that first calls have read in full precision
        self.pending: tuple[Tensor, Tensor] | None = None  # a chunk that attention has not read yet
        self.due = False  # whether what the last call packs is still to be packed
        self.traced = False  # whether calls have come through that the host did not see
        self.step: Step | None = None
        self.problem: str | None = None  # why a traced call is not served

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A layer of other sequences of the same model: the source stays the same."""
        memo.setdefault(id(self.source), self.source)
        made = memo[id(self)] = type(self).__new__(type(self))
        vars(made).update({name: copy.deepcopy(x, memo) for name, x in vars(self).items() if name != "step"})
        made.step = None
        if made.is_initialized:
            made.codec = made.codec.index(torch.arange(self.batch.lengths.batch, device="cpu"))
        return made

    # -- appending ------------------------------------------------------------------------------------------------

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[B, Hkv, S, D]``.

        Returns:
            All keys and all values, as :class:`QuantizedKV`.

        Raises:
            ValueError: where they do not fit the cache or are not finite; it then holds what it held before.
        """
        if torch.compiler.is_compiling():
            self._append_traced(k.detach(), v.detach())
            return self.tensors_of(k, v)
        step, lengths = self.step, self.batch.lengths
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
        ):
            try:
                step.update(k, v)
            except BaseException:
                self.take_back()
                raise
            self.call, self.seen, lengths.open = lengths.calls, lengths.seen, False
        else:
            self._append(k.detach(), v.detach())
        return self.tensors_of(k, v)

    def tensors_of(self, k: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What :meth:`update` returns for a call's keys and values."""
        tokens = k.shape[2] if torch.compiler.is_compiling() else self.batch.lengths.seen
        keys, values = QuantizedKV(k, tokens), QuantizedKV(k if v is None else v, tokens)
        keys.layer = values.layer = self
        keys.side, values.side = "key", "value"
        return keys, values

    def begin(self, k: Tensor) -> None:
        """A call that no engine has announced."""
        self.batch.begin(k.shape[0], k.shape[2])

    @mode_neutral
    def _append(self, k: Tensor, v: Tensor) -> None:
        self._enter(k, v)
        lengths = self.batch.lengths
        if lengths.first or k.shape[2] > lengths.schedule.slack or self.codec.warmup:
            self.pending, self.batch.unsettled = (k, v), True
            return
        at_once = self.packs and self.codec.captured
        packed, most = (self.counts.packed, k.shape[2]) if at_once else (self._coded, 0)
        try:
            self.codec.pack(self._before(), k, v, packed, most)
        except BaseException:
            self.take_back()
            raise
        if self.packs and not at_once:
            self.due = self.batch.unsettled = True

    @mode_neutral
    def _append_traced(self, k: Tensor, v: Tensor) -> None:
        """The same in a graph: what has no codec yet is packed between its calls."""
        self.problem = self._traced_problem(k, v)
        self.batch.lengths.open = False
        if self.problem is not None:
            return
        self.traced = self.batch.unsettled = True
        lengths = self.batch.lengths
        if lengths.first or k.shape[2] > lengths.schedule.slack:
            self.pending = k, v
        elif self.packs and self.codec.captured:
            self.codec.pack(self._before(), k, v, self.counts.packed, k.shape[2])
        else:
            self.codec.pack(self._before(), k, v, self._coded, 0)
            self.due = self.packs

    def _traced_problem(self, k: Tensor, v: Tensor) -> str | None:
        """Why a graph cannot append these tokens; None: it can."""
        lengths, window = self.batch.lengths, self.window
        if not self.is_initialized or window.k is None:
            return (
                "a compiled function cannot make room for a cache: give the prompt to the model itself, or make the "
                "cache with HeadQCache(model, max_length=.., batch_size=..)"
            )
        if not lengths.open and self is self.batch.layers[0]:
            return "the model's pre-hook was bypassed: compile and call the model, not its forward"
        if k.shape != v.shape or (*k.shape[:2], k.shape[3]) != (*window.k.shape[:2], window.k.shape[3]):
            form = (*window.k.shape[:2], window.k.shape[3])
            return (
                f"the cache holds tokens of {form[0]} sequences, {form[1]} heads of {form[2]}, got keys "
                f"{tuple(k.shape)}; start a new cache"
            )
        if torch.promote_types(torch.promote_types(k.dtype, v.dtype), window.k.dtype) != window.k.dtype:
            return f"the cache holds {window.k.dtype} and a compiled call brings {k.dtype}; make one call uncompiled"
        if not self.codec.captured and (lengths.first or k.shape[2] > lengths.schedule.slack):
            return not_captured(self.codec)
        if window.ring < self.ring and not lengths.known:
            return f"a compiled function makes no room for {self.ring} full-precision tokens: compile the model alone"
        if self.due:
            return (
                "without a calibration tokens are packed between compiled calls: call cache.get_seq_length() after "
                "each, or calibrate the model"
            )
        return None

    @property
    def _coded(self) -> Tensor:
        return self.counts.coded if self.packs else self.counts.none

    def _enter(self, k: Tensor, v: Tensor) -> None:
        """Check a call's tokens and make room for them."""
        lengths = self.batch.lengths
        if not self.is_initialized or lengths.first:
            self._check_form(k, v)
        if self.call == lengths.calls:
            self.begin(k)
        try:
            if (k.shape[0], k.shape[2]) != (lengths.batch, lengths.new):
                announced = f"{lengths.batch} sequences of {lengths.new} new tokens"
                raise ValueError(f"a call of {announced} was announced, and {k.shape[0]} of {k.shape[2]} came")
            if self.seen + lengths.new != lengths.seen:
                raise RuntimeError(
                    f"a layer holds {self.seen} tokens where others hold {lengths.seen - lengths.new}: an earlier call "
                    "ran fewer layers; call reset() on this cache or start a new one"
                )
            self._check_finite(k, v)
        except BaseException:
            self.take_back()
            raise
        dtype = torch.promote_types(k.dtype, v.dtype)
        if not self.is_initialized:
            self.initialize(dtype, k.device)
        elif self.window.widen(dtype):
            self.dtype, self.step = torch.promote_types(self.dtype, dtype), None
        codec = self.source.current(self.codec)
        if codec is not self.codec:
            self.codec, self.step = codec, None
        self.fit()
        self.call, self.seen, lengths.open = lengths.calls, lengths.seen, False

    def _check_form(self, k: Tensor, v: Tensor) -> None:
        _, h, _, d = k.shape
        if (h, d) != (self.shape.n_kv_heads, self.shape.head_dim) or v.shape[1:] != k.shape[1:]:
            raise ValueError(
                f"this layer caches {self.shape.n_kv_heads} heads of {self.shape.head_dim}, got keys "
                f"{tuple(k.shape)} and values {tuple(v.shape)}; use a cache made for this model"
            )

    def _check_finite(self, k: Tensor, v: Tensor) -> None:
        check, lengths = self.check_finite, self.batch.lengths
        if k.is_meta or not (k.is_cpu if check is None else check):
            return
        for name, x in (("keys", k), ("values", v)):
            if math.isfinite(torch.linalg.vector_norm(x, math.inf)):
                continue
            for b in range(len(x)):
                start, stop = (0, x.shape[2]) if lengths.spans is None else vars(lengths.spans[b]).values()
                if not bool(torch.isfinite(x[b, :, start:stop]).all()):
                    raise ValueError(
                        f"{name} must be finite to be packed, got inf or nan in sequence {b} from slot "
                        f"{lengths.seen - lengths.new} on; run the model in float32 or bfloat16, or pass "
                        "check_finite=False to cache them as they are"
                    )

    @mode_neutral
    def initialize(self, dtype: torch.dtype, device: torch.device) -> None:
        """Room for a batch: its size is known."""
        lengths, shape = self.batch.lengths, self.shape
        self.dtype, self.device, self.counts = dtype, device, lengths.counts(device)
        self.codec = self.source.start(lengths.batch, dtype)
        held = max(lengths.totals(), default=0) if self.batch.capacity is None else self.batch.capacity
        self.window.ring = min(max(self.window.ring, held - self.window.n_sink), self.ring)
        for name, heads in (("k", shape.n_kv_heads), ("v", shape.n_kv_heads)):
            self.window.allocate(name, (lengths.batch, heads, shape.head_dim), dtype, device)
        self.pool = PagePool(self.codec.layout(self.batch.page_tokens), dtype, device, self.codec.segments)
        self.no_table = torch.zeros(lengths.batch, 1, dtype=torch.int32, device=device)
        self.reads = torch.zeros(2, dtype=torch.int64, device=device)
        self.learned = [not self.codec.warmup] * lengths.batch
        self.is_initialized = True
        self.fit()

    @mode_neutral
    def fit(self) -> None:
        """Follow the block table: it may have grown."""
        if self.pool is None:
            return
        if self.table is None:
            self.block_table = self.no_table
            return
        block_table = self.table.on(self.device)
        if self.pool.fit(self.table.pages) or block_table is not self.block_table:
            self.block_table, self.step = block_table, None

    def _before(self) -> PagedKV:
        """The cache before this call's tokens are appended."""
        counts = self.counts
        return self._paged(self._coded, counts.held)

    def _paged(self, packed: Tensor, held: Tensor, new: tuple[Tensor, Tensor] | None = None) -> PagedKV:
        pool, window = self.pool, self.window
        assert pool is not None and window.k is not None and window.v is not None and self.block_table is not None
        k, v = (None, None) if new is None else new
        return PagedKV(
            pool.tensors, pool.spec, self.block_table, pool.segment, packed, held, self.counts.total, window.k,
            window.v, window.n_sink, k, v, self.batch.lengths.start(self.device),
        )  # fmt: skip

    # -- reading --------------------------------------------------------------------------------------------------

    @property
    def first_call(self) -> bool:
        """Whether nothing came before this call: attention is then over its own tokens, in full precision."""
        return self.batch.lengths.first

    def attend(
        self, q: Tensor, scaling: float, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool | None = None
    ) -> Tensor:
        """Attention of a call's queries ``[B, Hq, S, D]`` over all tokens, and packing of what it leaves behind.

        Args:
            q: the queries.
            scaling: of the scores.
            k, v: the call's own keys and values ``[B, Hkv, S, D]``.
            mask, is_causal: as :mod:`headq_ao.cache.masks` reads them.

        Returns:
            ``[B, Hq, S, D]`` in q's dtype.

        Raises:
            ValueError: where the mask cannot be served.
        """
        if torch.compiler.is_compiling():
            return self._attend(q, scaling, k, v, mask, is_causal)
        step, batch = self.step, self.batch
        if (
            step is not None
            and q.shape[2] == 1
            and (mask is None or not batch.metadata.custom)
            and q.dtype != torch.float64
            and batch.metadata.hidden is None
            and not batch.lengths.padded
            and self.call == batch.lengths.calls
        ):
            return step.attend(q, scaling).to(q.dtype)
        return self._attend(q, scaling, k, v, mask, is_causal)

    @mode_neutral
    def _attend(
        self, q: Tensor, scaling: float, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool | None
    ) -> Tensor:
        view, kv = self.view(mask, is_causal), self._reading()
        if view is None:
            visible = self.visible(q.shape[2])  # it says what a sliding window shows
            sliding = self.sliding_window or 0 if visible is None else 0
            out, _ = self.codec.attend(q, scaling, kv, visible, sliding, self.reads)
        else:
            visible = Visible(view.low, view.high)
            cached = dataclasses.replace(kv, new_k=None, new_v=None, new_start=None, total=self.counts.held)
            parts = [
                self.codec.attend(q, scaling, cached, visible, 0, self.reads),
                attend_new(q, scaling, k, v, view.new),
            ]
            self.dense_reads += int(view.new.sum()) * (len(q) // len(view.new))
            out, _ = merge(parts)
        self.commit(q, scaling)
        if self.step is None:
            self._prepare(q)
        return out.to(q.dtype)

    def view(self, mask: Tensor | None, is_causal: bool | None = None) -> MaskView | None:
        """What a call's mask says that the counts do not; None: nothing."""
        if torch.compiler.is_compiling():
            return None if mask is None else self._traced_view(mask)
        batch = self.batch
        view = view_of_call(mask, is_causal, batch.lengths, batch.metadata, self.sliding_window, self.device)
        if view is not None and self.sliding_window is not None:
            self._check_held(view)
        return view

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

    def _oldest(self, top: int, coded: int) -> int:
        """The first body token that a sliding layer is sure to hold, of a sequence that has had ``top`` tokens."""
        plan, p = self.batch.lengths.schedule, self.batch.page_tokens
        if self.table is None:
            return max(top - plan.n_sink - self.ring, 0)
        return max((-(-max(plan.packable(top), coded) // p) - (self.table.most or 0)) * p, 0)

    def _traced_view(self, mask: Tensor) -> MaskView:
        """A mask ``[B or 1, 1, S, S or T]`` in a traced call; one of the new slots alone shows all cached tokens."""
        slots, shown = mask.shape[2], visible_slots(mask)
        held = self.counts.held[:, None].expand(-1, slots)
        if self.batch.metadata.custom and mask.shape[3] > slots:
            return MaskView(*contiguous_ranges(shown[..., :-slots], self.counts.held), shown[..., -slots:])
        low = torch.zeros_like(held)
        if self.sliding_window is not None:
            low = (held + torch.arange(slots, device=held.device) - self.sliding_window + 1).clamp(min=0)
        return MaskView(low, held, shown[..., -slots:])

    def _reading(self) -> PagedKV:
        """What this call's queries may see."""
        counts = self.counts
        read = counts.read if self.packs else counts.none
        return self._paged(read, counts.held if self.pending else counts.total, self.pending)

    def visible(self, slots: int) -> Visible | None:
        """What a call's queries see where some of them are padding; None: what their order says."""
        counts, hidden, start = self.counts, self.batch.metadata.hidden, self.batch.lengths.start(self.device)
        if start is None and hidden is None:
            return None
        first = counts.held if start is None else counts.held - start
        position = first[:, None] + torch.arange(slots, device=self.device)
        real = (position >= counts.held[:, None]) & (position < counts.total[:, None])
        low = torch.zeros_like(position)
        if self.sliding_window is not None:
            low = (position - self.sliding_window + 1).clamp(min=0)
        if hidden is not None:
            low = low.maximum(hidden.to(self.device)[:, None])
        return Visible(low, torch.where(real, position + 1, 0))

    def count_first(self) -> None:
        """Count what the queries of a first call read: as many tokens as stand before them, and themselves."""
        assert self.reads is not None
        n = self.counts.total
        past = torch.zeros_like(n) if self.sliding_window is None else (n - self.sliding_window).clamp(min=0)
        self.reads[1] += (n * (n + 1) // 2 - past * (past + 1) // 2).sum()

    def visible_new(self, slots: int) -> Tensor | None:
        """Which of its own slots a first call's queries see, bool ``[B or 1, 1, S, S]``; None: all up to their own."""
        window, start = self.sliding_window, self.batch.lengths.start(self.device)
        if start is None and (window is None or window >= slots):
            return None
        seen = causal_mask(slots, window, self.device)[None]
        if start is not None:
            at = torch.arange(slots, device=self.device)
            stop = start + self.counts.total - self.counts.held
            seen = seen & ((at >= start[:, None]) & (at < stop[:, None]))[:, None]
        return seen[:, None]

    def _prepare(self, q: Tensor) -> None:
        """Put a decoding step together once, where the codec has kernels for it."""
        ready = self.codec.captured and self.packs and not self.pending and q.shape[2] == 1
        if not ready or torch.compiler.is_compiling() or self.batch.lengths.spans is not None:
            return
        counts = self.counts
        before, reading = self._paged(counts.coded, counts.held), self._paged(counts.read, counts.total)
        check = self.device.type == "cpu" if self.check_finite is None else self.check_finite
        plans = self.codec.plan(before, counts.packed, reading, q.shape[1], self.sliding_window or 0, self.reads, check)
        if plans is not None:
            self.step = Step(plans[0], plans[1], *self.source.watched())

    # -- packing --------------------------------------------------------------------------------------------------

    def commit(self, q: Tensor | None, scaling: float | None = None) -> None:
        """Pack what attention has read, once after it.

        Args:
            q: the call's queries ``[B, Hq, S, D]``; they are kept while a sequence's own statistics are awaited.
            scaling: of the scores; ``head_dim ** -0.5`` when None.
        """
        if self.pending is None and not self.due:
            return
        if torch.compiler.is_compiling():
            self._commit_traced(q)
        else:
            self._commit(q, self.shape.head_dim**-0.5 if scaling is None else scaling)

    def flush(self) -> None:
        """Pack what a call has left to be packed, before something else is done with the cache.

        Raises:
            RuntimeError: where attention was to show queries for it and never came.
        """
        lengths = self.batch.lengths
        if self.traced:
            self.traced, self.call, self.seen = False, lengths.calls, lengths.seen
        if self.is_initialized and (self.pending is not None or self.due):
            self._commit(None, self.shape.head_dim**-0.5)

    def _commit_traced(self, q: Tensor | None) -> None:
        if self.pending is None:
            if self.codec.warmup and self.window.q is not None and q is not None:
                append(self.window.q, q, self._before(), self.counts.none)
            return  # packed before the next call, outside the graph
        k, v = self.pending
        packed, most = (self.counts.packed, k.shape[2]) if self.packs else (self.counts.none, 0)
        self.codec.pack(self._before(), k, v, packed, most)
        self.pending = None

    @mode_neutral
    def _commit(self, q: Tensor | None, scaling: float) -> None:
        lengths = self.batch.lengths
        k, v = (None, None) if self.pending is None else self.pending
        coded, packed = lengths.coded, lengths.packed()
        if self.packs and not all(self.learned):
            self._warm_up(q, k, v, scaling)
        kv = self._before() if k is not None else self._paged(self._coded, self.counts.total)
        if not self.packs:
            assert k is not None and v is not None
            self.codec.pack(kv, k, v, self.counts.none, 0)
        else:
            most = max(after - before for after, before in zip(packed, coded, strict=True))
            keep = self._read_prompt(q, k, v, scaling, most) if self.codec.prompt and lengths.first else None
            if keep is not None:
                kv = self._before()
            if k is not None or most:
                self.codec.pack(kv, k, v, self.counts.packed, most, keep)
        self.pending, self.due = None, False
        if self.window.q is None and self.window.ring > self.ring:
            self.window.resize(self.ring, self.counts.total)
            self.step = None

    def _warm_up(self, q: Tensor | None, k: Tensor | None, v: Tensor | None, scaling: float) -> None:
        """Keep the queries of sequences without statistics, and take those of sequences that have seen enough."""
        lengths, window = self.batch.lengths, self.window
        n = lengths.schedule.n_sink + self.codec.warmup
        newly = [b for b, p in enumerate(lengths.packed()) if p and not self.learned[b]]
        if k is not None and q is None:
            raise RuntimeError("keys of an earlier call were never attended; call reset() on this cache")
        if newly:
            first_q, first_k, first_v = (self._first(x, new, newly, n) for x, new in (("q", q), ("k", k), ("v", v)))
            self.codec = self.codec.learn(newly, first_q, first_k, first_v, scaling, self.sliding_window)
            self.learned = [done or b in newly for b, done in enumerate(self.learned)]
        if all(self.learned):
            window.q = None
            return
        most = max(t for t, done in zip(lengths.totals(), self.learned, strict=True) if not done)
        self.make_room(most - window.n_sink)
        if k is not None:
            assert q is not None
            like = (lengths.batch, q.shape[1], q.shape[3])
            held = window.allocate("q", like, q.dtype, q.device) if window.q is None else window.q
            append(held, q.to(held.dtype), self._before(), self._start())

    def _read_prompt(
        self, q: Tensor | None, k: Tensor | None, v: Tensor | None, scaling: float, most: int
    ) -> Tensor | None:
        """Show the codec the whole first call, and make room for what it keeps; which tokens that is."""
        if q is None or k is None or v is None:
            raise RuntimeError("keys of an earlier call were never attended; call reset() on this cache")
        position = torch.arange(k.shape[2], device=self.device) - self._start()[:, None]
        position = torch.where(position < self.counts.total[:, None], position, -1)
        self.codec, keep = self.codec.read_prompt(q, k, v, scaling, position, self.counts.packed, most)
        if keep is not None:
            assert self.table is not None
            packed = self.batch.lengths.packed()
            leaving = torch.arange(most, device=self.device) < self.counts.packed[:, None]
            self.table.leave_out((leaving & ~keep).sum(1).tolist())
            self.table.reserve(len(k), max(packed))
            self.fit()
        return keep

    def make_room(self, body: int) -> None:
        """Let the ring hold ``body`` tokens, by eighths."""
        if body > self.window.ring:
            ring = max(body, self.window.ring + self.window.ring // 8)
            self.window.resize(ring, self.counts.held)
            self.step = None

    def _start(self) -> Tensor:
        start = self.batch.lengths.start(self.device)
        return self.counts.none if start is None else start

    def _first(self, name: str, new: Tensor | None, members: Sequence[int], n: int) -> Tensor:
        """The first ``n`` tokens of some sequences, from the window and from the call's own: ``[m, H, n, D]``."""
        index = torch.tensor(members, device=self.device)
        position = torch.arange(n, device=self.device).expand(self.batch.lengths.batch, -1)
        held = None if getattr(self.window, name) is None else self.window.at(name, position)
        if new is not None:
            number = (self._start() - self.counts.held)[:, None] + position
            fresh = at(new, number.clamp(0, new.shape[2] - 1))
            old = (position < self.counts.held[:, None])[:, None, :, None]
            held = fresh if held is None else torch.where(old, held, fresh.to(held.dtype))
        assert held is not None
        return held.index_select(0, index)

    # -- sequences ------------------------------------------------------------------------------------------------

    def take_back(self) -> None:
        """After a failure in this layer: leave the whole cache as it was before the call, as far as that can be."""
        self.batch.take_back()

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

    # -- looking in -----------------------------------------------------------------------------------------------

    @property
    def packed_sides(self) -> tuple[str, ...]:
        """Which of ``"key"`` and ``"value"`` are coded."""
        return self.codec.packed_sides if self.is_initialized else ()

    @property
    def tokens_read(self) -> tuple[int, int]:
        """Packed tokens that attention has read, and all, summed over queries."""
        packed, every = (0, 0) if self.reads is None else self.reads.tolist()
        return packed, every + self.dense_reads

    def distinct(self, tokens: Sequence[int]) -> int:
        """The first ``tokens`` tokens in pages of each sequence, those of shared pages once."""
        if self.table is None:
            return 0
        p, found = self.batch.page_tokens, dict[int, int]()
        for row, n in zip(self.table.host.tolist(), tokens, strict=True):
            for page, begin in zip(row, range(0, n, p), strict=False):
                found[page] = max(found.get(page, 0), min(n - begin, p))
        return sum(found.values())

    def tensors(self) -> list[Tensor]:
        """Every tensor held for the sequences by this layer alone."""
        if not self.is_initialized:
            return []
        assert self.pool is not None and self.reads is not None
        own = list(self.codec.own_tensors().values())
        return [*self.pool.every, *self.window.tensors(), *own, self.no_table, self.reads]

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


def not_captured(codec: Codec) -> str:
    """Why a compiled call cannot pack with a codec."""
    return (
        f"a compiled call of several tokens cannot be packed by {codec.name}, which decides on the host: give the "
        "prompt to the model itself, and decode by the compiled one"
    )
