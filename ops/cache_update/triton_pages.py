"""What the kernels of ``cache_update`` share: tokens into the window, and codes into the bytes of a page."""

import triton
import triton.language as tl

from headq_ao.ops.paged_attention.triton_codes import CHUNK, FIRST_BYTE


@triton.jit
def put_number(to, number, here):
    """A scale or a zero into its place, fp16 or a byte (:mod:`headq_ao.ops.rounding`)."""
    if to.dtype.element_ty == tl.uint8:
        tl.store(to, ((number.to(tl.int32, bitcast=True) - FIRST_BYTE) >> 18).to(tl.uint8), mask=here)
    else:
        tl.store(to, number.to(tl.float16), mask=here)


@triton.jit
def copy_token(to, to_strides, page, at, x, x_strides, b, number, h, kept, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Copy one head's token ``number`` of sequence ``b`` of ``x`` to token ``at`` of sequence or page ``page`` of
    ``to``; zeros behind its coordinate ``kept``."""
    d = tl.arange(0, D_PADDED)
    source = x + b * x_strides[0] + h * x_strides[1] + number * x_strides[2]
    token = tl.load(source + d, mask=d < kept, other=0.0)
    tl.store(to + page * to_strides[0] + h * to_strides[1] + at * to_strides[2] + d, token, mask=d < D)


@triton.jit
def window_page(owned, b, j, ring):
    """What holds token ``j`` of a sequence in full precision: its window, or one of an engine's pages (``owned``: the
    window table, its stride, the table of packed pages, its stride)."""
    if owned is None:
        page = b
    else:
        page = tl.load(owned[0] + b * owned[1] + j // ring).to(tl.int64)
    return page


@triton.jit
def append_token(
    window, window_strides, new, new_strides, held, total, start, b, h, n, n_sink, ring, D: tl.constexpr,
    D_PADDED: tl.constexpr,
):  # fmt: skip
    """The call's token in slot ``n`` into one side's window, unless another will have its place there."""
    end = tl.load(total + b)
    real = n
    if start is not None:
        real -= tl.load(start + b)
    position = tl.load(held + b) + real
    sink = position < n_sink
    if (real >= 0) & (position < end) & (sink | (position >= end - ring)):
        slot = tl.where(sink, position, n_sink + (position - n_sink) % ring)
        copy_token(window, window_strides, b, slot, new, new_strides, b, n, h, D, D, D_PADDED)


@triton.jit
def append_to_pages(
    window, window_strides, sinks, sink_strides, new, new_strides, owned, held, total, start, b, h, n, n_sink, size,
    D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """The call's token ``n`` into one side's page of an engine, of ``size`` tokens, and a sink to the sinks too."""
    number = n
    if start is not None:
        number += tl.load(start + b)
    position = tl.load(held + b) + n
    if position < tl.load(total + b):
        page = window_page(owned, b, position, size)
        copy_token(window, window_strides, page, position % size, new, new_strides, b, number, h, D, D, D_PADDED)
        if position < n_sink:
            page = tl.load(owned[2] + b * owned[3]).to(tl.int64)
            copy_token(sinks, sink_strides, page, position, new, new_strides, b, number, h, D, D, D_PADDED)


@triton.jit
def page_of(table, table_stride, table_columns, b, j, P: tl.constexpr):
    """The physical page of body token ``j``."""
    return tl.load(table + b * table_stride + j // P % table_columns).to(tl.int64)


@triton.jit
def key_byte(codes, columns, WIDTH: tl.constexpr):
    """The bytes of one chunk from a key's codes, ``[CHUNK]``."""
    c = tl.arange(0, CHUNK)
    byte = tl.zeros([CHUNK], tl.int32)
    for p in tl.static_range(8 // WIDTH):
        column = tl.load(columns + p * CHUNK + c)
        code = tl.load(codes + (column & 0xFFFF), mask=column >= 0, other=0).to(tl.int32)
        byte |= (code >> ((column >> 16) & 7) & (2**WIDTH - 1)) << (p * WIDTH)
    return byte.to(tl.uint8)


@triton.jit
def put_value_piece(plane, code, inside, W: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr):
    """The low ``W`` bits of a value's codes into a page's plane, whose bytes other tokens share."""
    d = tl.arange(0, D_PADDED)
    to = plane + inside // (32 // W) * (D * 4) + inside % 4 + d * 4
    at = (inside % (32 // W) // 4 * W).to(tl.int32)
    kept = tl.load(to, mask=d < D, other=0).to(tl.int32) & (255 ^ ((2**W - 1) << at))
    tl.store(to, (kept | (code & (2**W - 1)) << at).to(tl.uint8), mask=d < D)
