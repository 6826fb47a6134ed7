"""``paged_attention`` by matrix products over tiles of unpacked pages: extra memory is bounded by a tile."""

import torch
from torch import Tensor

from headq_ao.ops.page_layout import PageLayout
from headq_ao.ops.paged_attention import reference
from headq_ao.ops.paged_attention.new_tokens import with_new_tokens
from headq_ao.ops.paged_attention.tiles import TOKEN_TILE, query_tiles, tiles, worth
from headq_ao.ops.types import PagedKV, Readers, Visible, visible_positions


def paged_attention(
    q: Tensor, scaling: float, kv: PagedKV, readers: Readers, visible: Visible | None, sliding: int,
    reads: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`headq_ao.ops.paged_attention`, on any device. Tiles that no query sees are left out where that costs no
    synchronisation, on the CPU."""
    layout = PageLayout.parse(kv.layout)
    shown = visible_positions(kv.total, q.shape[2], sliding) if visible is None else visible
    if reads is not None:
        count(kv, shown, layout, reads)
    columns = max(TOKEN_TILE // layout.page_tokens, 1)
    tokens = reference.body_tokens(kv, layout.page_tokens) + kv.body_start
    outs = []
    for grouped, of_tile in query_tiles(q, scaling, layout.kv_heads, shown):
        parts = [reference.window_part(grouped, kv, of_tile)]
        for t in tiles(kv.table.shape[1], columns):
            if worth(tokens[:, t], of_tile):
                parts.append(reference.packed_part(grouped, kv, readers, of_tile, layout, t))
        outs.append(reference.merge(parts))
    of_cache = (
        torch.cat([out for out, _ in outs], 3).flatten(1, 2),
        torch.cat([lse for _, lse in outs], 3).flatten(1, 2),
    )
    return with_new_tokens(of_cache, q, scaling, kv, visible, sliding)


def count(kv: PagedKV, shown: Visible, layout: PageLayout, reads: Tensor) -> None:
    """Add how many packed tokens, and how many at all, queries see."""
    first = (kv.coded.add(layout.page_tokens - 1) // layout.page_tokens - kv.table.shape[1]).clamp(min=0)
    first = (kv.body_start + first * layout.page_tokens).clamp(min=kv.n_sink)
    packed = overlap(shown.in_codes(kv), first, kv.body_start + kv.coded)
    position, here = reference.window_positions(kv)
    others = reference.seen_in_full(position, here, shown, kv).sum()
    if kv.new_k is not None:
        others = others + overlap_in_full(shown, kv)
    reads += torch.stack([packed, packed + others])


def overlap_in_full(shown: Visible, kv: PagedKV) -> Tensor:
    """How many of the call's own tokens queries read in full precision."""
    if kv.recent is None:
        return overlap(shown, kv.held, kv.total)
    sinks = torch.clamp(kv.total, max=kv.n_sink)
    newest = Visible(torch.maximum(shown.low, shown.codes_end(kv)), shown.high)
    return overlap(shown, kv.held, sinks) + overlap(newest, kv.held.clamp(min=kv.n_sink), kv.total)


def overlap(shown: Visible, first: Tensor, stop: Tensor) -> Tensor:
    """How many of the positions ``first:stop`` ``[B]`` queries see, in all."""
    high, low = torch.minimum(shown.high, stop[:, None]), torch.maximum(shown.low, first[:, None])
    return (high - low).clamp(min=0).sum()
