"""Attention over a paged cache, as the equations read. No decision depends on what a tensor holds, so that it can be
traced, captured, and run on any device; it unpacks all pages and is slow."""

import torch
from torch import Tensor

from headq_ao.ops.layout import unpack_keys, unpack_values
from headq_ao.ops.page_layout import PagedGroup, PagedTokens, PageLayout
from headq_ao.ops.rounding import scale_of
from headq_ao.ops.types import PagedKV, Readers, Visible, last_in_slots, visible_positions


def paged_attention(
    q: Tensor, scaling: float, kv: PagedKV, readers: Readers, visible: Visible | None = None, sliding: int = 0
) -> tuple[Tensor, Tensor]:
    """``o = Σ_j softmax(s)_j v_j`` ``[B, Hq, S, Dv]`` and ``lse = log Σ_j exp(s_j)`` ``[B, Hq, S]``, fp32 (fp64 for
    fp64 queries); 0 and −inf where a query sees nothing."""
    layout, b, s = PageLayout.parse(kv.layout), q.shape[0], q.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = (q.to(wide) * scaling).reshape(b, layout.kv_heads, -1, s, q.shape[-1])  # [B, Hkv, G, S, D]
    shown = visible_positions(kv.total, s, sliding) if visible is None else visible
    parts = [packed_part(grouped, kv, readers, shown, layout), window_part(grouped, kv, shown)]
    if kv.new_k is not None:
        parts.append(new_part(grouped, kv, shown))
    out, lse = merge(parts)
    return out.flatten(1, 2), lse.flatten(1, 2)


def packed_part(
    q: Tensor, kv: PagedKV, readers: Readers, shown: Visible, layout: PageLayout, part: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Over the pages of the block table, or of a part of its columns."""
    j = body_tokens(kv, layout.page_tokens)[:, part].flatten(1)  # [B, C·P]
    frames = None if readers.frame is None else readers.frame.of(j)
    here = (j >= 0) & (j < kv.coded[:, None]) & (j + kv.body_start >= kv.n_sink)
    seen = visible_at(j + kv.body_start, here, shown.in_codes(kv))  # [B, S, C·P]
    table = kv.table[:, part].long()
    scores, outs = [], []
    for group in layout.split(kv.pages):
        scores.append(group_scores(q[:, group.layout.part], group, table, kv.segment, readers, frames))
    s = capped(torch.cat(scores, 1), kv.softcap).masked_fill(~seen[:, None, None], float("-inf"))
    a, lse = softmax(s)
    for group in layout.split(kv.pages):
        values = gathered(group.values, table, q.dtype, keys=False).masked_fill(~here[:, None, :, None], 0.0)
        outs.append(a[:, group.layout.part] @ values[:, :, None])
    return read_back(torch.cat(outs, 1), lse, readers), lse


def body_tokens(kv: PagedKV, page_tokens: int) -> Tensor:
    """Body tokens ``[B, C, P]`` of each column's page: ``c`` holds the last logical page ``i ≡ c (mod C)`` in use;
    below 0: none."""
    pages = (kv.coded + page_tokens - 1).div(page_tokens, rounding_mode="floor")
    logical = last_in_slots(pages, kv.table.shape[1])  # [B, C]
    return logical[..., None] * page_tokens + torch.arange(page_tokens, device=kv.table.device)


def group_scores(
    q: Tensor, group: PagedGroup, table: Tensor, segment: Tensor | None, readers: Readers, frames: Tensor | None = None
) -> Tensor:
    """``s_j`` of the packed tokens of a head group, ``[B, h, G, S, C·P]``; ``frames [B, C·P]``: the segment of each,
    where :attr:`Readers.frame` is given."""
    keys = gathered(group.keys, table, q.dtype, keys=True)
    if group.keys.exact is not None:
        return q @ keys[:, :, None].transpose(-1, -2)
    assert readers.query_map is not None and group.keys.scale is not None
    heads, tokens = group.layout.part, keys.shape[2]
    sigma = numbers(group.keys.scale, table, q.dtype)[:, :, None, None]
    zero = None if group.keys.zero is None else numbers(group.keys.zero, table, q.dtype)[:, :, None, None]
    of_page = None if segment is None else segment.long()[table].repeat_interleave(tokens // table.shape[1], 1)
    total: Tensor | None = None
    maps = readers.query_map if segment is not None else readers.query_map[:1]
    for g, mapping in enumerate(maps.to(q.dtype)):
        mapping = mapping if mapping.shape[1] == 1 else mapping[:, heads]
        if frames is not None:
            s = q @ _framed_keys(keys, sigma, zero, mapping, readers, frames)[:, :, None].transpose(-1, -2)
        else:
            mapped = q @ mapping[:, :, None]
            codes, bias, of_zero, of_mean = mapped.split([mapped.shape[-1] - 3, 1, 1, 1], -1)
            s = (codes @ keys[:, :, None].transpose(-1, -2) + bias) * sigma + of_mean
            s = s if zero is None else s + of_zero * zero
        total = s if total is None or of_page is None else torch.where((of_page == g)[:, None, None, None], s, total)
    assert total is not None
    return total


def _framed_keys(
    codes: Tensor, sigma: Tensor, zero: Tensor | None, mapping: Tensor, readers: Readers, frames: Tensor
) -> Tensor:
    """``R_s k̂_j`` ``[B, h, C·P, D]``: ``(R_sᵀ q)·k̂_j = q·R_s k̂_j``, and there may be more queries than tokens."""
    assert readers.frame is not None
    of_codes, bias, of_zero, of_mean = mapping.mT.split([mapping.shape[-1] - 3, 1, 1, 1], -2)
    k = (codes @ of_codes + bias) * sigma[:, :, 0, 0, :, None] + of_mean
    k = k if zero is None else k + of_zero * zero[:, :, 0, 0, :, None]
    return readers.frame.into(k, frames[:, None], back=True).to(codes.dtype)


def gathered(side: PagedTokens, table: Tensor, dtype: torch.dtype, *, keys: bool) -> Tensor:
    """Codes of keys ``[B, h, C·P, M]``; of values what they stand for in the stored basis; tokens that are not coded as
    they are."""
    if side.exact is not None:
        return by_sequence(side.exact, table).flatten(2, 3).to(dtype)
    planes = [by_sequence(plane, table) for plane in side.planes]  # [B, h, C, tiles, ...]
    if keys:
        return unpack_keys(planes, side.bits).to(dtype).flatten(2, 3)
    assert side.scale is not None
    codes = (unpack_keys(planes, side.bits) if side.shared else unpack_values(planes, side.bits[0])).to(dtype)
    codes, scale = codes.flatten(2, 3), scale_of(by_sequence(side.scale, table)).to(dtype).flatten(2, 3)
    scale = scale.unsqueeze(-1) if side.shared else scale
    centred = -scale * ((2 ** side.bits[0] - 1) / 2)
    zero = centred if side.zero is None else by_sequence(side.zero, table).to(dtype).flatten(2, 3)
    grouped: Tensor = codes.unflatten(-1, (scale.shape[-1], -1))
    return (grouped * scale[..., None] + zero[..., None]).flatten(-2)


def by_sequence(pages: Tensor, table: Tensor) -> Tensor:
    """``[B, h, C, ...]`` of what lies in physical pages ``[N, h, ...]``."""
    return pages[table].transpose(1, 2)


def numbers(pages: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of tokens ``[N, h, P]`` as ``[B, h, C·P]``."""
    return scale_of(by_sequence(pages, table)).flatten(2).to(dtype)


def read_back(out: Tensor, lse: Tensor, readers: Readers) -> Tensor:
    """``Σ_j a_j v̂_j`` from ``Σ_j a_j ŷ_j`` ``[B, Hkv, G, S, D]``; nothing where no token was seen."""
    if readers.read is not None:
        out = out @ readers.read.to(out.dtype).transpose(-1, -2)[:, :, None]
    if readers.mean is not None:
        out = out + readers.mean.to(out.dtype)[:, :, None, None]
    return out.masked_fill((lse == float("-inf"))[..., None], 0.0)


def window_part(q: Tensor, kv: PagedKV, shown: Visible) -> tuple[Tensor, Tensor]:
    """Over sinks and the newest tokens."""
    position, here = window_positions(kv)
    return dense_part(q, *window_tokens(kv), here, seen_in_full(position, here, shown, kv), kv.softcap)


def window_tokens(kv: PagedKV) -> tuple[Tensor, Tensor]:
    """Keys and values in the slots of :func:`window_positions`, ``[B, Hkv, slots, D]``."""
    if kv.window_table is None:
        return kv.window_k, kv.window_v
    assert kv.sink_k is not None and kv.sink_v is not None
    first, table = kv.table[:, :1].long(), kv.window_table.long().gather(1, window_columns(kv))
    k, v = (
        torch.cat([by_sequence(sinks, first).flatten(2, 3), by_sequence(pages, table).flatten(2, 3)], 2)
        for sinks, pages in ((kv.sink_k, kv.window_k), (kv.sink_v, kv.window_v))
    )
    return k, v


def window_positions(kv: PagedKV) -> tuple[Tensor, Tensor]:
    """The position of the token in each slot of sinks and window, ``[B, n_sink + R]``, below 0: none; and which of them
    are read there. Ring slot ``r`` holds the last body token ``j ≡ r (mod R)`` in it; with a window table, those of
    :func:`window_columns` follow each other."""
    sinks = torch.arange(kv.n_sink, device=kv.held.device).expand(len(kv.held), -1)
    if kv.window_table is None:
        body = last_in_slots(kv.held - kv.n_sink, kv.window_k.shape[2] - kv.n_sink)
        newest = torch.where(body >= 0, body + kv.n_sink, -1)
    else:
        size = kv.window_k.shape[2]
        newest = (window_columns(kv)[..., None] * size + torch.arange(size, device=kv.held.device)).flatten(1)
    from_window = (newest >= kv.n_sink) & (newest >= kv.body_start + kv.packed[:, None])
    position = torch.cat([sinks, newest], 1)
    here = (position < kv.held[:, None]) & torch.cat([torch.ones_like(sinks, dtype=torch.bool), from_window], 1)
    return position, here


def window_columns(kv: PagedKV) -> Tensor:
    """Columns ``[B, n]`` of the window table whose pages may hold tokens that are read there: as many as
    ``kv.newest`` tokens lie in at most."""
    assert kv.window_table is not None
    count, size = kv.window_table.shape[1], kv.window_k.shape[2]
    n = count if kv.newest is None else min(-(-kv.newest // size) + 1, count)
    first = (kv.packed.clamp(min=kv.n_sink) // size).clamp(max=count - n)
    return first[:, None] + torch.arange(n, device=kv.held.device)


def new_part(q: Tensor, kv: PagedKV, shown: Visible) -> tuple[Tensor, Tensor]:
    """Over the call's own tokens."""
    assert kv.new_k is not None and kv.new_v is not None
    position, here = new_positions(kv)
    return dense_part(q, kv.new_k, kv.new_v, here, seen_in_full(position, here, shown, kv), kv.softcap)


def new_positions(kv: PagedKV) -> tuple[Tensor, Tensor]:
    """The positions of the call's own tokens, ``[B, S]``, and which of them are real."""
    assert kv.new_k is not None
    start = torch.zeros_like(kv.held) if kv.new_start is None else kv.new_start
    position = kv.held[:, None] + torch.arange(kv.new_k.shape[2], device=kv.held.device) - start[:, None]
    return position, (position >= kv.held[:, None]) & (position < kv.total[:, None])


def dense_part(
    q: Tensor, k: Tensor, v: Tensor, here: Tensor, seen: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Over tokens in full precision ``[B, Hkv, n, D]``, those of them that are ``here [B, n]``, the others may hold
    anything; ``seen [B, S, n]`` by each query."""
    k, v = (x.to(q.dtype).masked_fill(~here[:, None, :, None], 0.0) for x in (k, v))
    seen = seen[:, None, None]
    s = capped(q @ k[:, :, None].transpose(-1, -2), softcap)
    a, lse = softmax(s.masked_fill(~seen, float("-inf")))
    return a @ v[:, :, None], lse


def visible_at(position: Tensor, here: Tensor, shown: Visible) -> Tensor:
    """Which queries see the tokens at those positions, ``[B, S, n]``."""
    at = position[:, None]
    return here[:, None] & (at >= shown.low[..., None]) & (at < shown.high[..., None])


def seen_in_full(position: Tensor, here: Tensor, shown: Visible, kv: PagedKV) -> Tensor:
    """Which queries read the tokens at those positions in full precision, ``[B, S, n]``."""
    at = position[:, None]
    return visible_at(position, here, shown) & ((at < kv.n_sink) | (at >= shown.codes_end(kv)[..., None]))


def capped(s: Tensor, softcap: float | None) -> Tensor:
    """Scores under a softcap, ``softcap · tanh(s / softcap)``; None: as they are."""
    return s if softcap is None else softcap * torch.tanh(s / softcap)


def softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """Weights over the last dimension and their log-sum-exp; zero and −inf where nothing is seen."""
    lse = torch.logsumexp(s, -1)
    return torch.exp(s - lse.nan_to_num(neginf=0.0)[..., None]), lse


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """``o = Σ_i e^{lse_i − lse} o_i``, ``lse = log Σ_i e^{lse_i}``."""
    lses = torch.stack([lse for _, lse in parts])
    lse = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - lse.nan_to_num(neginf=0.0))
    out = (weights[..., None] * torch.stack([o for o, _ in parts])).sum(0)
    return out, lse
