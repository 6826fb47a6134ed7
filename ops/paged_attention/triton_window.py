"""Triton: attention over one tile of the tokens in full precision, those of the window or the call's own."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


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
def codes_end(last, in_pages, recent):
    """Where in an engine's pages queries that see up to ``last`` go over from codes to full precision: see
    :attr:`headq_ao.ops.types.PagedKV.recent`."""
    return tl.maximum(last - 1 - recent, in_pages)


@triton.jit
def coded(total, in_pages, recent):
    """Tokens that a sequence's queries may read as codes."""
    if recent is not None:
        in_pages = codes_end(tl.load(total), in_pages, recent)
    return in_pages


@triton.jit
def query_token(query_start, b, s, new):
    """The token that is query ``s`` of the ``new`` at a sequence's end, and whether it is one of the call's."""
    token = tl.load(query_start + b + 1) - new + s
    return token, token >= tl.load(query_start + b)


@triton.jit
def product_fp32(x, y, PRECISION: tl.constexpr):
    """``x y`` with fp32 operands."""
    if PRECISION == "interpreter":
        product = tl.dot(x, y)
    else:
        product = tl.dot(x, y, input_precision=PRECISION)
    return product


@triton.jit
def _product(x, y, PRECISION: tl.constexpr):
    """``x y`` in fp32 of ``x`` as it is stored and ``y`` in fp32, which two halves in bf16 keep to 16 bits."""
    if x.dtype == tl.bfloat16:
        high = y.to(tl.bfloat16)
        low = (y - high.to(tl.float32)).to(tl.bfloat16)
        if PRECISION == "interpreter":  # which has no products of bf16
            x, high, low = x.to(tl.float32), high.to(tl.float32), low.to(tl.float32)
        product = tl.dot(x, high, tl.dot(x, low))
    else:
        product = product_fp32(x.to(tl.float32), y, PRECISION)
    return product


@triton.jit
def capped(s, softcap):
    """Scores in units of ``log 2`` under a softcap, ``cap · tanh(s / cap)``; ``softcap`` None: as they are."""
    if softcap is not None:
        cap = softcap * LOG2E
        s = cap - 2 * cap / (1 + tl.exp2(s * (2 / softcap)))
    return s


@triton.jit
def _attend(
    x, tokens, page, b, h, number, position, here, first, last, softcap, to, to_lse, row, live,
    KEY_D: tl.constexpr, KEY_PADDED: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of the scaled queries ``x [KEY_PADDED, ROWS]`` over tokens ``number [TILE]`` at those positions: of
    sequence ``b``, or of a ``page`` each."""
    e = tl.arange(0, KEY_PADDED)
    d = tl.arange(0, D_PADDED)
    k, k_strides, v, v_strides = tokens
    number = number.to(tl.int64)
    if page is None:
        at = k + b * k_strides[0] + h * k_strides[1] + (number * k_strides[2])[:, None] + e[None, :]
    else:
        at = k + h * k_strides[1] + (page * k_strides[0] + number * k_strides[2])[:, None] + e[None, :]
    key = tl.load(at, mask=here[:, None] & (e < KEY_D)[None, :], other=0.0)
    if page is None:
        at = v + b * v_strides[0] + h * v_strides[1] + (number * v_strides[2])[:, None] + d[None, :]
    else:
        at = v + h * v_strides[1] + (page * v_strides[0] + number * v_strides[2])[:, None] + d[None, :]
    value = tl.load(at, mask=here[:, None] & (d < D)[None, :], other=0.0)
    seen = here[:, None] & (position[:, None] >= first[None, :]) & (position[:, None] < last[None, :])
    s = tl.where(seen, capped(_product(key, x, PRECISION) * LOG2E, softcap), float("-inf"))
    top = tl.max(s, 0)
    frame = tl.where(top == float("-inf"), 0.0, top)
    w = tl.exp2(s - frame[None, :])
    mass = tl.sum(w, 0)
    some = tl.where(mass == 0, 1.0, mass)
    o = _product(tl.trans(value), w, PRECISION) / some[None, :]
    tl.store(to + d[:, None] + row[None, :] * D, o, mask=(d < D)[:, None] & live[None, :])
    tl.store(to_lse + row, tl.where(mass == 0, float("-inf"), frame + tl.log2(some)), mask=live)


@triton.jit
def exact_split(
    q, q_strides, query_start, scaling, window, owned, table, table_stride, new_tokens, start, in_pages, recent, held,
    total, low, high, n_sink, ring, sliding, softcap, to, to_lse, b, h, row, live, tile, new, rows, new_slots,
    KEY_D: tl.constexpr, KEY_PADDED: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention over tile ``tile`` of the window's slots, or of those of the call's tokens behind them. Of an engine's
    pages (``owned``) the first tiles are of the sinks, the others of up to ``ring`` newest tokens."""
    e = tl.arange(0, KEY_PADDED)
    head = h * (rows // new) + row // new
    if query_start is None:
        at = q + b * q_strides[0] + head[None, :] * q_strides[1] + (row % new)[None, :] * q_strides[2] + e[:, None]
        given = live
    else:
        token, own = query_token(query_start, b, row % new, new)
        at = q + head[None, :] * q_strides[1] + (token * q_strides[2])[None, :] + e[:, None]
        given = live & own
    x = tl.load(at, mask=(e < KEY_D)[:, None] & given[None, :], other=0.0).to(tl.float32) * scaling
    first, last = visible(b, row % new, live, new, low, high, total, sliding)
    in_window = tl.load(held + b)
    if owned is None:
        tiles = tl.cdiv(n_sink + ring, TILE)
    else:
        sink_tiles = tl.cdiv(n_sink, TILE)
        tiles = sink_tiles + tl.cdiv(ring, TILE)
        lowest = tl.min(tl.where(live, first, in_window), 0)  # pages of tokens that no query sees may be let go
    behind = first
    if recent is not None:
        behind = tl.maximum(first, codes_end(last, in_pages, recent))
    slot = tile * TILE + tl.arange(0, TILE)
    if tile < tiles:
        if owned is None:  # a slot of the ring holds the newest body token that belongs there
            newest = in_window - n_sink - 1
            back = (newest - (slot - n_sink)) % ring
            body = newest - tl.where(back < 0, back + ring, back)
            sink = slot < n_sink
            position = tl.where(sink, slot, body + n_sink)
            here = (slot < n_sink + ring) & tl.where(sink, slot < in_window, (body >= in_pages) & (body >= 0))
            _attend(
                x, window, None, b, h, slot, position, here, first, last, softcap, to, to_lse, row, live,
                KEY_D, KEY_PADDED, D, D_PADDED, PRECISION,
            )  # fmt: skip
        elif tile < sink_tiles:
            here = (slot < n_sink) & (slot < in_window) & (slot >= lowest)
            first_page = tl.load(table + b * table_stride).to(tl.int64)
            _attend(
                x, owned[3], None, first_page, h, slot, slot, here, first, last, softcap, to, to_lse, row, live,
                KEY_D, KEY_PADDED, D, D_PADDED, PRECISION,
            )  # fmt: skip
        else:
            window_table, window_stride, size = owned[0], owned[1], owned[2]
            number = slot - sink_tiles * TILE
            position = tl.maximum(in_pages, n_sink).to(tl.int32) + number
            here = (number < ring) & (position < in_window) & (position >= lowest)
            page = tl.load(window_table + b * window_stride + position // size, mask=here, other=0).to(tl.int64)
            _attend(
                x, window, page, b, h, position % size, position, here, behind, last, softcap, to, to_lse, row, live,
                KEY_D, KEY_PADDED, D, D_PADDED, PRECISION,
            )  # fmt: skip
    elif new_tokens is not None:
        number = slot - tiles * TILE
        position = in_window + number
        if start is not None:
            position -= tl.load(start + b)
        here = (number < new_slots) & (position >= in_window) & (position < tl.load(total + b))
        _attend(
            x, new_tokens, None, b, h, number, position, here, first, last, softcap, to, to_lse, row, live,
            KEY_D, KEY_PADDED, D, D_PADDED, PRECISION,
        )  # fmt: skip
