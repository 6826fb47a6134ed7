"""A layer's pages in an engine's hands: a step's tokens are coded, and its queries read all that they see.

Requests are of unequal lengths and bring unequal numbers of new tokens, which lie one after the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headq_ao.ops.cache_update.encoders import Encoders
from headq_ao.ops.cache_update.op import cache_update, plan_update
from headq_ao.ops.page_layout import PageLayout
from headq_ao.ops.paged_attention.op import paged_attention, plan_attention
from headq_ao.ops.types import PagedKV, Readers


@dataclass(frozen=True)
class Requests:
    """The requests of one step, ``B`` of them with ``T`` new tokens together.

    Attributes:
        start: ``[B + 1]`` int64, where the new tokens of each begin.
        held, packed, total: ``[B]`` int64: tokens before the step; how many of these are read as codes; and tokens with
            the step's. All three contiguous.
        table: ``[B, C]`` int32, block table of the packed pages.
        window_table: ``[B, Cw]`` int32, that of the pages of the newest tokens.
        most: new tokens of one of them, at most.
        few: the same of those that are not long.
        long: those whose new tokens are many, in rising order: number, first token, the one behind the last. They are
            read one at a time, all others at once.
        recent: tokens before a query that it reads in full precision, so that ``packed = max(held − recent, 0)``; None:
            all from ``packed`` on.
    """

    start: Tensor
    held: Tensor
    packed: Tensor
    total: Tensor
    table: Tensor
    window_table: Tensor
    most: int
    few: int
    long: tuple[tuple[int, int, int], ...] = ()
    recent: int | None = None

    def __len__(self) -> int:
        return len(self.table)

    def part(self, first: int, stop: int) -> "Requests":
        """Those numbers of them, none of them long."""
        at = slice(first, stop)
        return Requests(
            self.start[first : stop + 1], self.held[at], self.packed[at], self.total[at], self.table[at],
            self.window_table[at], self.few, self.few, recent=self.recent,
        )  # fmt: skip

    def parts(self, tokens: int) -> Iterator[tuple["Requests", slice]]:
        """Each long one by itself, ``few`` 0, and those between two of them together; with the ``tokens`` of each."""
        first = after = 0
        for number, begin, end in (*self.long, (len(self), tokens, 0)):
            if number > first and self.few:
                yield self.part(first, number) if self.long else self, slice(after, begin)
            if end:
                yield replace(self.part(number, number + 1), most=end - begin, few=0), slice(begin, end)
            first, after = number + 1, end

    def cache(self, kv: PagedKV, packed: Tensor, held: Tensor) -> PagedKV:
        """A layer's pages as these requests see them; ``held`` either of before the step or, once its tokens are
        there, ``total``."""
        newest = None if self.recent is None else self.recent + (self.most if held is self.total else 0)
        return replace(
            kv, table=self.table, window_table=self.window_table, packed=packed, held=held, total=self.total,
            newest=newest, recent=self.recent,
        )  # fmt: skip


class LayerPages:
    """One layer's packed pages and the pages of its newest tokens, in tensors that an engine has allocated.

    Args:
        raw: ``[N, H, P, C]`` uint8; the ``H·P·C`` bytes of a page lie side by side.
        window: ``[Nw, Hkv, Pw, 2 D]``, key and value of a token beside each other.
        layout: of the packed pages.
        n_sink: first tokens of a request in full precision.
        readers: how the layer's codec is read.
        encoders: how keys and values are written, by head group.
        q_heads: query heads.
        sliding: positions of a sliding window, 0: none.
    """

    def __init__(
        self, raw: Tensor, window: Tensor, layout: PageLayout, n_sink: int, readers: Readers,
        encoders: tuple[Encoders, Encoders], q_heads: int, sliding: int = 0,
    ) -> None:  # fmt: skip
        self.raw, self.layout, self.sliding = raw, layout, sliding
        size = raw.shape[1] * raw.shape[2] * raw.shape[3]
        pages, sink_k, sink_v = layout.views(raw.as_strided((len(raw), size), (raw.stride(0), 1)), n_sink, window.dtype)
        self.readers, self.encoders = readers, encoders
        lengths = torch.zeros(1, dtype=torch.int64, device=raw.device)
        table = torch.zeros(1, 1, dtype=torch.int32, device=raw.device)
        self.kv = PagedKV(
            pages, layout.spec, table, None, lengths, lengths, lengths, window[..., : layout.key_dim],
            window[..., layout.key_dim :], n_sink, window_table=table, sink_k=sink_k, sink_v=sink_v,
        )  # fmt: skip
        self.update: Any = plan_update(self.kv, lengths, *encoders)
        self.read: Any = plan_attention(self.kv, readers, q_heads, sliding)
        self.planned = hasattr(self.update, "requests") and hasattr(self.read, "requests")

    def step(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scaling: float, of: Requests) -> None:
        """Code the new tokens, then write to ``out`` what their queries read.

        Args:
            q, out: ``[T, Hq, D]``.
            k, v: ``[T, Hkv, D]``.
            scaling: of the scores.
            of: the step's requests.
        """
        parts = list(of.parts(len(q)))
        if self.planned:
            self.update.requests(k, v, of)
        else:
            for part, _ in parts:
                self._update(k, v, part)
        for part, tokens in parts:
            if part.most > part.few:
                out[tokens] = self._read_long(q[tokens], k[tokens], v[tokens], scaling, part).to(out.dtype)
            elif self.planned:
                self.read.requests(q, scaling, out, part)
            else:
                out[tokens] = self._read(q, scaling, part, tokens).to(out.dtype)

    def _update(self, k: Tensor, v: Tensor, of: Requests) -> None:
        """By the operator, which takes equally many tokens of each sequence."""
        index = of.start[:-1, None] + torch.arange(of.most, device=k.device)
        k, v = (x[index.clamp(max=len(x) - 1)].transpose(1, 2) for x in (k, v))
        cache_update(of.cache(self.kv, of.held, of.held), k, v, of.total, of.most, *self.encoders)

    def _read(self, q: Tensor, scaling: float, of: Requests, tokens: slice) -> Tensor:
        """By the operator, which takes equally many queries of each sequence: those before the first are of no use."""
        index = of.start[1:, None] - of.most + torch.arange(of.most, device=q.device)
        padded, kv = q[index.clamp(min=0)].transpose(1, 2), of.cache(self.kv, of.packed, of.total)
        found, _ = paged_attention(padded, scaling, kv, self.readers, None, self.sliding)
        token = torch.arange(tokens.start, tokens.stop, device=q.device)
        request = torch.searchsorted(of.start[1:].contiguous(), token, right=True).clamp(max=len(of) - 1)
        return found.transpose(1, 2)[request, (token - of.start[1:][request] + of.most).clamp(max=of.most - 1)]

    def _read_long(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, of: Requests) -> Tensor:
        """Of one request; its own tokens are read as they came."""
        new_k, new_v = (x.transpose(0, 1)[None] for x in (k, v))
        kv = replace(of.cache(self.kv, of.packed, of.held), new_k=new_k, new_v=new_v)
        found, _ = paged_attention(q.transpose(0, 1)[None], scaling, kv, self.readers, None, self.sliding)
        return found[0].transpose(0, 1)
