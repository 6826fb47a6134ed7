"""How a token's codes become bytes of its page, in Triton."""

import triton
import triton.language as tl

from headq_ao.ops.paged_attention.triton_codes import CHUNK


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
