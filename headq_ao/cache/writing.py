"""How a layer takes tokens: what is appended at once, what waits for attention, and when it is packed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from headq_ao.ambient import mode_neutral
from headq_ao.cache.schedule import Span
from headq_ao.cache.state import LayerState, Step
from headq_ao.ops.cache_update.check import check_finite
from headq_ao.ops.cache_update.reference import append, at
from headq_ao.ops.types import on_device


class WritingLayer(LayerState):
    """Appends and packs.

    A few tokens go to the ring at once, and what leaves the window into its page; a longer chunk is attended as it came
    and packed after that, by :meth:`commit` or before the next call.
    """

    @mode_neutral
    def append(self, k: Tensor, v: Tensor) -> None:
        """:meth:`PackedLayer.update`, but for what it returns; in a graph, what keeps it from being one is noted."""
        lengths, traced = self.batch.lengths, torch.compiler.is_compiling()
        self.asked = []
        if traced:
            self.problem, lengths.open = self._traced_problem(k, v), False
            if self.problem is not None:
                return
            self.traced = True
        else:
            self._enter(k, v)
        # a graph appends what waits for statistics: it is packed between calls, with queries that commit() has kept
        if lengths.first or k.shape[2] > lengths.schedule.slack or (self.codec.warmup and not traced):
            self.pending = k, v
        else:
            self._append_now(k, v)
        if traced or self.due or self.pending is not None:
            self.batch.unsettled = True

    def _append_now(self, k: Tensor, v: Tensor) -> None:
        """To the ring; what leaves the window is packed, or due."""
        at_once = self.packs and self.codec.captured
        packed, most = (self.counts.packed, k.shape[2]) if at_once else (self._coded, 0)
        try:
            self.codec.pack(self._before(), k, v, packed, most)
        except BaseException:
            self.batch.take_back()
            raise
        self.due = self.packs and not at_once

    @mode_neutral
    def prepare(self) -> Step | None:
        """Put a decoding step together once, where the codec has kernels for it."""
        lengths, shape = self.batch.lengths, self.shape
        if not self.is_initialized or lengths.padded:
            return None
        ready = self.codec.captured and self.packs and self.pending is None
        if not ready or self.source.current(self.codec) is not self.codec:
            return None
        self.fit()
        counts, heads = self.counts, shape.n_heads
        before, reading = self._paged(counts.coded, counts.held), self._paged(counts.read, counts.total)
        check = self.device.type == "cpu" if self.check_finite is None else self.check_finite
        plans = self.codec.plan(before, counts.packed, reading, heads, self.sliding_window or 0, self.reads, check)
        if plans is not None:
            place, name, found = self.source.watched()
            form, address = (lengths.batch, heads, 1, shape.dims[0]), 0 if found is None else found.data_ptr()
            self.step = Step(*plans, form, place, name, found, address)
        return self.step

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
        if any((*x.shape[:2], x.shape[3]) != (len(window.k), *self.forms[n]) for n, x in (("k", k), ("v", v))):
            form = (*window.k.shape[:2], window.k.shape[3])
            return (
                f"the cache holds tokens of {form[0]} sequences, {form[1]} heads of {form[2]}, got keys "
                f"{tuple(k.shape)}; start a new cache"
            )
        if torch.promote_types(torch.promote_types(k.dtype, v.dtype), window.k.dtype) != window.k.dtype:
            return f"the cache holds {window.k.dtype} and a compiled call brings {k.dtype}; make one call uncompiled"
        if not self.codec.captured and (lengths.first or k.shape[2] > lengths.schedule.slack):
            return (
                f"a compiled call of several tokens cannot be packed by {self.codec.name}, which decides on the host: "
                "give the prompt to the model itself, and decode by the compiled one"
            )
        if window.ring < self.ring and not lengths.known:
            return f"a compiled function makes no room for {self.ring} full-precision tokens: compile the model alone"
        if self.due:
            return (
                "without a calibration tokens are packed between compiled calls: call cache.get_seq_length() after "
                "each, or calibrate the model"
            )
        return None

    def _enter(self, k: Tensor, v: Tensor) -> None:
        """Check a call's tokens and make room for them."""
        lengths = self.batch.lengths
        if not self.is_initialized or lengths.first:
            self._check_form(k, v)
        if self.call == lengths.calls:
            self.batch.begin(k.shape[0], k.shape[2])  # no engine has announced it
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
            self.batch.take_back()
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
        forms = [(*x.shape[:2], x.shape[3]) for x in (k, v)]
        if forms != [(len(k), *self.forms[name]) for name in "kv"] or k.shape[2] != v.shape[2]:
            raise ValueError(
                f"this layer caches {self.shape.n_kv_heads} heads of {self.shape.head_dim}, got keys "
                f"{tuple(k.shape)} and values {tuple(v.shape)}; use a cache made for this model"
            )

    def _check_finite(self, k: Tensor, v: Tensor) -> None:
        lengths = self.batch.lengths
        if k.is_meta or not (k.is_cpu if self.check_finite is None else self.check_finite):
            return
        # a sum is not finite where a token is not, and takes a fiftieth of the time of looking at each
        if not all(math.isfinite(x.sum(dtype=torch.float32 if x.dtype == torch.float16 else None)) for x in (k, v)):
            spans = lengths.spans or [Span(0, lengths.new)] * lengths.batch
            start, stop = (on_device(x, k.device) for x in zip(*((s.start, s.stop) for s in spans), strict=True))
            check_finite(k, v, start, stop, on_device([lengths.seen - lengths.new] * lengths.batch, k.device))

    def commit(self, q: Tensor | None, scaling: float | None = None) -> None:
        """Pack what attention has read, once after it; of a layer with several readers, after the last of them.

        Args:
            q: the call's queries ``[B, Hq, S, D]``; they are kept while a sequence's own statistics are awaited, those
                of all readers.
            scaling: of the scores; ``head_dim ** -0.5`` when None.
        """
        if self.pending is None and not self.due:
            return
        if self.shape.readers > 1 and q is not None:
            self.asked.append(q)
            if len(self.asked) < self.shape.readers:
                return
            q, self.asked = self._pooled(self.asked), []
        if torch.compiler.is_compiling():
            self._commit_traced(q)
        else:
            self._commit(q, self.shape.head_dim**-0.5 if scaling is None else scaling)

    def _pooled(self, queries: Sequence[Tensor]) -> Tensor:
        """Those of all readers, ``[B, readers · Hq, S, D]``: of each KV head side by side."""
        return torch.cat([q.unflatten(1, (self.shape.n_kv_heads, -1)) for q in queries], 2).flatten(1, 2)

    def flush(self) -> None:
        """Pack what a call has left to be packed, before something else is done with the cache.

        Raises:
            RuntimeError: where attention was to show queries for it and never came.
        """
        lengths = self.batch.lengths
        if self.traced:
            self.traced, self.call, self.seen = False, lengths.calls, lengths.seen
        self.asked = []
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
        if lengths.first:  # no step that follows a prompt takes longer than others
            self.prepare()

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
