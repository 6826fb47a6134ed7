"""A chunk of many queries in half precision on the CPU: tiles of packed tokens are dequantized one at a time, and read
by PyTorch's flash kernel, whose matrix products repay that from some hundred queries on."""

from dataclasses import replace

import torch
from torch import Tensor

from headq_ao.ops.page_layout import PageLayout
from headq_ao.ops.paged_attention import reference
from headq_ao.ops.paged_attention.new_tokens import Part, flash, hiding
from headq_ao.ops.paged_attention.tiles import tiles
from headq_ao.ops.types import PagedKV, Readers, Visible, visible_positions

LEAST_QUERIES = 512  # measured: fewer are read faster as codes
TILE = 4096  # tokens that are dequantized at a time
BLOCK = 256  # queries that are read under one mask


def serves(q: Tensor, kv: PagedKV, visible: Visible | None, sliding: int) -> bool:
    """Whether these are such chunks, whose queries see all of the cache; an empty one only where they read tokens of
    their own as codes."""
    if q.shape[2] < LEAST_QUERIES or q.dtype not in (torch.bfloat16, torch.float16) or visible is not None or sliding:
        return False
    layout = PageLayout.parse(kv.layout)
    alike = layout.key_dim == layout.value_dim and kv.segment is None and kv.window_k.dtype == q.dtype
    some = kv.recent is not None or bool((kv.held > 0).all())
    return alike and some and kv.new_k is not None and bool((kv.total - kv.held == q.shape[2]).all())


def attention(q: Tensor, scaling: float, kv: PagedKV, readers: Readers) -> Part:
    """:func:`headq_ao.ops.paged_attention` of such a chunk."""
    assert kv.new_k is not None and kv.new_v is not None
    if kv.recent is not None:
        parts = [_by_position(q[b : b + 1], scaling, kv.sequence(b), readers_of(readers, b)) for b in range(len(q))]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
    return joined(read_cache(q, scaling, kv, readers), flash(q, kv.new_k, kv.new_v, None, scaling, softcap=kv.softcap))


def read_cache(q: Tensor, scaling: float, kv: PagedKV, readers: Readers) -> Part:
    """Attention over all tokens ``p < held`` of the cache, ``new_k`` and ``new_v`` left out."""
    parts = [_read_one(q[b : b + 1], scaling, kv.sequence(b), readers_of(readers, b)) for b in range(len(q))]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def readers_of(readers: Readers, b: int) -> Readers:
    """Those of one sequence."""

    def cut(x: Tensor | None) -> Tensor | None:
        return x if x is None or len(x) == 1 else x[b : b + 1]

    query_map = readers.query_map
    if query_map is not None and query_map.shape[1] > 1:
        query_map = query_map[:, b : b + 1]
    return replace(readers, query_map=query_map, read=cut(readers.read), mean=cut(readers.mean))


def _read_one(q: Tensor, scaling: float, kv: PagedKV, readers: Readers) -> Part:
    """Of one sequence."""
    layout, packed = PageLayout.parse(kv.layout), int(kv.packed)
    oldest = (-(-packed // layout.page_tokens) - kv.table.shape[1]) * layout.page_tokens
    oldest = max(oldest, kv.n_sink - kv.body_start)
    tiles = [(begin, min(begin + TILE, packed)) for begin in range(oldest, packed, TILE)]
    _, here = reference.window_positions(kv)
    kept = here[0].nonzero()[:, 0]
    k, v = (x[:, :, kept] for x in reference.window_tokens(kv))
    found: Part | None = None
    for tile in tiles:
        of_tile = [x.to(q.dtype) for x in dequantized(kv, layout, readers, *tile)]
        if tile == tiles[-1]:  # all in one
            k, v = (torch.cat(x, 2) for x in zip(of_tile, (k, v), strict=True))
        else:
            part = flash(q, of_tile[0], of_tile[1], None, scaling, False, kv.softcap)
            found = part if found is None else joined(found, part)
    last = flash(q, k, v, None, scaling, False, kv.softcap)
    return last if found is None else joined(found, last)


def _by_position(q: Tensor, scaling: float, kv: PagedKV, readers: Readers) -> Part:
    """Of one sequence whose queries read codes up to ends of their own; see :attr:`PagedKV.recent`."""
    ends = visible_positions(kv.total, q.shape[2], 0).codes_end(kv)[0].contiguous()
    out, lse = _in_full(q, scaling, kv, ends)
    layout = PageLayout.parse(kv.layout)
    for begin in range(kv.n_sink, int(ends[-1]), TILE):
        end = min(begin + TILE, int(ends[-1]))
        k, v = (x.to(q.dtype) for x in dequantized(kv, layout, readers, begin, end))
        some, whole = (int(i) for i in torch.searchsorted(ends, ends.new_tensor([begin + 1, end])))
        for first in [*range(some, whole, BLOCK), whole]:
            rows = slice(first, min(first + BLOCK, whole) if first < whole else q.shape[2])
            n, mask = end - begin, None
            if first < whole:
                n = int(ends[rows.stop - 1]) - begin
                mask = hiding(
                    torch.arange(begin, begin + n, dtype=ends.dtype, device=ends.device) < ends[None, rows, None],
                    q.dtype,
                )
            if rows.start < rows.stop:
                part = flash(q[:, :, rows], k[:, :, :n], v[:, :, :n], mask, scaling, False, kv.softcap)
                out[:, :, rows], lse[:, :, rows] = joined((out[:, :, rows], lse[:, :, rows]), part)
    return out, lse


def _in_full(q: Tensor, scaling: float, kv: PagedKV, ends: Tensor) -> Part:
    """What such queries read in full precision: sinks, and tokens from ``ends [S]`` up to their own."""
    assert kv.new_k is not None and kv.new_v is not None
    (window, in_window), (new, _) = reference.window_positions(kv), reference.new_positions(kv)
    kept = in_window[0].nonzero()[:, 0]
    position = torch.cat([window[0, kept], new[0]])  # rising
    k, v = (
        torch.cat([x[:, :, kept], own], 2)
        for x, own in zip(reference.window_tokens(kv), (kv.new_k, kv.new_v), strict=True)
    )
    own_position, sinks = new[0], int((position < kv.n_sink).sum())
    parts = []
    for block in tiles(q.shape[2], BLOCK):
        first, stop = torch.searchsorted(position, torch.stack([ends[block.start], own_position[block.stop - 1] + 1]))
        number = torch.arange(int(stop), dtype=torch.int64, device=q.device)
        read = number[(number < sinks) | (number >= first)]
        at, own = position[read], own_position[block, None]
        mask = hiding(((at >= ends[block, None]) | (at < kv.n_sink))[None] & (at <= own), q.dtype)
        parts.append(flash(q[:, :, block], k[:, :, read], v[:, :, read], mask, scaling, softcap=kv.softcap))
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def joined(one: Part, other: Part) -> Part:
    """Two parts of a softmax, each of which sees something for every query."""
    (out, lse), (out_b, lse_b) = one, other
    return torch.lerp(out, out_b, torch.sigmoid(lse_b - lse)[..., None]), torch.logaddexp(lse, lse_b)


def dequantized(kv: PagedKV, layout: PageLayout, readers: Readers, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """What body tokens ``begin:end`` of one sequence stand for, ``[1, Hkv, n, D]`` fp32 each.

    Keys as queries see them: from ``s = q·k̂`` for all ``q``, ``k̂ = σ (M_c c + M_b) + m M_h + M_μ`` with the columns
    ``M`` of the query map.
    """
    assert readers.query_map is not None
    p = layout.page_tokens
    pages = torch.arange(begin // p, -(-end // p), dtype=torch.int64, device=kv.table.device) % kv.table.shape[1]
    table, inside = kv.table[:, pages].long(), slice(begin - begin // p * p, end - begin // p * p)
    mapping = readers.query_map[0].expand(-1, layout.kv_heads, -1, -1)
    keys, values = [], []
    for group in layout.split(kv.pages):
        of = mapping[:, group.layout.part]
        to_codes, bias, of_zero, of_mean = of.split([of.shape[-1] - 3, 1, 1, 1], -1)
        codes = reference.gathered(group.keys, table, torch.float32, keys=True)[:, :, inside]
        assert group.keys.scale is not None
        sigma = reference.numbers(group.keys.scale, table, torch.float32)[:, :, inside, None]
        k = (codes @ to_codes.mT).add_(bias.mT).mul_(sigma).add_(of_mean.mT)
        if group.keys.zero is not None:
            k.addcmul_(reference.numbers(group.keys.zero, table, torch.float32)[:, :, inside, None], of_zero.mT)
        keys.append(k)
        values.append(reference.gathered(group.values, table, torch.float32, keys=False)[:, :, inside])
    k, v = torch.cat(keys, 1), torch.cat(values, 1)
    if (frame := readers.frame) is not None:  # R_s of what was read in the frame of segment s
        c, d = frame.table[frame.of(torch.arange(begin, end, dtype=torch.int64, device=k.device))].unbind(1)
        partner = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)[
            :, frame.partner
        ]  # a product is faster than an index
        k = (k * c).addcmul_(k @ partner, d, value=-1)
    v = v if readers.read is None else v @ readers.read.mT
    return k, v if readers.mean is None else v.add_(readers.mean[:, :, None])
