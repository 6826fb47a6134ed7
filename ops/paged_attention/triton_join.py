"""Triton: the query mapped to what scores are read with; and what the splits found, joined and taken back to the
model's basis."""

import triton
import triton.language as tl

from headq_ao.ops.paged_attention.triton_packed import body_token, oldest_segment, oldest_token
from headq_ao.ops.paged_attention.triton_window import coded, codes_end, product_fp32, query_token, visible

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(
    do_not_specialize=["recent", "kv_heads", "new", "rows", "table_columns"],
    do_not_specialize_on_alignment=["packed", "total", "query_start"],
)
def map_kernel(
    q, q_strides, query_start, scaling, query_map, map_strides, mapped, frame, packed, recent, total, table_columns,
    kv_heads, new, rows,
    P: tl.constexpr, SEGMENTS: tl.constexpr, M: tl.constexpr, KEY_D: tl.constexpr, KEY_PADDED: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``mapped [G, B, Hkv, g·S, M + 3]`` fp32: the scaled queries ``q [B, Hq, S, KEY_D]`` by ``query_map`` with strides
    of segment, batch, head and rows; with ``query_start [B + 1]`` ``q [T, Hq, KEY_D]``, their first stride 0. Grid:
    heads, blocks of columns by blocks of 16 rows, segments.

    ``frame``: table and partners of :class:`headq_ao.ops.types.SegmentFrame`, tokens of a segment and how many there
    are. The queries are then mapped for each of them that packed tokens are of, from that of the oldest on."""
    ROWS: tl.constexpr = 16
    BLOCKS: tl.constexpr = (M + 3 + COLUMNS - 1) // COLUMNS
    b = tl.program_id(0).to(tl.int64) // kv_heads
    h = tl.program_id(0).to(tl.int64) % kv_heads
    segment = tl.program_id(2).to(tl.int64) % SEGMENTS
    some = True
    if frame is not None:
        angles, partner, tokens, count = frame
        in_pages = coded(total + b, tl.load(packed + b), recent)
        at_frame = oldest_segment(in_pages, table_columns, tokens, count, P) + tl.program_id(2) // SEGMENTS
        some = (at_frame < count) & (at_frame * tokens < in_pages)
        angles += at_frame * (2 * KEY_D)
    row = tl.program_id(1) // BLOCKS * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    head = h * (rows // new) + row // new
    if query_start is None:
        q += b * q_strides[0] + head[:, None] * q_strides[1] + (row % new)[:, None] * q_strides[2]
    else:
        token, own = query_token(query_start, b, row % new, new)
        q += head[:, None] * q_strides[1] + token[:, None] * q_strides[2]
    query_map += segment * map_strides[0] + b * map_strides[1] + h * map_strides[2] + column[None, :]
    STEP: tl.constexpr = min(KEY_PADDED, 64)
    if some:
        product = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in tl.static_range(0, KEY_PADDED, STEP):
            e = first + tl.arange(0, STEP)
            given = (row < rows)[:, None] & (e < KEY_D)[None, :]
            if query_start is not None:
                given = given & own[:, None]
            x = tl.load(q + e[None, :], mask=given, other=0.0).to(tl.float32)
            if frame is not None:
                other = tl.load(partner + e, mask=e < KEY_D, other=0)
                of_x = tl.load(angles + e, mask=e < KEY_D, other=0.0)
                of_other = tl.load(angles + KEY_D + e, mask=e < KEY_D, other=0.0)
                x_other = tl.load(q + other[None, :], mask=given, other=0.0).to(tl.float32)
                x = x * of_x[None, :] + x_other * of_other[None, :]
            inside = (e < KEY_D)[:, None] & (column < M + 3)[None, :]
            y = tl.load(query_map + e[:, None] * map_strides[3], mask=inside, other=0.0)
            product += product_fp32(x, y, PRECISION)
        product *= scaling
        line = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * rows + row
        at = mapped + line[:, None] * (M + 3) + column[None, :]
        tl.store(at, product, mask=(row < rows)[:, None] & (column < M + 3)[None, :])


@triton.jit
def _joined_lse(part_lse, lines, splits, SPLITS: tl.constexpr):
    """``log2 Σ_i 2^lse_i`` over all that was found for one query row; -inf where it sees nothing."""
    top = float("-inf")
    total = 0.0
    for first in range(0, splits, SPLITS):
        i = first + tl.arange(0, SPLITS)
        part = tl.load(part_lse + i.to(tl.int64) * lines, mask=i < splits, other=float("-inf"))
        highest = tl.maximum(top, tl.max(part, 0))
        frame = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp2(top - frame) + tl.sum(tl.exp2(part - frame), 0)
        top = highest
    return tl.where(total == 0, float("-inf"), top + tl.log2(tl.where(total == 0, 1.0, total)))


@triton.jit
def _joined(parts, part_lse, lse, lines, begin, end, d, D: tl.constexpr, SPLITS: tl.constexpr):
    """Coordinates ``d`` of ``Σ_i 2^{lse_i − lse} o_i`` and ``Σ_i 2^{lse_i − lse}``; a split that saw nothing may hold
    anything."""
    o = tl.zeros([d.shape[0]], tl.float32)
    share = 0.0
    frame = tl.where(lse == float("-inf"), 0.0, lse)
    for first in range(begin, end, SPLITS):
        i = first + tl.arange(0, SPLITS)
        at = i.to(tl.int64) * lines
        weight = tl.exp2(tl.load(part_lse + at, mask=i < end, other=float("-inf")) - frame)
        inside = (weight != 0)[:, None] & (d < D)[None, :]
        part = tl.load(parts + at[:, None] * D + d[None, :], mask=inside, other=0.0)
        o += tl.sum(weight[:, None] * part, 0)
        share += tl.sum(weight, 0)
    return o, share


@triton.jit(
    do_not_specialize=["recent", "heads", "group", "new", "lines", "packed_splits", "splits", "n_sink", "sliding",
                       "table_columns"],
    do_not_specialize_on_alignment=["packed", "held", "total", "low", "high", "reads", "query_start"],
)  # fmt: skip
def join_kernel(
    parts, part_lse, packed, recent, held, total, low, high, read, read_strides, mean, mean_strides, out, query_start,
    lse, reads, heads, group, new, lines, packed_splits, splits, n_sink, sliding, table_columns, ring,
    D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr, SPLITS: tl.constexpr,
    BY_POSITION: tl.constexpr,
):  # fmt: skip
    """``BLOCK`` coordinates of one query row of ``out [B, Hq, S, D]``, and ``lse [B, Hq, S]`` in nats; with
    ``query_start [B + 1]`` of ``out [T, Hq, D]``.

    ``parts [splits, B·Hq·S, D]``, ``part_lse`` as :func:`split_kernel` wrote them, ``packed_splits`` of them in the
    values' basis; ``read [B, Hkv, D, D]``, ``mean [B, Hkv, D]``. The first head of each query adds the packed tokens
    and all tokens that it saw to ``reads``. Grid: query rows, blocks of coordinates.
    """
    line = tl.program_id(0).to(tl.int64)
    i = line % new
    b = line // new // heads
    h = line // new % heads // group
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    parts += line * D
    part_lse += line
    if read is not None:
        e = tl.arange(0, D_PADDED)
        at = read + b * read_strides[0] + h * read_strides[1] + d[:, None] * read_strides[2]
        inside = (d < D)[:, None] & (e < D)[None, :]
        turn = tl.load(at + e[None, :] * read_strides[3], mask=inside, other=0.0).to(tl.float32)
    joined = _joined_lse(part_lse, lines, splits, 128)
    if read is not None:
        o, share = _joined(parts, part_lse, joined, lines, 0, packed_splits, e, D, SPLITS)
        o = tl.sum(turn * o[None, :], 1)
    else:
        o, share = _joined(parts, part_lse, joined, lines, 0, packed_splits, d, D, SPLITS)
    if mean is not None:
        at = mean + b * mean_strides[0] + h * mean_strides[1] + d * mean_strides[2]
        o += share * tl.load(at, mask=d < D, other=0.0).to(tl.float32)
    exact, _ = _joined(parts, part_lse, joined, lines, packed_splits, splits, d, D, 16)
    if query_start is None:
        tl.store(out + line * D + d, o + exact, mask=d < D)
    else:
        token, own = query_token(query_start, b, i, new)
        if own:
            tl.store(out + (token * heads + line // new % heads) * D + d, o + exact, mask=d < D)
    if tl.program_id(1) == 0:
        if lse is not None:
            tl.store(lse + line, joined * LN2)
        if reads is not None:
            first, last = visible(b, i, True, new, low, high, total, sliding)
            in_pages, end = tl.load(packed + b), tl.load(total + b)
            oldest = oldest_token(coded(total + b, in_pages, recent), table_columns, n_sink, P, BY_POSITION)
            if recent is not None:
                in_pages = codes_end(last, in_pages, recent)
            seen = tl.minimum(body_token(last, n_sink, BY_POSITION), in_pages)
            seen = tl.maximum(seen - tl.maximum(body_token(first, n_sink, BY_POSITION), oldest), 0)
            in_window = tl.load(held + b)
            first, last = tl.maximum(first, 0), tl.minimum(last, end)
            sinks = tl.maximum(tl.minimum(last, n_sink) - first, 0)
            fresh = tl.maximum(tl.maximum(first, in_window), n_sink)
            if BY_POSITION:
                oldest = tl.maximum(in_pages, n_sink)
                fresh = tl.maximum(fresh, oldest)
            else:
                oldest = tl.maximum(in_pages, in_window - n_sink - ring) + n_sink  # of the body tokens in the ring
            body = tl.maximum(tl.minimum(last, in_window) - tl.maximum(first, oldest), 0)
            fresh = tl.maximum(last - fresh, 0)
            tl.atomic_add(reads, seen, mask=line // new % heads == 0)
            tl.atomic_add(reads + 1, seen + sinks + body + fresh, mask=line // new % heads == 0)
