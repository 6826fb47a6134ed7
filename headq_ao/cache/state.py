"""What a layer of a packed cache holds: a codec, pages and a window."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from headq_ao.ambient import mode_neutral
from headq_ao.cache.batch import Batch
from headq_ao.cache.lengths import Counts
from headq_ao.cache.pages import PagePool, PageTable
from headq_ao.cache.window import ROOM, Window
from headq_ao.codecs.protocol import Codec, CodecSource
from headq_ao.layer_shape import LayerShape
from headq_ao.ops.types import PagedKV, Plan


class Step(NamedTuple):
    """A decoding step put together once: what appends and packs, what attends, of which form of queries, and where a
    model that has moved shows."""

    update: Plan
    attend: Plan
    form: tuple[int, ...]
    place: Mapping[str, Any]
    name: str
    found: Any
    address: int  # of what was found, where that is a tensor


class LayerState:
    """Packed pages between full-precision sinks and window.

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
        self.window = Window(self.batch.lengths.schedule.n_sink, min(self.ring, ROOM), self.shape.latent is not None)
        self.pool: PagePool | None = None
        self.reads: Tensor | None = None  # int64 [2]: packed tokens that attention has read, and all
        self.dense_reads = 0  # tokens that first calls have read in full precision
        self.pending: tuple[Tensor, Tensor] | None = None  # a chunk that attention has not read yet
        self.due = False  # whether what the last call packs is still to be packed
        self.asked: list[Tensor] = []  # the queries of this call's readers, until the last of them
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

    @property
    def forms(self) -> dict[str, tuple[int, int]]:
        """Heads and coordinates of a full-precision token, by the window's names."""
        shape = self.shape
        (k, v), kv_heads = shape.dims, shape.n_kv_heads
        return {"k": (kv_heads, k), "v": (kv_heads, v), "q": (shape.n_heads * shape.readers, k)}

    @property
    def elements(self) -> dict[str, int]:
        """Numbers of a token by side, as the model has them; of one that is key and value, once."""
        if self.shape.latent is not None:
            return {"key": self.shape.n_kv_heads * self.shape.head_dim}
        return {side: heads * dim for side, (heads, dim) in zip(("key", "value"), self.forms.values(), strict=False)}

    @mode_neutral
    def initialize(self, dtype: torch.dtype, device: torch.device) -> None:
        """Room for a batch: its size is known."""
        lengths = self.batch.lengths
        self.dtype, self.device, self.counts = dtype, device, lengths.counts(device)
        self.codec = self.source.start(lengths.batch, dtype)
        held = max(lengths.totals(), default=0) if self.batch.capacity is None else self.batch.capacity
        self.window.ring = min(max(self.window.ring, held - self.window.n_sink), self.ring)
        for name in self.window.sides:
            self.window.allocate(name, (lengths.batch, *self.forms[name]), dtype, device)
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
        block_table, step = self.table.on(self.device), self.step
        if self.pool.fit(self.table.pages) or block_table is not self.block_table:
            self.block_table = block_table
            if step is None or self.pool.segment is not None:
                self.step = None
            else:
                step.update.moved(self.pool.tensors, block_table)
                step.attend.moved(self.pool.tensors, block_table)

    def make_room(self, body: int) -> None:
        """Let the ring hold ``body`` tokens, by eighths."""
        if body > self.window.ring:
            ring = max(body, self.window.ring + self.window.ring // 8)
            self.window.resize(ring, self.counts.held)
            self.step = None

    @property
    def _coded(self) -> Tensor:
        return self.counts.coded if self.packs else self.counts.none

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
            window.v, window.n_sink, k, v, self.batch.lengths.start(self.device), softcap=self.shape.softcap,
        )  # fmt: skip

    @property
    def packed_sides(self) -> tuple[str, ...]:
        """Which of ``"key"`` and ``"value"`` are coded."""
        return self.codec.packed_sides if self.is_initialized else ()

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

    def _reading(self) -> PagedKV:
        """What this call's queries may see."""
        counts = self.counts
        read = counts.read if self.packs else counts.none
        return self._paged(read, counts.held if self.pending else counts.total, self.pending)

    def _start(self) -> Tensor:
        start = self.batch.lengths.start(self.device)
        return self.counts.none if start is None else start

    def _oldest(self, top: int, coded: int) -> int:
        """The first body token that a sliding layer is sure to hold, of a sequence that has had ``top`` tokens."""
        plan, p = self.batch.lengths.schedule, self.batch.page_tokens
        if self.table is None:
            return max(top - plan.n_sink - self.ring, 0)
        return max((-(-max(plan.packable(top), coded) // p) - (self.table.most or 0)) * p, 0)
