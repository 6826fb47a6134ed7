"""Triton: attention over the packed tokens of one head group, split over programs.

One program owns one KV head of one sequence, one block of its ``g·S`` query rows and one split of the body tokens that
the rows see; :mod:`headq_ao.ops.paged_attention.triton_join` joins the splits by log-sum-exp. For each tile of
:mod:`headq_ao.ops.paged_attention.triton_codes` the block table is looked up once where pages are whole tiles, else for
each token; scales are read one tile ahead, pages two. Each piece feeds one ``tl.dot`` with fp16 operands and fp32 sums:

- scores, ``s_j = σ_j (Σ_pieces q_piece · c_piece + b) + m_j h``, the query scaled by row;
- readout, ``Σ_j w_j (c_j − c0)`` with ``w_j = 2^{s_j − M} a_j``, ``a_j`` the values' scale, ``c0 = (2^bits − 1)/2``.

Where ``c0`` belongs to the sums it is taken off afterwards, times the sum of the same rounded factors. ``M`` is the
running maximum of ``s_j + log2 a_j`` less a headroom: weights fill fp16 to 2^14, and its normal numbers reach down to
1e-6 of the largest. Tiles that all rows see whole, nearly all, are read without masks.
"""

import triton
import triton.language as tl

from headq_ao.ops.paged_attention.triton_codes import CHUNK, log2, parts, piece, query_slices, raised, unit

LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(14)  # log2 of the largest factor in fp16


@triton.jit
def visible(b, s, live, new, low, high, total, sliding):
    """Positions ``first ≤ p < last`` that queries ``s`` of a sequence see; given, or those up to each query's own."""
    if low is None:
        last = tl.load(total + b) - new + s + 1
        first = tl.where(sliding > 0, tl.maximum(last - sliding, 0), 0)
    else:
        first = tl.load(low + b * new + s, mask=live, other=0)
        last = tl.load(high + b * new + s, mask=live, other=0)
    return first, last


@triton.jit
def oldest_token(packed, table_columns, P: tl.constexpr):
    """The first body token whose page is still in a block table of ``table_columns`` columns."""
    return tl.maximum(((packed - 1) // P - table_columns + 1) * P, 0)


@triton.jit
def _lookup(table, t, here, P: tl.constexpr):
    """The physical page of tokens ``t``; the null page where they are not ``here``. ``table``: a sequence's columns,
    how many, and which logical page lies in the first; those that are read lie in no more than two rounds."""
    columns, count, origin = table
    column = t // P - origin
    column = tl.where(column < count, column, column - count)
    return tl.load(columns + column, mask=here, other=0)


@triton.jit
def _number(x, strides, page, h, inside, here):
    """A number for each token ``inside`` its page, fp32; 0 where it is not ``here``."""
    at = page.to(tl.int64) * strides[0] + h * strides[1] + inside
    return tl.load(x + at, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _key_bytes(
    base, stride, page, t0, slot, here,
    FIRST: tl.constexpr, BYTES: tl.constexpr, ROW: tl.constexpr, P: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """``BYTES`` bytes of each key of a tile from the byte ``FIRST`` of ``ROW`` on, ``[SLOTS, CHUNK]``; ``here`` None:
    of all."""
    c = tl.arange(0, CHUNK)
    column = (c // 4 * 64 + c % 4)[None, :] + FIRST * 16
    if P % SLOTS == 0:
        base += page.to(tl.int64) * stride + t0 % P * ROW
        address = base + ((slot // 16 * (ROW * 16) + slot % 16 * 4)[:, None] + column)
    else:
        inside = (t0 + slot) % P
        token = page.to(tl.int64) * stride + (inside // 16 * (ROW * 16) + inside % 16 * 4)
        address = (base + token)[:, None] + column
    if here is None:
        if BYTES == CHUNK:
            byte = tl.load(address)
        else:
            byte = tl.load(address, mask=(c < BYTES)[None, :], other=0)
    else:
        byte = tl.load(address, mask=here[:, None] & (c < BYTES)[None, :], other=0)
    return byte


@triton.jit
def _scores(
    page, t0, h, slot, here, queries, planes, strides, slope, offset, sigma,
    CHUNKS: tl.constexpr, P: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """``σ_j (q·c_j + b)`` of one tile in units of ``log 2``, ``[SLOTS, ROWS]``."""
    s = tl.zeros([SLOTS, ROWS], tl.float32)
    for i in tl.static_range(len(CHUNKS)):
        stride = strides[CHUNKS[i][0]]
        base = planes[CHUNKS[i][0]] + h * stride[1]
        byte = _key_bytes(base, stride[0], page, t0, slot, here, CHUNKS[i][2], CHUNKS[i][3], CHUNKS[i][4], P, SLOTS)
        for p in tl.static_range(8 // CHUNKS[i][1]):
            s = tl.dot(piece(byte, p * CHUNKS[i][1], CHUNKS[i][1], PTX), queries[i][p], s)
    return (s * slope[None, :] + offset[None, :]) * sigma[:, None]


@triton.jit
def _value_bytes(
    plane, strides, page, t0, h, end, E: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    D_PADDED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Bytes ``[D_PADDED, 16]`` of entry ``E`` of each quarter of a tile; no quarter lies in two pages."""
    r = tl.arange(0, 16)
    d = tl.arange(0, D_PADDED)
    base = plane + h * strides[1]
    entry = r // 4 * (PARTS * W // 8) + E
    if P % (16 * PARTS) == 0:
        base += page.to(tl.int64) * strides[0] + t0 % P * (D * W // 8)
        address = base + ((d * 4)[:, None] + (entry * (D * 4) + r % 4)[None, :])
    else:
        inside = (t0 + r // 4 * (4 * PARTS)) % P // (32 // W) + E
        address = (base + page.to(tl.int64) * strides[0] + (inside * (D * 4) + r % 4))[None, :] + (d * 4)[:, None]
    if end is None:
        byte = tl.load(address) if D == D_PADDED else tl.load(address, mask=(d < D)[:, None], other=0)
    else:
        here = (d < D)[:, None] & (t0 + entry * (32 // W) < end)[None, :]
        byte = tl.load(address, mask=here, other=0)
    return byte


@triton.jit
def _group_values(
    codes, weights, slot, page, h, end, scale, scale_strides, zero, zero_strides,
    BITS: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Values ``[D_PADDED, 16]`` of the tokens ``slot [16]`` with scales of groups from their codes, fp16."""
    d = tl.arange(0, codes.shape[0])
    here = (d < D)[:, None] & (tl.max(weights, 1) != 0)[None, :]
    if end is not None:
        here = here & (slot < end)[None, :]
    page = page + slot * 0  # one for each token
    inside = (d // (D // GROUPS))[:, None] + (slot % P)[None, :] * GROUPS
    a = _number(scale, scale_strides, page[None, :], h, inside, here)
    values = (codes - (2**BITS - 1) / 2) * a.to(tl.float16)  # the difference is exact
    if zero is not None:
        z = _number(zero, zero_strides, page[None, :], h, inside, here) + a * ((2**BITS - 1) / 2)
        values += z.to(tl.float16)
    return values


@triton.jit
def _readout(
    acc, weights, page, t0, h, end, values,
    BITS: tl.constexpr, WIDTHS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    GROUPS: tl.constexpr, P: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """``acc [D_PADDED, ROWS]`` and one tile's ``Σ_j w_j`` times what is stored; ``end`` None: of all its tokens.

    That is the codes by :func:`unit` and ``2^-WIDTHS[0]`` of two planes, or, with scales of groups, the values.
    """
    planes, strides, scale, scale_strides, zero, zero_strides = values
    r = tl.arange(0, 16)
    entries = ()
    for i in tl.static_range(len(WIDTHS)):
        for e in tl.static_range(PARTS * WIDTHS[i] // 8):
            byte = _value_bytes(planes[i], strides[i], page, t0, h, end, e, WIDTHS[i], PARTS, D, D_PADDED, P)
            entries = entries + (byte,)
    for j in tl.static_range(PARTS):
        whole = tl.zeros([D_PADDED, 16], tl.float16)
        for i in tl.static_range(len(WIDTHS)):
            byte = entries[(PARTS * WIDTHS[0] * i + j * WIDTHS[i]) // 8]
            code = piece(byte, j * WIDTHS[i] % 8, WIDTHS[i], PTX)
            if GROUPS == 1:
                acc = tl.dot(code, weights[j] * 2.0 ** (WIDTHS[0] * i - j * WIDTHS[i] % 8), acc)
            else:  # in two steps: fp16 has no 2^24
                whole += code * raised(PTX) * (2.0 ** (WIDTHS[0] * i - j * WIDTHS[i] % 8) / (raised(PTX) * unit(PTX)))
        if GROUPS > 1:
            slot = t0 + r // 4 * (4 * PARTS) + 4 * j + r % 4
            whole = _group_values(
                whole, weights[j], slot, page, h, end, scale, scale_strides, zero, zero_strides, BITS, D, GROUPS, P
            )
            acc = tl.dot(whole, weights[j], acc)
    return acc


@triton.jit
def _absorb(
    sums, s, a, z, page, t0, h, end, values,
    HEADROOM: tl.constexpr, BITS: tl.constexpr, WIDTHS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    D_PADDED: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The running sums and one tile of scores ``s``; ``a``, ``z`` the scales and zeros of its values where one serves a
    token, and where ``end`` is given, tokens whose score is -inf may hold any."""
    top, total, shift, acc = sums
    weighted = s
    if GROUPS == 1:
        weighted = s + log2(a)[:, None]
    new_top = tl.maximum(top, tl.max(weighted, 0) - HEADROOM)
    frame = new_top
    if end is not None:
        frame = tl.where(new_top == float("-inf"), 0.0, new_top)
    decay = tl.exp2(top - frame)[None, :]
    w = tl.exp2(s - frame[None, :])
    total = total * decay + w
    acc *= decay
    if GROUPS == 1:
        if z is not None:
            of_zero = w * z[:, None]
            shift = shift * decay + (of_zero if end is None else tl.where(w == 0, 0.0, of_zero))
        weighted = w * a[:, None]
        w = weighted if end is None else tl.where(w == 0, 0.0, weighted)
    rounded = w.to(tl.float16)
    if GROUPS == 1 and z is None:
        shift = shift * decay + rounded.to(tl.float32)
    acc = _readout(
        acc, parts(rounded, PARTS), page, t0, h, end, values, BITS, WIDTHS, PARTS, D, D_PADDED, GROUPS, P, PTX
    )
    return new_top, total, shift, acc


@triton.jit
def _masked_tile(
    sums, t0, begin, end, first, last, h, table, segment, mine, queries, slope, offset, lift, keys,
    values,
    CHUNKS: tl.constexpr, HEADROOM: tl.constexpr, BITS: tl.constexpr, WIDTHS: tl.constexpr, PARTS: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """The running sums and a tile that not all rows see whole: tokens ``first ≤ t < last`` of the segment ``mine``."""
    SLOTS: tl.constexpr = 16 * PARTS
    slot = tl.arange(0, SLOTS)
    t = t0 + slot
    here = (t >= begin) & (t < end)
    if P % SLOTS == 0:
        page = _lookup(table, t0, t0 < end, P)
        value_page = page
    else:
        page = _lookup(table, t, here, P)
        quarter = t0 + tl.arange(0, 16) // 4 * (4 * PARTS)
        value_page = _lookup(table, quarter, (quarter + 4 * PARTS > begin) & (quarter < end), P)
    if segment is not None:
        here = here & (tl.load(segment + page) + slot * 0 == mine)
    some = True if segment is None else tl.max(here.to(tl.int32), 0) > 0
    if some:
        planes, strides, scale, scale_strides, zero, zero_strides = keys
        inside = t % P
        sigma = _number(scale, scale_strides, page, h, inside, here)
        a, z = sigma, None
        if GROUPS == 1:
            a = _number(values[2], values[3], page, h, inside, here)
            if values[4] is not None:
                z = _number(values[4], values[5], page, h, inside, here)
        s = _scores(
            page, t0, h, slot, here, queries, planes, strides, slope, offset, sigma, CHUNKS, P, SLOTS, ROWS, PTX
        )
        if zero is not None:
            s += lift[None, :] * _number(zero, zero_strides, page, h, inside, here)[:, None]
        s = tl.where((t[:, None] >= first[None, :]) & (t[:, None] < last[None, :]) & here[:, None], s, float("-inf"))
        sums = _absorb(
            sums, s, a, z, value_page, t0, h, end, values,
            HEADROOM, BITS, WIDTHS, PARTS, D, D_PADDED, GROUPS, P, PTX,
        )  # fmt: skip
    return sums


@triton.jit
def _queries(
    q, row_stride, columns, row, live, CHUNKS: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, TOP: tl.constexpr
):
    """The query slices of all chunks, and what their products are multiplied by and moved by, in units of ``log 2``."""
    m = tl.arange(0, triton.next_power_of_2(M))
    whole = tl.load(q + m[:, None] + row[None, :] * row_stride, mask=(m < M)[:, None] & live[None, :], other=0.0)
    largest = tl.maximum(tl.max(tl.abs(whole), 0), 1e-30)
    queries = ()
    offset = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(len(CHUNKS)):
        slices, lost = query_slices(q, row_stride, columns, row, live, 1.0 / largest * TOP, CHUNKS[i][1])
        queries = queries + (slices,)
        offset += lost
        columns += CHUNK * (8 // CHUNKS[i][1])
    slope = largest * (LOG2E / TOP)
    bias = tl.load(q + M + row * row_stride, mask=live, other=0.0)
    return queries, slope, bias * LOG2E + offset * slope


@triton.jit(
    do_not_specialize=[
        "first_head", "kv_heads", "all_heads", "new", "rows", "splits", "most", "lines", "n_sink", "sliding",
        "table_columns",
    ],
    do_not_specialize_on_alignment=["table", "segment", "packed", "total", "low", "high"],
)  # fmt: skip
def packed_kernel(
    q, q_strides, columns, keys, values, table, table_stride, table_columns, segment, packed, total, low, high,
    n_sink, sliding, out, out_lse, first_head, kv_heads, all_heads, new, rows, splits, most, lines,
    CHUNKS: tl.constexpr, M: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_WIDTHS: tl.constexpr, PARTS: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
    P: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Attention over one split: ``out [most, lines, D]`` fp32, and ``log2 Σ e^s``, -inf behind the last split.

    ``q [SEGMENTS, B, Hkv, g·S, M + 3]`` fp32, with four strides: mapped queries, ``b``, ``h`` and ``q·μ``. ``keys``,
    ``values``: planes, scale and zero of the pages of ``kv_heads`` heads from ``first_head`` on, each followed by its
    strides of page and head. Grid: heads, splits by segments, blocks of rows.
    """
    SLOTS: tl.constexpr = PARTS * 16
    UNIT: tl.constexpr = unit(PTX)
    # queries take up to 4 bits of shift, weights up to VALUE_WIDTHS[0]
    QUERY_TOP: tl.constexpr = 2.0 ** (LARGEST - 4)
    HEADROOM: tl.constexpr = LARGEST - (VALUE_WIDTHS[0] if len(VALUE_WIDTHS) == 2 else 0)
    b = tl.program_id(0).to(tl.int64) // kv_heads
    h = tl.program_id(0).to(tl.int64) % kv_heads
    part = tl.program_id(1)
    split = part // SEGMENTS
    mine = part % SEGMENTS
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    d = tl.arange(0, D_PADDED)
    slot = tl.arange(0, SLOTS)

    # what the rows see, this split's share of it in whole tiles, and the tiles that all rows see whole
    held = tl.load(packed + b)
    first, last = visible(b, row % new, live, new, low, high, total, sliding)
    first = tl.maximum(first - n_sink, oldest_token(held, table_columns, P)).to(tl.int32)
    last = tl.where(live, tl.minimum(last - n_sink, held), 0).to(tl.int32)
    seeing = first < last
    lowest = tl.min(tl.where(seeing, first, held.to(tl.int32)), 0)
    highest = tl.max(tl.where(seeing, last, 0), 0)
    aligned = lowest // SLOTS * SLOTS
    share = tl.cdiv(tl.cdiv(tl.maximum(highest - aligned, 0), SLOTS), splits) * SLOTS
    begin = aligned + split * share
    end = tl.maximum(tl.minimum(begin + share, highest), begin)
    whole_begin = tl.minimum(tl.maximum(tl.cdiv(tl.max(tl.where(live, first, 0), 0), SLOTS) * SLOTS, begin), end)
    whole_end = tl.minimum(tl.min(tl.where(live, last, held.to(tl.int32)), 0), end) // SLOTS * SLOTS
    whole_end = tl.maximum(whole_end, whole_begin)
    if segment is not None:
        whole_end = whole_begin

    table = (table + b * table_stride, table_columns, lowest // P // table_columns * table_columns)
    q += mine.to(tl.int64) * q_strides[0] + b * q_strides[1] + (first_head + h) * q_strides[2]
    queries, slope, offset = _queries(q, q_strides[3], columns, row, live, CHUNKS, M, ROWS, QUERY_TOP)
    slope = slope / UNIT
    lift = tl.load(q + M + 1 + row * q_strides[3], mask=live, other=0.0) * LOG2E
    gauge = tl.load(q + M + 2 + row * q_strides[3], mask=live, other=0.0) * LOG2E
    planes, strides, scale, scale_strides, zero, zero_strides = keys

    # the running maximum; Σ 2^(s − M), summed over tokens after the last tile; Σ w, what the values of a token share
    # where one scale serves it; Σ w c
    sums = (
        tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([SLOTS, ROWS], tl.float32),
        tl.zeros([SLOTS, ROWS], tl.float32), tl.zeros([D_PADDED, ROWS], tl.float32),
    )  # fmt: skip

    # tiles that all rows see whole
    quarter = tl.arange(0, 16) // 4 * (4 * PARTS)
    at = 0 if P % SLOTS == 0 else slot  # one page for a tile, or for each token
    next_page = _lookup(table, whole_begin + at, whole_begin + at < whole_end, P)
    next_value_page = next_page
    if P % SLOTS != 0:
        next_value_page = _lookup(table, whole_begin + quarter, whole_begin + quarter < whole_end, P)
    t = whole_begin + slot
    next_sigma = _number(scale, scale_strides, next_page, h, t % P, t < whole_end)
    next_a = next_sigma
    if GROUPS == 1:
        next_a = _number(values[2], values[3], next_page, h, t % P, t < whole_end)
    for tile in range(0, (whole_end - whole_begin) // SLOTS):
        t0 = whole_begin + tile * SLOTS
        page, value_page, sigma, a, z = next_page, next_value_page, next_sigma, next_a, None
        soon = t0 + SLOTS
        next_page = _lookup(table, soon + at, soon + at < whole_end, P)
        next_value_page = next_page
        if P % SLOTS != 0:
            next_value_page = _lookup(table, soon + quarter, soon + quarter < whole_end, P)
        t = t0 + SLOTS + slot
        next_sigma = _number(scale, scale_strides, next_page, h, t % P, t < whole_end)
        if GROUPS == 1:
            next_a = _number(values[2], values[3], next_page, h, t % P, t < whole_end)
        s = _scores(
            page, t0, h, slot, None, queries, planes, strides, slope, offset, sigma, CHUNKS, P, SLOTS, ROWS, PTX
        )
        inside = (t0 + slot) % P
        if zero is not None:
            s += lift[None, :] * _number(zero, zero_strides, page, h, inside, slot >= 0)[:, None]
        if GROUPS == 1 and values[4] is not None:
            z = _number(values[4], values[5], page, h, inside, slot >= 0)
        sums = _absorb(
            sums, s, a, z, value_page, t0, h, None, values,
            HEADROOM, VALUE_BITS, VALUE_WIDTHS, PARTS, D, D_PADDED, GROUPS, P, PTX,
        )  # fmt: skip

    # the others: at both ends, or all where pages belong to several segments
    before = tl.cdiv(whole_begin - begin, SLOTS)
    for tile in tl.range(0, before + tl.cdiv(end - whole_end, SLOTS), num_stages=1):
        t0 = tl.where(tile < before, begin + tile * SLOTS, whole_end + (tile - before) * SLOTS)
        sums = _masked_tile(
            sums, t0, lowest, end, first, last, h, table, segment, mine, queries, slope, offset, lift,
            keys, values, CHUNKS, HEADROOM, VALUE_BITS, VALUE_WIDTHS, PARTS, D, D_PADDED, GROUPS, ROWS, P, PTX,
        )  # fmt: skip

    top, mass, shift, acc = sums
    if GROUPS == 1:
        of_shift: tl.constexpr = -(2**VALUE_BITS - 1) / 2 if values[4] is None else 1.0
        acc = acc / UNIT + (tl.sum(shift, 0) * of_shift)[None, :]
    mass = tl.sum(mass, 0)
    some = tl.where(mass == 0, 1.0, mass)
    line = (b * all_heads + first_head + h) * rows + row
    to = line + part.to(tl.int64) * lines
    tl.store(out + d[:, None] + to[None, :] * D, acc / some[None, :], mask=(d < D)[:, None] & live[None, :])
    tl.store(out_lse + to, tl.where(mass == 0, float("-inf"), top + tl.log2(some) + gauge), mask=live)
    nothing = tl.full([ROWS], float("-inf"), tl.float32)
    for _ in range(part + splits * SEGMENTS, most, splits * SEGMENTS):
        to += (splits * SEGMENTS).to(tl.int64) * lines
        tl.store(out_lse + to, nothing, mask=live)
