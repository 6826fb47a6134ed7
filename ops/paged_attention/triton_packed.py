"""Triton: attention over packed tokens and over those in full precision, split over programs.

One program owns one KV head of one sequence, one block of its ``g·S`` query rows and one split of the body tokens that
the rows see, or one tile of the window or of the call's own tokens
(:mod:`headq_ao.ops.paged_attention.triton_window`); :mod:`headq_ao.ops.paged_attention.triton_join` joins them by
log-sum-exp. Heads of different bits are served in one launch: a program takes the branch of its head's kind. For each
tile of :mod:`headq_ao.ops.paged_attention.triton_codes` the block table is looked up once where pages are whole tiles,
else for each token; scales are read one tile ahead, pages two. Each piece feeds one ``tl.dot`` with fp16 operands and
fp32 sums:

- scores, ``s_j = σ_j (Σ_pieces q_piece · c_piece + b) + m_j h``, the query scaled by row;
- readout, ``Σ_j w_j (c_j − c0)`` with ``w_j = 2^{s_j − M} a_j``, ``a_j`` the values' scale, ``c0 = (2^bits − 1)/2``.

Where ``c0`` belongs to the sums it is taken off afterwards, times the sum of the same rounded factors. ``M`` is the
running maximum of ``s_j + log2 a_j`` less a headroom: weights fill fp16 to 2^14, and its normal numbers reach down to
1e-6 of the largest. Tiles that all rows see whole, nearly all, are read without masks.
"""

import triton
import triton.language as tl

from headq_ao.ops.paged_attention.triton_codes import CHUNK, FIRST_BYTE, log2, parts, piece, query_slices, raised, unit
from headq_ao.ops.paged_attention.triton_heads import FIELDS as _FIELDS
from headq_ao.ops.paged_attention.triton_heads import form, sides
from headq_ao.ops.paged_attention.triton_window import LOG2E, capped, coded, codes_end, exact_split, visible

FIELDS = tl.constexpr(_FIELDS)
LARGEST = tl.constexpr(14)  # log2 of the largest factor in fp16


@triton.jit
def oldest_token(packed, table_columns, n_sink, P: tl.constexpr, BY_POSITION: tl.constexpr):
    """The first body token that is read in pages: its page is still in a block table of ``table_columns`` columns, and
    it is no sink."""
    oldest = tl.maximum(((packed - 1) // P - table_columns + 1) * P, 0)
    if BY_POSITION:
        oldest = tl.maximum(oldest, n_sink)
    return oldest


@triton.jit
def oldest_segment(packed, table_columns, tokens, count, P: tl.constexpr):
    """The segment of the first token that is still in pages: a frame's mapped queries begin with it."""
    return tl.minimum(oldest_token(packed, table_columns, 0, P, False) // tokens, count - 1).to(tl.int32)


@triton.jit
def body_token(position, n_sink, BY_POSITION: tl.constexpr):
    """The number of the body token at a position: in an engine's pages the same."""
    if not BY_POSITION:
        position -= n_sink
    return position


@triton.jit
def lookup(table, t, here, P: tl.constexpr):
    """The physical page of tokens ``t``; the null page where they are not ``here``. ``table``: a sequence's columns,
    how many, and which logical page lies in the first; those that are read lie in no more than two rounds."""
    columns, count, origin = table
    column = t // P - origin
    column = tl.where(column < count, column, column - count)
    return tl.load(columns + column, mask=here, other=0)


@triton.jit
def _look_up(table, t0, begin, end, P: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr):
    """The pages of tokens ``begin ≤ t < end`` of the tile that begins at ``t0``: of whole pages each once, else of each
    token, and of each quarter."""
    if P % SLOTS == 0:
        pages = (lookup(table, t0, t0 < end, P),)
    elif SLOTS % P == 0:
        pages = ()
        for i in tl.static_range(SLOTS // P):
            t = t0 + i * P
            pages = pages + (lookup(table, t, (t + P > begin) & (t < end), P),)
    else:
        t = t0 + tl.arange(0, SLOTS)
        quarter = t0 + tl.arange(0, 16) // 4 * (4 * PARTS)
        pages = (
            lookup(table, t, (t >= begin) & (t < end), P),
            lookup(table, quarter, (quarter + 4 * PARTS > begin) & (quarter < end), P),
        )
    return pages


@triton.jit
def _spread(pages, P: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr):
    """The page of each token of a tile, and of each quarter; a scalar where there is but one."""
    if P % SLOTS == 0:
        page, value_page = pages[0], pages[0]
    elif SLOTS % P == 0:
        which = tl.arange(0, SLOTS) // P
        quarter = tl.arange(0, 16) // 4 * (4 * PARTS) // P
        page, value_page = which * 0 + pages[0], quarter * 0 + pages[0]
        for i in tl.static_range(1, SLOTS // P):
            page = tl.where(which == i, pages[i], page)
            value_page = tl.where(quarter == i, pages[i], value_page)
    else:
        page, value_page = pages
    return page, value_page


@triton.jit
def number(x, stride, page, inside, here):
    """A number for each token ``inside`` its page, fp32; where it is not ``here`` one that is finite."""
    number = tl.load(x + page.to(tl.int64) * stride + inside, mask=here, other=0)
    if x.dtype.element_ty == tl.uint8:
        number = ((number.to(tl.int32) << 18) + FIRST_BYTE).to(tl.float32, bitcast=True)
    else:
        number = number.to(tl.float32)
    return number


@triton.jit
def _scales(
    keys, values, pages, t0, end, P: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr, GROUPS: tl.constexpr
):
    """Scales of the keys of a tile, and of its values where one serves a token."""
    page, _ = _spread(pages, P, SLOTS, PARTS)
    t = t0 + tl.arange(0, SLOTS)
    sigma = number(keys[2], keys[3], page, t % P, t < end)
    a = sigma
    if GROUPS == 1:
        a = number(values[2], values[3], page, t % P, t < end)
    return sigma, a


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
        inside = slot % P if SLOTS % P == 0 else (t0 + slot) % P
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
    page, t0, slot, here, queries, planes, strides, slope, offset, sigma,
    CHUNKS: tl.constexpr, P: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """``σ_j (q·c_j + b)`` of one tile in units of ``log 2``, ``[SLOTS, ROWS]``."""
    s = tl.zeros([SLOTS, ROWS], tl.float32)
    for i in tl.static_range(len(CHUNKS)):
        base, stride = planes[CHUNKS[i][0]], strides[CHUNKS[i][0]]
        byte = _key_bytes(base, stride, page, t0, slot, here, CHUNKS[i][2], CHUNKS[i][3], CHUNKS[i][4], P, SLOTS)
        for p in tl.static_range(8 // CHUNKS[i][1]):
            s = tl.dot(piece(byte, p * CHUNKS[i][1], CHUNKS[i][1], PTX), queries[i][p], s)
    return (s * slope[None, :] + offset[None, :]) * sigma[:, None]


@triton.jit
def _value_bytes(
    base, stride, page, t0, end, E: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    D_PADDED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Bytes ``[D_PADDED, 16]`` of entry ``E`` of each quarter of a tile; no quarter lies in two pages."""
    r = tl.arange(0, 16)
    d = tl.arange(0, D_PADDED)
    entry = r // 4 * (PARTS * W // 8) + E
    if P % (16 * PARTS) == 0:
        base += page.to(tl.int64) * stride + t0 % P * (D * W // 8)
        address = base + ((d * 4)[:, None] + (entry * (D * 4) + r % 4)[None, :])
    else:
        quarter = r // 4 * (4 * PARTS)
        inside = (quarter % P if 16 * PARTS % P == 0 else (t0 + quarter) % P) // (32 // W) + E
        address = (base + page.to(tl.int64) * stride + (inside * (D * 4) + r % 4))[None, :] + (d * 4)[:, None]
    if end is None:
        byte = tl.load(address) if D == D_PADDED else tl.load(address, mask=(d < D)[:, None], other=0)
    else:
        here = (d < D)[:, None] & (t0 + entry * (32 // W) < end)[None, :]
        byte = tl.load(address, mask=here, other=0)
    return byte


@triton.jit
def _group_values(
    codes, weights, slot, page, end, scale, scale_stride, zero, zero_stride,
    BITS: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Values ``[D_PADDED, 16]`` of the tokens ``slot [16]`` with scales of groups from their codes, fp16."""
    d = tl.arange(0, codes.shape[0])
    here = (d < D)[:, None] & (tl.max(weights, 1) != 0)[None, :]
    if end is not None:
        here = here & (slot < end)[None, :]
    page = page + slot * 0  # one for each token
    inside = (d // (D // GROUPS))[:, None] + (slot % P)[None, :] * GROUPS
    a = number(scale, scale_stride, page[None, :], inside, here)
    values = (codes - (2**BITS - 1) / 2) * a.to(tl.float16)  # the difference is exact
    if zero is not None:
        z = number(zero, zero_stride, page[None, :], inside, here) + a * ((2**BITS - 1) / 2)
        values += z.to(tl.float16)
    return values


@triton.jit
def _readout(
    acc, weights, page, t0, end, values,
    BITS: tl.constexpr, WIDTHS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    GROUPS: tl.constexpr, P: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """``acc [D_PADDED, ROWS]`` and one tile's ``Σ_j w_j`` times what is stored; ``end`` None: of all its tokens.

    That is the codes by :func:`unit` and ``2^-WIDTHS[0]`` of two planes, or, with scales of groups, the values.
    """
    planes, strides, scale, scale_stride, zero, zero_stride = values
    r = tl.arange(0, 16)
    entries = ()
    for i in tl.static_range(len(WIDTHS)):
        for e in tl.static_range(PARTS * WIDTHS[i] // 8):
            byte = _value_bytes(planes[i], strides[i], page, t0, end, e, WIDTHS[i], PARTS, D, D_PADDED, P)
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
                whole, weights[j], slot, page, end, scale, scale_stride, zero, zero_stride, BITS, D, GROUPS, P
            )
            acc = tl.dot(whole, weights[j], acc)
    return acc


@triton.jit
def _absorb(
    sums, s, a, z, page, t0, end, values,
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
    acc = _readout(acc, parts(rounded, PARTS), page, t0, end, values, BITS, WIDTHS, PARTS, D, D_PADDED, GROUPS, P, PTX)
    return new_top, total, shift, acc


@triton.jit
def _masked_tile(
    sums, t0, begin, end, first, last, table, segment, mine, queries, slope, offset, lift, mean, softcap, keys, values,
    CHUNKS: tl.constexpr, HEADROOM: tl.constexpr, BITS: tl.constexpr, WIDTHS: tl.constexpr, PARTS: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """The running sums and a tile that not all rows see whole: tokens ``first ≤ t < last`` of the segment ``mine``."""
    SLOTS: tl.constexpr = 16 * PARTS
    slot = tl.arange(0, SLOTS)
    t = t0 + slot
    here = (t >= begin) & (t < end)
    page, value_page = _spread(_look_up(table, t0, begin, end, P, SLOTS, PARTS), P, SLOTS, PARTS)
    if segment is not None:
        here = here & (tl.load(segment + page) + slot * 0 == mine)
    some = True if segment is None else tl.max(here.to(tl.int32), 0) > 0
    if some:
        planes, strides, scale, scale_stride, zero, zero_stride = keys
        inside = t % P
        sigma = number(scale, scale_stride, page, inside, here)
        a, z = sigma, None
        if GROUPS == 1:
            a = number(values[2], values[3], page, inside, here)
            if values[4] is not None:
                z = number(values[4], values[5], page, inside, here)
        s = _scores(page, t0, slot, here, queries, planes, strides, slope, offset, sigma, CHUNKS, P, SLOTS, ROWS, PTX)
        if zero is not None:
            s += lift[None, :] * number(zero, zero_stride, page, inside, here)[:, None]
        if mean is not None:
            s += mean[None, :]
        s = capped(s, softcap)
        s = tl.where((t[:, None] >= first[None, :]) & (t[:, None] < last[None, :]) & here[:, None], s, float("-inf"))
        sums = _absorb(
            sums, s, a, z, value_page, t0, end, values,
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


@triton.jit
def _read(
    sums, q, q_stride, columns, keys, values, table, segment, mine, row, live, first, last, lowest, begin, end,
    whole_begin, whole_end, softcap,
    KINDS: tl.constexpr, KIND: tl.constexpr, M: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    ROWS: tl.constexpr, PTX: tl.constexpr, P: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """The running sums and tokens ``begin ≤ t < end``, read by the mapped queries ``q``; those of whole tiles that all
    rows see are ``whole_begin ≤ t < whole_end``. ``MEAN``: whether scores get ``q·μ`` here."""
    CHUNKS: tl.constexpr = form(KINDS, KIND, 0)
    VALUE_BITS: tl.constexpr = form(KINDS, KIND, 3)
    VALUE_WIDTHS: tl.constexpr = form(KINDS, KIND, 4)
    PARTS: tl.constexpr = form(KINDS, KIND, 5)
    GROUPS: tl.constexpr = form(KINDS, KIND, 7)
    SLOTS: tl.constexpr = PARTS * 16
    # queries take up to 4 bits of shift, weights up to VALUE_WIDTHS[0]
    QUERY_TOP: tl.constexpr = 2.0 ** (LARGEST - 4)
    HEADROOM: tl.constexpr = LARGEST - (VALUE_WIDTHS[0] if len(VALUE_WIDTHS) == 2 else 0)
    slot = tl.arange(0, SLOTS)
    queries, slope, offset = _queries(q, q_stride, columns, row, live, CHUNKS, M, ROWS, QUERY_TOP)
    slope = slope / unit(PTX)
    lift = tl.load(q + M + 1 + row * q_stride, mask=live, other=0.0) * LOG2E
    mean = None  # of one frame all scores share it, and where none is capped, the log-sum-exp gets it
    if MEAN:
        mean = tl.load(q + M + 2 + row * q_stride, mask=live, other=0.0) * LOG2E
    planes, strides, _, _, zero, zero_stride = keys

    # tiles that all rows see whole
    pages = _look_up(table, whole_begin, whole_begin, whole_end, P, SLOTS, PARTS)
    next_sigma, next_a = _scales(keys, values, pages, whole_begin, whole_end, P, SLOTS, PARTS, GROUPS)
    for tile in range(0, (whole_end - whole_begin) // SLOTS):
        t0 = whole_begin + tile * SLOTS
        page, value_page = _spread(pages, P, SLOTS, PARTS)
        sigma, a, z = next_sigma, next_a, None
        pages = _look_up(table, t0 + SLOTS, whole_begin, whole_end, P, SLOTS, PARTS)
        next_sigma, next_a = _scales(keys, values, pages, t0 + SLOTS, whole_end, P, SLOTS, PARTS, GROUPS)
        s = _scores(page, t0, slot, None, queries, planes, strides, slope, offset, sigma, CHUNKS, P, SLOTS, ROWS, PTX)
        inside = (t0 + slot) % P
        if zero is not None:
            s += lift[None, :] * number(zero, zero_stride, page, inside, slot >= 0)[:, None]
        if MEAN:
            s += mean[None, :]  # type: ignore[index]
        s = capped(s, softcap)
        if GROUPS == 1 and values[4] is not None:
            z = number(values[4], values[5], page, inside, slot >= 0)
        sums = _absorb(
            sums, s, a, z, value_page, t0, None, values,
            HEADROOM, VALUE_BITS, VALUE_WIDTHS, PARTS, D, D_PADDED, GROUPS, P, PTX,
        )  # fmt: skip

    # the others: at both ends, or all where pages belong to several segments
    before = tl.cdiv(whole_begin - begin, SLOTS)
    for tile in tl.range(0, before + tl.cdiv(end - whole_end, SLOTS), num_stages=1):
        t0 = tl.where(tile < before, begin + tile * SLOTS, whole_end + (tile - before) * SLOTS)
        sums = _masked_tile(
            sums, t0, lowest, end, first, last, table, segment, mine, queries, slope, offset, lift, mean,
            softcap, keys, values, CHUNKS, HEADROOM, VALUE_BITS, VALUE_WIDTHS, PARTS, D, D_PADDED, GROUPS, ROWS, P, PTX,
        )  # fmt: skip
    return sums


@triton.jit
def _packed_split(
    q, q_stride, columns, heads, table, table_columns, segment, frame, in_pages, recent, total, low, high, n_sink,
    sliding, softcap, to, to_lse, b, h, row, live, split, mine, new, splits,
    KINDS: tl.constexpr, KIND: tl.constexpr, M: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    ROWS: tl.constexpr, PTX: tl.constexpr, P: tl.constexpr, BY_POSITION: tl.constexpr,
):  # fmt: skip
    """Attention over one split of the packed tokens of a head of that kind. ``frame``: tokens of a segment, how many
    there are, and how far the mapped queries of one lie from those of the one before; None: no segments."""
    VALUE_BITS: tl.constexpr = form(KINDS, KIND, 3)
    PARTS: tl.constexpr = form(KINDS, KIND, 5)
    GROUPS: tl.constexpr = form(KINDS, KIND, 7)
    SLOTS: tl.constexpr = PARTS * 16
    UNIT: tl.constexpr = unit(PTX)
    keys, values = sides(heads, h, KINDS, KIND)
    if not form(KINDS, KIND, 2):
        keys = (keys[0], keys[1], keys[2], keys[3], None, None)
    if not form(KINDS, KIND, 6):
        values = (values[0], values[1], values[2], values[3], None, None)
    d = tl.arange(0, D_PADDED)

    # what the rows see, this split's share of it in whole tiles, and the tiles that all rows see whole
    first, last = visible(b, row % new, live, new, low, high, total, sliding)
    held = coded(total + b, in_pages, recent)
    if recent is not None:
        last = tl.minimum(last, codes_end(last, in_pages, recent))
    body = body_token(first, n_sink, BY_POSITION)
    first = tl.maximum(body, oldest_token(held, table_columns, n_sink, P, BY_POSITION)).to(tl.int32)
    last = tl.where(live, tl.minimum(body_token(last, n_sink, BY_POSITION), held), 0).to(tl.int32)
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

    table = (table, table_columns, lowest // P // table_columns * table_columns)
    columns += form(KINDS, KIND, 1)
    of_mean = 0.0
    SHARED: tl.constexpr = frame is None and softcap is None
    if SHARED:
        of_mean = tl.load(q + M + 2 + row * q_stride, mask=live, other=0.0) * LOG2E

    # the running maximum; Σ 2^(s − M), summed over tokens after the last tile; Σ w, what the values of a token share
    # where one scale serves it; Σ w c
    sums = (
        tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([SLOTS, ROWS], tl.float32),
        tl.zeros([SLOTS, ROWS], tl.float32), tl.zeros([D_PADDED, ROWS], tl.float32),
    )  # fmt: skip

    if frame is None:
        sums = _read(
            sums, q, q_stride, columns, keys, values, table, segment, mine, row, live, first, last, lowest, begin, end,
            whole_begin, whole_end, softcap, KINDS, KIND, M, D, D_PADDED, ROWS, PTX, P, not SHARED,
        )  # fmt: skip
    else:  # one segment after the other
        tokens, count, stride = frame
        oldest = oldest_segment(held, table_columns, tokens, count, P)
        s0 = tl.minimum(begin // tokens, count - 1)
        s1 = tl.where(begin < end, tl.minimum((end - 1) // tokens, count - 1), s0 - 1)
        for s in range(s0, s1 + 1):
            low_end = tl.maximum(begin, s * tokens)
            high_end = tl.where(s == count - 1, end, tl.minimum(end, (s + 1) * tokens))
            of_segment = q + (s - oldest).to(tl.int64) * stride
            whole_low = tl.minimum(tl.maximum(whole_begin, low_end), high_end)
            sums = _read(
                sums, of_segment, q_stride, columns, keys, values, table, segment, mine, row, live, first, last, lowest,
                low_end, high_end, whole_low, tl.maximum(tl.minimum(whole_end, high_end), whole_low), softcap,
                KINDS, KIND, M, D, D_PADDED, ROWS, PTX, P, True,
            )  # fmt: skip

    top, mass, shift, acc = sums
    if GROUPS == 1:
        of_shift: tl.constexpr = -(2**VALUE_BITS - 1) / 2 if values[4] is None else 1.0
        acc = acc / UNIT + (tl.sum(shift, 0) * of_shift)[None, :]
    mass = tl.sum(mass, 0)
    some = tl.where(mass == 0, 1.0, mass)
    tl.store(to + d[:, None] + row[None, :] * D, acc / some[None, :], mask=(d < D)[:, None] & live[None, :])
    tl.store(to_lse + row, tl.where(mass == 0, float("-inf"), top + tl.log2(some) + of_mean), mask=live)


@triton.jit(
    do_not_specialize=["kv_heads", "new", "rows", "splits", "n_sink", "ring", "recent", "sliding", "table_columns",
                       "new_slots"],
    do_not_specialize_on_alignment=[
        "table", "segment", "packed", "held", "total", "low", "high", "new_start", "query_start",
    ],
)  # fmt: skip
def split_kernel(
    mapped, columns, heads, table, table_stride, table_columns, segment, frame, q, q_strides, query_start, scaling,
    window, owned, new_tokens, new_start, packed, recent, held, total, low, high, n_sink, ring, sliding, softcap, out,
    out_lse, kv_heads, new, rows, splits, new_slots,
    KINDS: tl.constexpr, M: tl.constexpr, KEY_D: tl.constexpr, KEY_PADDED: tl.constexpr, D: tl.constexpr,
    D_PADDED: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr, P: tl.constexpr, SEGMENTS: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention over one split of what the queries see: ``out [splits·SEGMENTS + tiles, B·Hq·S, D]`` fp32 and
    ``log2 Σ e^s`` alike, -inf where a row sees nothing of it. Packed tokens come in the values' own basis, after them
    the tiles of the window and those of the call's tokens in the model's.

    ``mapped [SEGMENTS, B, Hkv, g·S, M + 3]`` fp32: mapped queries, ``b``, ``h`` and ``q·μ``; with a ``frame`` (tokens
    of a segment, and how many there are) one such for each segment, from that of the oldest token on. ``heads``: the
    table of :func:`headq_ao.ops.paged_attention.triton_heads.head_table`. ``window``, ``new_tokens``: keys, their
    strides of batch, head and token, values, theirs; ``owned``: where an engine's pages hold the newest tokens, its
    window table, that one's stride, tokens of a page, and sinks of keys and values, each with strides; ``recent``,
    ``softcap``: see :class:`headq_ao.ops.types.PagedKV`. With
    ``query_start`` queries are those of :class:`headq_ao.ops.requests.Requests`. Grid: heads, splits, blocks of rows.
    """
    b = tl.program_id(0).to(tl.int64) // kv_heads
    h = tl.program_id(0).to(tl.int64) % kv_heads
    part = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    line = tl.program_id(0).to(tl.int64) * rows  # the first row's
    to_lse = out_lse + part.to(tl.int64) * tl.num_programs(0) * rows + line
    to = out + (part.to(tl.int64) * tl.num_programs(0) * rows + line) * D
    in_pages = tl.load(packed + b)
    if part < splits * SEGMENTS:
        mine = part % SEGMENTS
        lines = tl.num_programs(0).to(tl.int64) * rows
        mapped += (mine * lines + line) * (M + 3)
        of_frame = None
        if frame is not None:
            of_frame = (frame[0], frame[1], SEGMENTS * lines * (M + 3))
        kind = tl.load(heads + h * FIELDS)
        for i in tl.static_range(len(KINDS)):
            if kind == i:
                _packed_split(
                    mapped, M + 3, columns, heads, table + b * table_stride, table_columns, segment, of_frame,
                    in_pages, recent, total, low, high, n_sink, sliding, softcap, to, to_lse, b, h, row, live,
                    part // SEGMENTS, mine, new, splits,
                    KINDS, i, M, D, D_PADDED, ROWS, PTX, P, owned is not None,
                )  # fmt: skip
    else:
        exact_split(
            q, q_strides, query_start, scaling, window, owned, table, table_stride, new_tokens, new_start, in_pages,
            recent, held, total, low, high, n_sink, ring, sliding, softcap, to, to_lse, b, h, row, live,
            part - splits * SEGMENTS, new, rows, new_slots,
            KEY_D, KEY_PADDED, D, D_PADDED, TILE, PRECISION,
        )  # fmt: skip
