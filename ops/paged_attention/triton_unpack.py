"""Triton: packed tokens as rows in half precision, for calls whose many queries repay it.

A program takes one side of a block of tokens of one KV head. Keys come in the model's basis, as queries see them: from
``s = q·k̂`` for all ``q``, ``k̂ = σ (M_c c + M_b) + m M_h + M_μ`` with the columns ``M`` of the query map, turned on by
``R_s`` where they were coded in the frame of their segment. Values come as ``v̂ = R ŷ + μ``. So queries are neither
mapped nor turned, for whatever segments, and all that is read afterwards are plain rows.
"""

import triton
import triton.language as tl

from headq_ao.ops.paged_attention.triton_codes import CHUNK
from headq_ao.ops.paged_attention.triton_heads import FIELDS as _FIELDS
from headq_ao.ops.paged_attention.triton_heads import form, sides
from headq_ao.ops.paged_attention.triton_packed import lookup, number, oldest_token
from headq_ao.ops.paged_attention.triton_window import coded, product_fp32

FIELDS = tl.constexpr(_FIELDS)
BLOCK = tl.constexpr(32)  # coordinates of a value that are unpacked at a time


@triton.jit
def _chunk_bytes(
    base, stride, page, inside, here, FIRST: tl.constexpr, BYTES: tl.constexpr, ROW: tl.constexpr
):  # fmt: skip
    """``BYTES`` bytes of each key from the byte ``FIRST`` of ``ROW`` on, ``[SLOTS, CHUNK]``."""
    c = tl.arange(0, CHUNK)
    token = page.to(tl.int64) * stride + (inside // 16 * (ROW * 16) + inside % 16 * 4)
    column = c // 4 * 64 + c % 4 + FIRST * 16
    return tl.load((base + token)[:, None] + column[None, :], mask=here[:, None] & (c < BYTES)[None, :], other=0)


@triton.jit
def _mapped_keys(
    planes, strides, page, inside, here, sigma, zero, columns, weights, row_stride, e,
    CHUNKS: tl.constexpr, M: tl.constexpr, KEY_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Coordinates ``e`` of the keys ``[SLOTS, KEY_PADDED]``, fp32; ``weights``: the query map's row of each."""
    given = (e < KEY_D)[None, :]
    at = weights + e[None, :] * row_stride
    rows = tl.zeros([page.shape[0], e.shape[0]], tl.float32)
    for i in tl.static_range(len(CHUNKS)):
        base, stride = planes[CHUNKS[i][0]], strides[CHUNKS[i][0]]
        byte = _chunk_bytes(base, stride, page, inside, here, CHUNKS[i][2], CHUNKS[i][3], CHUNKS[i][4])
        for p in range(0, 8 // CHUNKS[i][1]):
            column = tl.load(columns + p * CHUNK + tl.arange(0, CHUNK))
            weight = tl.load(at + (column & 0xFFFF)[:, None], mask=(column >= 0)[:, None] & given, other=0.0)
            weight *= (1 << ((column >> 16) & 7)).to(tl.float32)[:, None]
            code = ((byte >> (p * CHUNKS[i][1])) & (2 ** CHUNKS[i][1] - 1)).to(tl.float32)
            rows += product_fp32(code, weight, PRECISION)
        columns += CHUNK * (8 // CHUNKS[i][1])
    row = weights + e * row_stride
    rows = (rows + tl.load(row + M, mask=e < KEY_D, other=0.0)[None, :]) * sigma[:, None]
    if zero is not None:
        rows += zero[:, None] * tl.load(row + M + 1, mask=e < KEY_D, other=0.0)[None, :]
    return rows + tl.load(row + M + 2, mask=e < KEY_D, other=0.0)[None, :]


@triton.jit
def _keys(
    keys, page, inside, t, here, columns, query_map, map_strides, segment, frame,
    KINDS: tl.constexpr, KIND: tl.constexpr, SEGMENTS: tl.constexpr, M: tl.constexpr, KEY_D: tl.constexpr,
    KEY_PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys ``[SLOTS, KEY_PADDED]`` in the model's basis, fp32."""
    planes, strides, scale, scale_stride, zero, zero_stride = keys
    CHUNKS: tl.constexpr = form(KINDS, KIND, 0)
    columns += form(KINDS, KIND, 1)
    e = tl.arange(0, KEY_PADDED)
    sigma = number(scale, scale_stride, page, inside, here)
    m = None
    if form(KINDS, KIND, 2):
        m = number(zero, zero_stride, page, inside, here)
    rows = tl.zeros([page.shape[0], KEY_PADDED], tl.float32)
    mine = page * 0
    if segment is not None:
        mine = tl.load(segment + page, mask=here, other=0)
    for g in range(0, SEGMENTS):
        if tl.max((here & (mine == g)).to(tl.int32), 0) > 0:
            weights = query_map + g * map_strides[0]
            found = tl.zeros([page.shape[0], KEY_PADDED], tl.float32)
            for turn in range(0, 1 if frame is None else 2):
                of = e
                if frame is not None:
                    of = tl.where(turn == 0, e, tl.load(frame[1] + e, mask=e < KEY_D, other=KEY_D))
                mapped = _mapped_keys(
                    planes, strides, page, inside, here, sigma, m, columns, weights, map_strides[3], of,
                    CHUNKS, M, KEY_D, PRECISION,
                )  # fmt: skip
                if frame is not None:  # R_s of what was read in the frame: each coordinate, then the other of its pair
                    at = tl.minimum(t // frame[2], frame[3] - 1).to(tl.int64) * (2 * KEY_D) + turn * KEY_D
                    given = here[:, None] & (e < KEY_D)[None, :]
                    mapped *= tl.load(frame[0] + at[:, None] + e[None, :], mask=given, other=0.0) * (1 - 2 * turn)
                found += mapped
            rows = tl.where((mine == g)[:, None], found, rows)
    return rows


@triton.jit
def _stored_values(
    values, page, inside, here, d,
    BITS: tl.constexpr, WIDTHS: tl.constexpr, GROUPS: tl.constexpr, ZERO: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Coordinates ``d`` of the values in their own basis, ``[SLOTS, len(d)]`` fp32."""
    planes, strides, scale, scale_stride, zero, zero_stride = values
    given = here[:, None] & (d < D)[None, :]
    code = tl.zeros([page.shape[0], d.shape[0]], tl.int32)
    for i in tl.static_range(len(WIDTHS)):
        token = page.to(tl.int64) * strides[i] + (inside // (32 // WIDTHS[i]) * (D * 4) + inside % 4)
        byte = tl.load((planes[i] + token)[:, None] + (d * 4)[None, :], mask=given, other=0).to(tl.int32)
        at_bit = inside % (32 // WIDTHS[i]) // 4 * WIDTHS[i]
        code += ((byte >> at_bit[:, None]) & (2 ** WIDTHS[i] - 1)) << (WIDTHS[0] * i)
    column = d // (D // GROUPS)
    at = inside[:, None] * GROUPS + column[None, :]
    a = number(scale, scale_stride, page[:, None], at, given)
    z = a * (-(2**BITS - 1) / 2)
    if ZERO:
        z = number(zero, zero_stride, page[:, None], at, given)
    return code.to(tl.float32) * a + z


@triton.jit
def _values(
    values, page, inside, here, read, read_strides, mean, mean_stride,
    KINDS: tl.constexpr, KIND: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Values ``[SLOTS, D_PADDED]`` in the model's basis, fp32."""
    BITS: tl.constexpr = form(KINDS, KIND, 3)
    WIDTHS: tl.constexpr = form(KINDS, KIND, 4)
    ZERO: tl.constexpr = form(KINDS, KIND, 6)
    GROUPS: tl.constexpr = form(KINDS, KIND, 7)
    e = tl.arange(0, D_PADDED)
    if read is None:
        rows = _stored_values(values, page, inside, here, e, BITS, WIDTHS, GROUPS, ZERO, D)
    else:
        STEP: tl.constexpr = min(BLOCK, D_PADDED)
        rows = tl.zeros([page.shape[0], D_PADDED], tl.float32)
        for first in range(0, D_PADDED, STEP):
            d = first + tl.arange(0, STEP)
            stored = _stored_values(values, page, inside, here, d, BITS, WIDTHS, GROUPS, ZERO, D)
            at = read + e[None, :] * read_strides[2] + d[:, None] * read_strides[3]
            turn = tl.load(at, mask=(d < D)[:, None] & (e < D)[None, :], other=0.0).to(tl.float32)
            rows += product_fp32(stored, turn, PRECISION)
    if mean is not None:
        rows += tl.load(mean + e * mean_stride, mask=e < D, other=0.0).to(tl.float32)[None, :]
    return rows


@triton.jit(
    do_not_specialize=["table_columns", "recent", "sliding", "n_sink", "new", "kv_heads", "first", "tokens"],
    do_not_specialize_on_alignment=["table", "segment", "packed", "total", "lowest"],
)  # fmt: skip
def unpack_kernel(
    heads, columns, query_map, map_strides, read, read_strides, mean, mean_strides, frame, table, table_stride,
    table_columns, segment, packed, recent, total, lowest, sliding, n_sink, new, k, v, kv_heads, first, tokens,
    KINDS: tl.constexpr, SEGMENTS: tl.constexpr, M: tl.constexpr, KEY_D: tl.constexpr, KEY_PADDED: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, P: tl.constexpr, SLOTS: tl.constexpr, BY_POSITION: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows ``k [B, Hkv, tokens, KEY_D]`` and ``v [B, Hkv, tokens, D]`` of the body tokens from number ``first`` on of
    those that a sequence's block table holds; rows of tokens that are not there, or before all that its queries see,
    are left as they are.

    ``lowest [B]``: the first position that a query of a sequence sees; None: as ``sliding`` says. The others are those
    of :func:`headq_ao.ops.paged_attention.triton_packed.split_kernel` and
    :func:`headq_ao.ops.paged_attention.triton_join.join_kernel`. Grid: blocks of tokens, heads, sides.
    """
    b = tl.program_id(1).to(tl.int64) // kv_heads
    h = tl.program_id(1).to(tl.int64) % kv_heads
    held = coded(total + b, tl.load(packed + b), recent)
    oldest = oldest_token(held, table_columns, 0, P, False)
    t0 = (oldest + first + tl.program_id(0) * SLOTS).to(tl.int32)
    slot = tl.arange(0, SLOTS)
    t = t0 + slot
    here = t < held
    if lowest is None:
        seen_from = tl.where(sliding > 0, tl.load(total + b) - new + 1 - sliding, 0)
    else:
        seen_from = tl.load(lowest + b)
    if not BY_POSITION:
        seen_from -= n_sink
    if (t0 < held) & (t0 + SLOTS > seen_from):
        whole = (oldest // P // table_columns * table_columns).to(tl.int32)  # rounds of the block table
        page = lookup((table + b * table_stride, table_columns, whole), t, here, P)
        inside = t % P
        line = (tl.program_id(1).to(tl.int64) * tokens + tl.program_id(0) * SLOTS + slot)[:, None]
        kind = tl.load(heads + h * FIELDS)
        for i in tl.static_range(len(KINDS)):
            if kind == i:
                keys, values = sides(heads, h, KINDS, i)
                if tl.program_id(2) == 0:
                    rows = _keys(
                        keys, page, inside, t, here, columns, query_map + b * map_strides[1] + h * map_strides[2],
                        map_strides, segment, frame, KINDS, i, SEGMENTS, M, KEY_D, KEY_PADDED, PRECISION,
                    )  # fmt: skip
                    e = tl.arange(0, KEY_PADDED)
                    tl.store(k + line * KEY_D + e[None, :], rows, mask=here[:, None] & (e < KEY_D)[None, :])
                else:
                    of_head, of_mean, mean_stride = None, None, 0
                    if read is not None:
                        of_head = read + b * read_strides[0] + h * read_strides[1]
                    if mean is not None:
                        of_mean, mean_stride = mean + b * mean_strides[0] + h * mean_strides[1], mean_strides[2]
                    rows = _values(
                        values, page, inside, here, of_head, read_strides, of_mean, mean_stride,
                        KINDS, i, D, D_PADDED, PRECISION,
                    )  # fmt: skip
                    d = tl.arange(0, D_PADDED)
                    tl.store(v + line * D + d[None, :], rows, mask=here[:, None] & (d < D)[None, :])
