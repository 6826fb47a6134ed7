"""Triton: attention of many queries over rows in half precision, as flash attention reads them.

One program owns one KV head of one sequence, one block of its ``g·S`` query rows and one split of the tokens that
:mod:`headq_ao.ops.paged_attention.triton_unpack` left as rows, or what is in full precision: sinks, window and the
call's own tokens. Products have operands as the model has them, and fp32 sums. Tiles that all rows see whole, nearly
all, are read without masks. More tokens than there are rows for are read by launches one after the other, each of which
adds to what the one before it found.
"""

import triton
import triton.language as tl

from headq_ao.ops.paged_attention.triton_packed import body_token, oldest_token
from headq_ao.ops.paged_attention.triton_window import LOG2E, capped, coded, codes_end, visible


@triton.jit
def _product(x, y, acc, PRECISION: tl.constexpr):
    """``acc + x y``; ``PRECISION``: of operands in fp32."""
    if PRECISION == "interpreter":  # which has no products of bf16
        acc += tl.dot(x.to(tl.float32), y.to(tl.float32))
    elif x.dtype == tl.float32:
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(x, y, acc)
    return acc


@triton.jit
def _rows(base, at, here, N: tl.constexpr, PADDED: tl.constexpr):
    """Rows ``[n, PADDED]`` of ``N`` numbers that begin ``at [n]``; ``here`` None: all of them are there."""
    e = tl.arange(0, PADDED)
    address = base + at[:, None] + e[None, :]
    if here is not None:
        rows = tl.load(address, mask=here[:, None] & (e < N)[None, :], other=0.0)
    elif N == PADDED:
        rows = tl.load(address)
    else:
        rows = tl.load(address, mask=(e < N)[None, :], other=0.0)
    return rows


@triton.jit
def _absorb(sums, x, key, value, seen, scale, softcap, PRECISION: tl.constexpr):
    """The running maximum, ``Σ 2^(s − M)`` and ``Σ 2^(s − M) v`` with one tile of tokens; ``seen`` None: all rows
    see it."""
    top, total, acc = sums
    s = tl.zeros([x.shape[0], key.shape[0]], tl.float32)
    s = capped(_product(x, tl.trans(key.to(x.dtype)), s, PRECISION) * scale, softcap)
    if seen is not None:
        s = tl.where(seen, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    frame = new_top
    if seen is not None:
        frame = tl.where(new_top == float("-inf"), 0.0, new_top)
    decay = tl.exp2(top - frame)
    w = tl.exp2(s - frame[:, None])
    total = total * decay + tl.sum(w, 1)
    acc = _product(w.to(x.dtype), value.to(x.dtype), acc * decay[:, None], PRECISION)
    return new_top, total, acc


@triton.jit
def _seen_range(first, last, live, begin, end):
    """The part of ``begin ≤ p < end`` from the first to the last position that a row sees."""
    seeing = live & (first < last)
    begin = tl.maximum(begin, tl.min(tl.where(seeing, first, end), 0))
    return begin, tl.maximum(tl.minimum(end, tl.max(tl.where(seeing, last, begin), 0)), begin)


@triton.jit
def _run(
    sums, x, k, k_stride, v, v_stride, offset, begin, end, first, last, live, scale, softcap,
    KEY_D: tl.constexpr, KEY_PADDED: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The running sums and tokens at positions ``begin ≤ p < end``, row ``p − offset`` of ``k`` and ``v``, of which
    queries see ``first ≤ p < last``."""
    begin, end = _seen_range(first, last, live, begin, end)
    whole_begin = tl.minimum(tl.maximum(tl.max(tl.where(live, first, begin), 0), begin), end)
    whole_end = tl.minimum(tl.min(tl.where(live, last, end), 0), end)
    whole_end = whole_begin + tl.maximum(whole_end - whole_begin, 0) // TILE * TILE
    slot = tl.arange(0, TILE)
    for p0 in range(whole_begin, whole_end, TILE):
        i = (p0 - offset + slot).to(tl.int64)
        key = _rows(k, i * k_stride, None, KEY_D, KEY_PADDED)
        value = _rows(v, i * v_stride, None, D, D_PADDED)
        sums = _absorb(sums, x, key, value, None, scale, softcap, PRECISION)
    before = tl.cdiv(whole_begin - begin, TILE)
    for tile in tl.range(0, before + tl.cdiv(end - whole_end, TILE), num_stages=1):
        p = tl.where(tile < before, begin + tile * TILE, whole_end + (tile - before) * TILE) + slot
        here = p < tl.where(tile < before, whole_begin, end)
        i = (p - offset).to(tl.int64)
        key = _rows(k, i * k_stride, here, KEY_D, KEY_PADDED)
        value = _rows(v, i * v_stride, here, D, D_PADDED)
        seen = here[None, :] & (p[None, :] >= first[:, None]) & (p[None, :] < last[:, None])
        sums = _absorb(sums, x, key, value, seen, scale, softcap, PRECISION)
    return sums


@triton.jit
def _newest(
    sums, x, window, pages, b, h, n_sink, ring, begin, end, first, last, live, scale, softcap,
    KEY_D: tl.constexpr, KEY_PADDED: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The running sums and tokens ``begin ≤ p < end`` of the window: in a ring, or in an engine's ``pages``, their
    block table and size."""
    k, k_strides, v, v_strides = window
    begin, end = _seen_range(first, last, live, begin, end)
    for p0 in tl.range(begin, end, TILE, num_stages=1):
        p = p0 + tl.arange(0, TILE)
        here = p < end
        if pages is None:
            lead, i = b, n_sink + (p - n_sink) % ring
        else:
            lead, i = tl.load(pages[0] + p // pages[1], mask=here, other=0).to(tl.int64), p % pages[1]
        key = _rows(k + h * k_strides[1], lead * k_strides[0] + i * k_strides[2], here, KEY_D, KEY_PADDED)
        value = _rows(v + h * v_strides[1], lead * v_strides[0] + i * v_strides[2], here, D, D_PADDED)
        seen = here[None, :] & (p[None, :] >= first[:, None]) & (p[None, :] < last[:, None])
        sums = _absorb(sums, x, key, value, seen, scale, softcap, PRECISION)
    return sums


@triton.jit
def _in_full(
    sums, x, window, owned, table, new_tokens, new_slots, new_start, in_pages, recent, in_window, end, n_sink, ring,
    first, last, live, scale, softcap, b, h,
    KEY_D: tl.constexpr, KEY_PADDED: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The running sums and all that queries read in full precision: sinks, window and the call's own tokens."""
    if owned is None:
        sinks, lead, pages, behind = window, b, None, first
        oldest = tl.maximum(in_pages, in_window - n_sink - ring) + n_sink
    else:
        sinks, lead, pages = owned[3], tl.load(table).to(tl.int64), (owned[0] + b * owned[1], owned[2])
        oldest = tl.maximum(in_pages, n_sink)
        behind = tl.maximum(first, n_sink)
        if recent is not None:
            behind = tl.maximum(behind, codes_end(last, in_pages, recent))
    k, k_strides, v, v_strides = sinks
    sums = _run(
        sums, x, k + lead * k_strides[0] + h * k_strides[1], k_strides[2], v + lead * v_strides[0] + h * v_strides[1],
        v_strides[2], 0, 0, tl.minimum(n_sink, in_window), first, last, live, scale, softcap,
        KEY_D, KEY_PADDED, D, D_PADDED, TILE, PRECISION,
    )  # fmt: skip
    sums = _newest(
        sums, x, window, pages, b, h, n_sink, ring, oldest, in_window, behind, last, live, scale, softcap,
        KEY_D, KEY_PADDED, D, D_PADDED, TILE, PRECISION,
    )  # fmt: skip
    if new_tokens is not None:
        k, k_strides, v, v_strides = new_tokens
        k += b * k_strides[0] + h * k_strides[1]
        v += b * v_strides[0] + h * v_strides[1]
        offset = in_window
        if new_start is not None:
            offset -= tl.load(new_start + b).to(tl.int32)
        end = tl.minimum(end, offset + new_slots)
        if owned is not None:  # the sinks among them
            sums = _run(
                sums, x, k, k_strides[2], v, v_strides[2], offset, in_window, tl.minimum(end, n_sink), first, last,
                live, scale, softcap, KEY_D, KEY_PADDED, D, D_PADDED, TILE, PRECISION,
            )  # fmt: skip
        sums = _run(
            sums, x, k, k_strides[2], v, v_strides[2], offset, in_window, end, behind, last, live, scale, softcap,
            KEY_D, KEY_PADDED, D, D_PADDED, TILE, PRECISION,
        )  # fmt: skip
    return sums


@triton.jit(
    do_not_specialize=["tile_first", "tile_tokens", "table_columns", "recent", "n_sink", "ring", "sliding",
                       "new_slots", "kv_heads", "new", "rows"],
    do_not_specialize_on_alignment=["table", "packed", "held", "total", "low", "high", "new_start"],
)  # fmt: skip
def flash_kernel(
    q, q_strides, scaling, rows_k, rows_v, tile_first, tile_tokens, window, owned, table, table_stride,
    table_columns, new_tokens, new_slots, new_start, packed, recent, held, total, low, high, n_sink, ring, sliding,
    softcap, out, out_lse, kv_heads, new, rows,
    KEY_D: tl.constexpr, KEY_PADDED: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, CLOSING: tl.constexpr,
):  # fmt: skip
    """Attention over one split: ``out [splits, B·Hq·S, D]`` fp32 and ``log2 Σ e^s`` alike, -inf where a row sees
    nothing of it, all in the model's basis.

    ``rows_k``, ``rows_v``: :func:`unpack_kernel`'s, of the body tokens from number ``tile_first`` on of those that a
    block table holds; from the second such launch on results are added to those that are there. With ``CLOSING``, one
    split, what is in full precision is added to them instead. ``DTYPE``: of the products' operands. The others are
    those of :func:`headq_ao.ops.paged_attention.triton_packed.split_kernel`. Grid: blocks of rows, splits, heads.
    """
    BY_POSITION: tl.constexpr = owned is not None
    # those that see most begin first
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    split, splits = tl.program_id(1), tl.num_programs(1)
    b = tl.program_id(2).to(tl.int64) // kv_heads
    h = tl.program_id(2).to(tl.int64) % kv_heads
    row = block * ROWS + tl.arange(0, ROWS)
    live = row < rows
    in_pages, in_window = tl.load(packed + b).to(tl.int32), tl.load(held + b).to(tl.int32)
    ended = tl.load(total + b).to(tl.int32)
    first, last = visible(b, row % new, live, new, low, high, total, sliding)
    first, last = first.to(tl.int32), tl.minimum(last, ended).to(tl.int32)

    # which body tokens the rows see as codes, and this split's share of those that there are rows of
    count = coded(total + b, in_pages, recent).to(tl.int32)
    code_last = last
    if recent is not None:
        code_last = tl.minimum(last, codes_end(last, in_pages, recent))
    from_oldest = oldest_token(count, table_columns, n_sink, P, BY_POSITION)
    code_first = tl.maximum(body_token(first, n_sink, BY_POSITION), from_oldest)
    code_last = tl.minimum(body_token(code_last, n_sink, BY_POSITION), count)
    offset = oldest_token(count, table_columns, 0, P, False) + tile_first
    begin, end = _seen_range(code_first, code_last, live, offset, offset + tile_tokens)
    share = tl.cdiv(tl.cdiv(end - begin, TILE), splits) * TILE
    begin = tl.minimum(begin + split * share, end)
    end = tl.minimum(begin + share, end)

    if (begin < end) | CLOSING | (tile_first == 0):
        e = tl.arange(0, KEY_PADDED)
        d = tl.arange(0, D_PADDED)
        head = h * (rows // new) + row // new
        at = (
            q + b * q_strides[0] + (head * q_strides[1] + (row % new).to(tl.int64) * q_strides[2])[:, None] + e[None, :]
        )
        x = tl.load(at, mask=live[:, None] & (e < KEY_D)[None, :], other=0.0).to(DTYPE)
        scale = scaling * LOG2E
        sums = (
            tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32),
            tl.zeros([ROWS, D_PADDED], tl.float32),
        )  # fmt: skip
        if CLOSING:
            sums = _in_full(
                sums, x, window, owned, table + b * table_stride, new_tokens, new_slots, new_start, in_pages,
                recent, in_window, ended, n_sink, ring, first, last, live, scale, softcap, b, h,
                KEY_D, KEY_PADDED, D, D_PADDED, TILE, PRECISION,
            )  # fmt: skip
        else:
            of_head = tl.program_id(2).to(tl.int64) * tile_tokens
            sums = _run(
                sums, x, rows_k + of_head * KEY_D, KEY_D, rows_v + of_head * D, D, offset, begin, end, code_first,
                code_last, live, scale, softcap, KEY_D, KEY_PADDED, D, D_PADDED, TILE, PRECISION,
            )  # fmt: skip
        top, mass, acc = sums
        some = tl.where(mass == 0, 1.0, mass)
        found = tl.where(mass == 0, float("-inf"), top + tl.log2(some))
        acc /= some[:, None]
        line = (split.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)) * rows + row
        to = out + line[:, None] * D + d[None, :]
        to_mask = live[:, None] & (d < D)[None, :]
        if tile_first > 0 or CLOSING:  # on with what there is
            before = tl.load(out_lse + line, mask=live, other=float("-inf"))
            highest = tl.maximum(before, found)
            highest = tl.where(highest == float("-inf"), 0.0, highest)
            of_before, of_found = tl.exp2(before - highest), tl.exp2(found - highest)
            both = of_before + of_found
            some = tl.where(both == 0, 1.0, both)
            acc *= (of_found / some)[:, None]
            acc += tl.load(to, mask=to_mask, other=0.0) * (of_before / some)[:, None]
            found = tl.where(both == 0, float("-inf"), highest + tl.log2(some))
        tl.store(to, acc, mask=to_mask)
        tl.store(out_lse + line, found, mask=live)
