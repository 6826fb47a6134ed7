"""A chunk of many queries in half precision on the CPU: tiles of packed tokens are dequantized one at a time, and read
by PyTorch's flash kernel, whose matrix products repay that from some hundred queries on."""

from dataclasses import replace

import torch
from torch import Tensor

from headq_ao.ops.page_layout import PageLayout
from headq_ao.ops.paged_attention import reference
from headq_ao.ops.paged_attention.new_tokens import Part, flash, hiding
from headq_ao.ops.types import PagedKV, Readers, Visible

LEAST_QUERIES = 512  # measured: fewer are read faster as codes
TILE = 4096  # tokens that are dequantized at a time
BLOCK = 64  # queries that are read with the tokens near them


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
    parts = [_of_one(q[b : b + 1], scaling, kv.sequence(b), readers_of(readers, b)) for b in range(len(q))]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def readers_of(readers: Readers, b: int) -> Readers:
    """Those of one sequence."""

    def cut(x: Tensor | None) -> Tensor | None:
        return x if x is None or len(x) == 1 else x[b : b + 1]

    query_map = readers.query_map
    if query_map is not None and query_map.shape[1] > 1:
        query_map = query_map[:, b : b + 1]
    return replace(readers, query_map=query_map, read=cut(readers.read), mean=cut(readers.mean))


def _of_one(q: Tensor, scaling: float, kv: PagedKV, readers: Readers) -> Part:
    """Of one sequence. All queries read the codes before ``shown``; with ``kv.recent``, query ``first + i`` those up to
    ``shown + i`` too."""
    assert kv.new_k is not None and kv.new_v is not None
    layout, packed, held, count = PageLayout.parse(kv.layout), int(kv.packed), int(kv.held), q.shape[2]
    oldest = (-(-packed // layout.page_tokens) - kv.table.shape[1]) * layout.page_tokens
    if kv.recent is None:
        oldest, shown, first = max(oldest, kv.n_sink - kv.body_start), packed, count
        out, lse = flash(q, kv.new_k, kv.new_v, None, scaling, softcap=kv.softcap)
        in_full = window(kv, 0)
    else:
        oldest, shown = 0, max(packed, held - kv.recent)
        first = shown + kv.recent - held + 1
        out, lse = band(q, scaling, kv, shown)
        in_full = None
    whole = [(begin, min(begin + TILE, shown)) for begin in range(oldest, shown, TILE)]
    for begin, end in whole or [(oldest, oldest)] * (in_full is not None):
        k, v = rows(kv, layout, readers, begin, end, q.dtype)
        if in_full is not None and end >= shown:  # all in one
            k, v = (torch.cat(x, 2) for x in zip((k, v), in_full, strict=True))
        join(out, lse, flash(q, k, v, None, scaling, causal=False, softcap=kv.softcap))
    for begin in range(first, count, TILE):
        k, v = rows(kv, layout, readers, shown + begin - first, shown + min(begin + TILE, count) - first, q.dtype)
        part = flash(q[:, :, begin:], k, v, None, scaling, softcap=kv.softcap)
        join(out[:, :, begin:], lse[:, :, begin:], part)
    return out, lse


def window(kv: PagedKV, oldest: int) -> tuple[Tensor, Tensor]:
    """Keys and values before the call's own in full precision, from that position on, in order."""
    position, here = reference.window_positions(kv)
    kept = (here & (position >= oldest))[0].nonzero()[:, 0]
    k, v = (x[:, :, kept] for x in reference.window_tokens(kv))
    return k, v


def band(q: Tensor, scaling: float, kv: PagedKV, shown: int) -> Part:
    """What queries read in full precision, sinks apart that are before that: ``kv.recent`` tokens, none before
    ``shown``, and their own. Blocks of them are read side by side, each with the tokens that lie near it."""
    assert kv.recent is not None and kv.new_k is not None and kv.new_v is not None
    held, count, blocks = int(kv.held), q.shape[2], -(-q.shape[2] // BLOCK)
    width = BLOCK + kv.recent
    near_each = []
    for before, own in zip(window(kv, held - kv.recent), (kv.new_k, kv.new_v), strict=True):
        x = own.new_zeros(*own.shape[1:2], kv.recent + blocks * BLOCK, own.shape[3])
        x[:, kv.recent - before.shape[2] : kv.recent] = before[0]
        x[:, kv.recent : kv.recent + count] = own[0]
        near_each.append(x.unfold(1, width, BLOCK).permute(1, 0, 3, 2))  # [blocks, Hkv, width, D]
    queries = torch.nn.functional.pad(q[0], (0, 0, 0, blocks * BLOCK - count)).unflatten(1, (blocks, BLOCK))
    query, near = (torch.arange(n, dtype=torch.int64, device=q.device) for n in (BLOCK, width))
    block = torch.arange(blocks, dtype=torch.int64, device=q.device)[:, None, None] * BLOCK
    seen = (near >= query[:, None]) & (near <= query[:, None] + kv.recent) & (near + block >= shown - held + kv.recent)
    k, v = near_each
    out, lse = flash(queries.transpose(0, 1), k, v, hiding(seen, q.dtype), scaling, softcap=kv.softcap)
    out, lse = (x.transpose(0, 1).flatten(1, 2)[None, :, :count] for x in (out, lse))
    return out, lse


def join(out: Tensor, lse: Tensor, part: Part) -> None:
    """Add to one part of a softmax another one, each of which sees something for every query."""
    other, other_lse = part
    out.lerp_(other, torch.sigmoid(other_lse - lse)[..., None])
    lse.copy_(torch.logaddexp(lse, other_lse))


def rows(
    kv: PagedKV, layout: PageLayout, readers: Readers, begin: int, end: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """:func:`dequantized` in that dtype; an engine's sinks, which lie in pages too, in full precision."""
    k, v = dequantized(kv, layout, readers, begin, end, dtype)
    if kv.window_table is not None and begin < kv.n_sink:
        assert kv.sink_k is not None and kv.sink_v is not None
        for x, sinks in ((k, kv.sink_k), (v, kv.sink_v)):
            x[:, :, : kv.n_sink - begin] = sinks[kv.table[:, 0].long()][:, :, begin : min(kv.n_sink, end)]
    return k, v


def dequantized(
    kv: PagedKV, layout: PageLayout, readers: Readers, begin: int, end: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What body tokens ``begin:end`` of one sequence stand for, ``[1, Hkv, n, D]`` each.

    Keys as queries see them: from ``s = q·k̂`` for all ``q``, ``k̂ = σ (M_c c + M_b) + m M_h + M_μ`` with the columns
    ``M`` of the query map.
    """
    assert readers.query_map is not None
    p = layout.page_tokens
    pages = torch.arange(begin // p, -(-end // p), dtype=torch.int64, device=kv.table.device) % kv.table.shape[1]
    table, inside = kv.table[:, pages].long(), slice(begin - begin // p * p, end - begin // p * p)
    mapping, frame = readers.query_map[0].expand(-1, layout.kv_heads, -1, -1), readers.frame
    if frame is not None:  # R_s of what was read in segment s's frame; the other one of each pair is mapped beside it
        mapping = torch.cat([mapping, mapping[:, :, frame.partner]], 2)
        segment = frame.of(torch.arange(begin, end, dtype=torch.int64, device=kv.table.device))
        cosine, sine = frame.table[segment].unbind(1)
    d, n = layout.key_dim, end - begin
    k = torch.empty((1, layout.kv_heads, n, d), dtype=dtype, device=kv.table.device)
    v = torch.empty((1, layout.kv_heads, n, layout.value_dim), dtype=dtype, device=kv.table.device)
    for group in layout.split(kv.pages):
        part = group.layout.part
        to_codes, bias, of_zero, of_mean = mapping[:, part].split([mapping.shape[-1] - 3, 1, 1, 1], -1)
        codes = reference.gathered(group.keys, table, torch.float32, keys=True)[:, :, inside]
        assert group.keys.scale is not None
        sigma = reference.numbers(group.keys.scale, table, torch.float32)[:, :, inside, None]
        x = (codes @ to_codes.mT).add_(bias.mT).mul_(sigma).add_(of_mean.mT)
        if group.keys.zero is not None:
            x.addcmul_(reference.numbers(group.keys.zero, table, torch.float32)[:, :, inside, None], of_zero.mT)
        k[:, part] = x if frame is None else (x[..., :d] * cosine).addcmul_(x[..., d:], sine, value=-1)
        y = reference.gathered(group.values, table, torch.float32, keys=False)[:, :, inside]
        y = y if readers.read is None else y @ of_heads(readers.read, part).mT
        v[:, part] = y if readers.mean is None else y.add_(of_heads(readers.mean, part)[:, :, None])
    return k, v


def of_heads(x: Tensor, part: slice) -> Tensor:
    """``[B, Hkv or 1, ..]`` of some KV heads."""
    return x if x.shape[1] == 1 else x[:, part]
