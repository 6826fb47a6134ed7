"""The Triton kernels behind ``decode_attention`` and ``attend`` on CUDA and HIP: split-KV flash-decoding.

One program owns one KV head of one sequence, one block of its ``G·S`` query rows and one split of the visible slots; a
second kernel joins the splits by log-sum-exp. A tile is ``16·PARTS`` slots; part ``j`` of it holds
the slots ``t0 + (r // 4)·4·PARTS + 4j + r % 4``, those whose value codes lie at one bit position of the value bytes
``[16, D]``. So every plane byte is loaded once and every piece is a constant mask away: left where it lies, at bit
``at`` of its byte, it counts ``2^at`` times its code, which the other factor of the product makes up for. On CUDA it is
not even converted: a byte in the low bits of an fp16 is the subnormal number ``2^-24`` times it, and matrix
instructions multiply those exactly. Each piece feeds one ``tl.dot`` with fp16 operands and fp32 sums:

- scores, ``s_j = σ_j (Σ_pieces q_piece · c_piece + b) + m_j h``, the query scaled by row;
- readout, ``Σ_j w_j (c_j − c0)`` with ``w_j = 2^{s_j − M} a_j``, ``a_j`` the values' scale, ``c0 = (2^bits − 1)/2``.

Where ``c0`` belongs to the sums it is taken off afterwards, times the sum of the same rounded factors. ``M`` is the
running maximum of ``s_j + log2 a_j`` less a headroom: weights fill fp16 to 2^14, and its normal numbers reach down to
1e-6 of the largest. Tiles that all rows see whole, nearly all, are read without masks, their scales one tile ahead.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headq_ao.ops.decode_attention.cpu_kernel import ExactRows, row_stride
from headq_ao.ops.gpu_build import numbers_on
from headq_ao.ops.layout import PIECES, plane_columns, plane_pieces

MOST_SPLITS, LEAST_SLOTS = 512, 128  # of a split
JOINED, BLOCK = 128, 32  # splits or exact rows, and coordinates, that are joined at a time
STAGES = {"cuda": 3, "hip": 1, "interpreter": 1}
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
CHUNK_BYTES = 16  # of a key row, loaded together: with 8 rows side by side they fill whole sectors
CHUNK = tl.constexpr(CHUNK_BYTES)
LARGEST = tl.constexpr(14)  # log2 of the largest factor in fp16


@functools.lru_cache(maxsize=256)
def key_chunks(bits: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Key planes cut to :data:`CHUNK_BYTES` bytes a row: ``(plane, width, first byte, bytes, bytes of a whole row)``.

    Example:
        >>> key_chunks((2,) * 80)  # 20 bytes a row: 16, then 4 of 16
        ((0, 2, 0, 16, 20), (0, 2, 16, 4, 20))
    """
    chunks = []
    for plane, (width, pieces) in enumerate(plane_pieces(bits).items()):
        total = plane_columns(width, len(pieces)) * width // 8
        chunks += [
            (plane, width, first, min(total - first, CHUNK_BYTES), total) for first in range(0, total, CHUNK_BYTES)
        ]
    return tuple(chunks)


@functools.lru_cache(maxsize=256)
def query_columns(bits: tuple[int, ...], device: torch.device) -> Tensor:
    """For each (chunk, piece, byte): ``coordinate | shift << 16`` of the query's column, −1 for padding; int32."""
    columns: list[int] = []
    planes = list(plane_pieces(bits).items())
    for plane, width, first, _, _ in key_chunks(bits):
        pieces = planes[plane][1]
        for p in range(8 // width):
            for byte in range(first, first + CHUNK_BYTES):
                index = byte // 4 * (32 // width) + p * 4 + byte % 4
                columns.append(pieces[index][0] | pieces[index][1] << 16 if index < len(pieces) else -1)
    return torch.tensor(columns, dtype=torch.int32).to(device)


@triton.constexpr_function
def spread_ptx(mask):
    """PTX from four plane bytes to the masked bits of each in the low bits of a half, two to a register."""
    return (
        "{ .reg .b32 lo, hi; prmt.b32 lo, $2, 0, 0x4140; prmt.b32 hi, $2, 0, 0x4342;"
        f" and.b32 $0, lo, 0x{mask | mask << 16:08x}; and.b32 $1, hi, 0x{mask | mask << 16:08x}; }}"
    )


@triton.jit
def _piece(byte, AT: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr):
    """The piece at bit ``AT`` of each byte as fp16: ``code·2^AT``, with ``PTX`` times :func:`unit`."""
    MASK: tl.constexpr = (2**WIDTH - 1) << AT
    if PTX:
        return tl.inline_asm_elementwise(spread_ptx(MASK), "=r,=r,r", [byte], dtype=tl.float16, is_pure=True, pack=4)
    return (byte & MASK).to(tl.float16)


@triton.constexpr_function
def unit(ptx):
    """What a piece of 1 at bit 0 is as fp16: with PTX the smallest subnormal."""
    return 2.0**-24 if ptx else 1.0


@triton.constexpr_function
def raised(ptx):
    """A power of two that takes pieces well into fp16's normal numbers."""
    return 2.0**15 if ptx else 1.0


@triton.jit
def _query_slices(q, q_stride, columns, row, rows, scale, WIDTH: tl.constexpr):
    """One chunk's query slices, fp16 ``[CHUNK, ROWS]`` for each piece: the query by ``scale`` and ``2^-AT``.

    And what their rounding takes from ``q·c0`` by that scale, ``[ROWS]``.
    """
    slices = ()
    lost = tl.zeros_like(scale)
    for p in tl.static_range(8 // WIDTH):
        column = tl.load(columns + p * CHUNK + tl.arange(0, CHUNK))
        mask = (column >= 0)[:, None] & (row < rows)[None, :]
        x = tl.load(q + (column & 0xFFFF)[:, None] + row[None, :] * q_stride, mask=mask, other=0.0) * scale[None, :]
        x *= (1 << ((column >> 16) & 7)).to(tl.float32)[:, None]
        rounded = (x * (2.0 ** (-p * WIDTH))).to(tl.float16)
        lost += tl.sum(x - rounded.to(tl.float32) * (2.0 ** (p * WIDTH)), 0) * ((2**WIDTH - 1) / 2)
        slices = slices + (rounded,)
    return slices, lost


@triton.jit
def _add_chunk(
    s, slices, base, slot, inside,
    WIDTH: tl.constexpr, FIRST: tl.constexpr, BYTES: tl.constexpr, ROW: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """``s [SLOTS, ROWS]`` and one chunk's part of ``Σ q·c`` for the slots ``base + slot``; ``inside`` None: all."""
    c = tl.arange(0, CHUNK)
    address = (slot // 16 * (ROW * 16) + slot % 16 * 4)[:, None] + (c // 4 * 64 + c % 4)[None, :]
    whole: tl.constexpr = BYTES == CHUNK
    if inside is None:
        byte = (
            tl.load(base + FIRST * 16 + address)
            if whole
            else tl.load(base + FIRST * 16 + address, mask=(c < BYTES)[None, :], other=0)
        )
    else:
        byte = tl.load(base + FIRST * 16 + address, mask=inside[:, None] & (c < BYTES)[None, :], other=0)
    for p in tl.static_range(8 // WIDTH):
        s = tl.dot(_piece(byte, p * WIDTH, WIDTH, PTX), slices[p], s)
    return s


@triton.jit
def _parts(w, PARTS: tl.constexpr):
    """``w [16·PARTS, ROWS]`` as its parts ``[16, ROWS]``."""
    ROWS: tl.constexpr = w.shape[1]
    x = tl.permute(tl.reshape(w, [4, PARTS, 4, ROWS]), [0, 2, 3, 1])
    x = tl.reshape(x, [16, ROWS, PARTS])
    if PARTS == 2:
        p0, p1 = tl.split(x)
        parts = (p0, p1)
    elif PARTS == 4:
        even, odd = tl.split(tl.reshape(x, [16, ROWS, 2, 2]))
        p0, p2 = tl.split(even)
        p1, p3 = tl.split(odd)
        parts = (p0, p1, p2, p3)
    else:
        even, odd = tl.split(tl.reshape(x, [16, ROWS, 4, 2]))
        ea, eb = tl.split(tl.reshape(even, [16, ROWS, 2, 2]))
        oa, ob = tl.split(tl.reshape(odd, [16, ROWS, 2, 2]))
        p0, p4 = tl.split(ea)
        p2, p6 = tl.split(eb)
        p1, p5 = tl.split(oa)
        p3, p7 = tl.split(ob)
        parts = (p0, p1, p2, p3, p4, p5, p6, p7)
    return parts


@triton.jit
def _head(x, strides, b, h, offset):
    """Where a head's rows begin, and ``offset`` from there."""
    return x + b * strides[0] + h * strides[1] + offset


@triton.jit
def _number(x, strides, b, h, t, here):
    """The number that each slot has, fp32; 0 where it is not ``here``."""
    return tl.load(_head(x, strides, b, h, t.to(tl.int64)), mask=here, other=0.0).to(tl.float32)


@triton.jit
def _log2(x):
    """``log2 |x|``, up to 0.09 too small, of at least 2^-24: exponent and mantissa of an fp32, read as one number."""
    return tl.maximum(tl.abs(x), 2.0**-24).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-23 - 127.0


@triton.jit
def _scores(
    t0, b, h, slot, here, queries, planes, strides, slope, offset, sigma,
    CHUNKS: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """``σ_j (q·c_j + b)`` of one tile in units of ``log 2``, ``[SLOTS, ROWS]``."""
    s = tl.zeros([SLOTS, ROWS], tl.float32)
    for i in tl.static_range(len(CHUNKS)):
        base = _head(planes[CHUNKS[i][0]], strides[CHUNKS[i][0]], b, h, t0.to(tl.int64) * CHUNKS[i][4])
        s = _add_chunk(
            s, queries[i], base, slot, here,
            CHUNKS[i][1], CHUNKS[i][2], CHUNKS[i][3], CHUNKS[i][4], PTX,
        )  # fmt: skip
    return (s * slope[None, :] + offset[None, :]) * sigma[:, None]


@triton.jit
def _readout(
    acc, weights, t0, end, b, h, planes, strides, scale, scale_strides, zero, zero_strides,
    BITS: tl.constexpr, WIDTHS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    GROUPS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """``acc [D_PADDED, ROWS]`` and one tile's ``Σ_j w_j`` times what is stored; ``end`` None: of all its slots.

    That is the codes by :func:`unit` and ``2^-WIDTHS[0]`` of two planes, or, with scales of groups, the values.
    """
    r = tl.arange(0, 16)
    d = tl.arange(0, D_PADDED)
    entries = ()
    for i in tl.static_range(len(WIDTHS)):
        base = _head(planes[i], strides[i], b, h, t0.to(tl.int64) * (D * WIDTHS[i] // 8))
        for e in tl.static_range(PARTS * WIDTHS[i] // 8):
            entry = r // 4 * (PARTS * WIDTHS[i] // 8) + e
            address = (d * 4)[:, None] + (entry * (D * 4) + r % 4)[None, :]
            if end is None:
                byte = (
                    tl.load(base + address)
                    if D == D_PADDED
                    else tl.load(base + address, mask=(d < D)[:, None], other=0)
                )
            else:
                inside = (d < D)[:, None] & (t0 + entry * (32 // WIDTHS[i]) < end)[None, :]
                byte = tl.load(base + address, mask=inside, other=0)
            entries = entries + (byte,)
    for j in tl.static_range(PARTS):
        values = tl.zeros([D_PADDED, 16], tl.float16)
        for i in tl.static_range(len(WIDTHS)):
            byte = entries[(PARTS * WIDTHS[0] * i + j * WIDTHS[i]) // 8]
            piece = _piece(byte, j * WIDTHS[i] % 8, WIDTHS[i], PTX)
            if GROUPS == 1:
                acc = tl.dot(piece, weights[j] * 2.0 ** (WIDTHS[0] * i - j * WIDTHS[i] % 8), acc)
            else:  # in two steps: fp16 has no 2^24
                values += piece * raised(PTX) * (2.0 ** (WIDTHS[0] * i - j * WIDTHS[i] % 8) / (raised(PTX) * unit(PTX)))
        if GROUPS > 1:
            slot = t0 + r // 4 * (4 * PARTS) + 4 * j + r % 4
            inside = (d < D)[:, None] & (tl.max(weights[j], 1) != 0)[None, :]
            if end is not None:
                inside = inside & (slot < end)[None, :]
            group = (d // (D // GROUPS))[:, None] + slot[None, :] * GROUPS
            a = _number(scale, scale_strides, b, h, group, inside)
            values = (values - (2**BITS - 1) / 2) * a.to(tl.float16)  # the difference is exact
            if zero is not None:
                z = _number(zero, zero_strides, b, h, group, inside) + a * ((2**BITS - 1) / 2)
                values += z.to(tl.float16)
            acc = tl.dot(values, weights[j], acc)
    return acc


@triton.jit
def _absorb(
    top, total, shift, acc, s, a, z, t0, end, b, h, planes, strides, scale, scale_strides, zero, zero_strides,
    HEADROOM: tl.constexpr, BITS: tl.constexpr, WIDTHS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    D_PADDED: tl.constexpr, GROUPS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The running sums and one tile of scores ``s``; ``a``, ``z`` the scales and zeros of its values where one serves a
    row, and where ``end`` is given, slots whose score is -inf may hold any."""
    weighted = s
    if GROUPS == 1:
        weighted = s + _log2(a)[:, None]
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
        acc, _parts(rounded, PARTS), t0, end, b, h, planes, strides, scale, scale_strides, zero, zero_strides,
        BITS, WIDTHS, PARTS, D, D_PADDED, GROUPS, PTX,
    )  # fmt: skip
    return new_top, total, shift, acc


@triton.jit(
    do_not_specialize=[
        "q_stride", "line_stride", "first_head", "kv_heads", "all_heads", "new", "rows", "slots", "splits", "lines",
        "valid_stride",
    ]
)  # fmt: skip
def partial_kernel(
    q, q_stride, bias, zero_query, line_stride, columns,
    key_planes, key_plane_strides, key_scale, key_scale_strides, key_zero, key_zero_strides,
    value_planes, value_plane_strides, value_scale, value_scale_strides, value_zero, value_zero_strides,
    start, stop, valid, valid_stride, out, out_lse,
    first_head, kv_heads, all_heads, new, rows, slots, splits, lines,
    CHUNKS: tl.constexpr, M: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_WIDTHS: tl.constexpr, PARTS: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Attention over one split: ``out [splits, lines, D]`` fp32, and ``log2 Σ 2^s`` without the gauge.

    Rows are those of ``kv_heads`` heads from ``first_head`` on. Of all heads, a line for each head's row ``g·S + i``:
    ``q [lines, M]`` fp32, ``bias``, ``zero_query`` ``[lines]``, each with the distance of its lines. ``start``,
    ``stop`` ``[B, S]``. Strides are those of batch and head. Grid: heads, splits, blocks.
    """
    SLOTS: tl.constexpr = PARTS * 16
    UNIT: tl.constexpr = unit(PTX)
    # queries take up to 4 bits of shift, weights up to WIDTHS[0]
    QUERY_TOP: tl.constexpr = 2.0 ** (LARGEST - 4)
    HEADROOM: tl.constexpr = LARGEST - (VALUE_WIDTHS[0] if len(VALUE_WIDTHS) == 2 else 0)
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b = head // kv_heads
    h = head % kv_heads
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    top_line = (b * all_heads + first_head + h) * rows
    line = top_line + row
    live = row < rows
    d = tl.arange(0, D_PADDED)

    # what the rows see, this split's share of it in whole tiles, and the tiles that all rows see whole
    first = tl.maximum(tl.load(start + b * new + row % new, mask=live, other=0), 0).to(tl.int32)
    last = tl.minimum(tl.load(stop + b * new + row % new, mask=live, other=0), slots).to(tl.int32)
    lowest = tl.min(tl.where(first < last, first, slots), 0) // SLOTS * SLOTS
    highest = tl.max(tl.where(first < last, last, 0), 0)
    share = tl.cdiv(tl.cdiv(tl.maximum(highest - lowest, 0), SLOTS), splits) * SLOTS
    begin = lowest + split * share
    end = tl.maximum(tl.minimum(begin + share, highest), begin)
    whole_begin = tl.minimum(tl.maximum(tl.cdiv(tl.max(first, 0), SLOTS) * SLOTS, begin), end)
    whole_end = tl.minimum(tl.min(tl.where(live, last, slots), 0), end) // SLOTS * SLOTS
    whole_end = tl.maximum(whole_end, whole_begin)
    if valid is not None:
        valid += b * valid_stride
        whole_end = whole_begin

    q += top_line * q_stride
    m = tl.arange(0, triton.next_power_of_2(M))
    whole = tl.load(q + m[:, None] + row[None, :] * q_stride, mask=(m < M)[:, None] & live[None, :], other=0.0)
    largest = tl.maximum(tl.max(tl.abs(whole), 0), 1e-30)
    queries = ()
    offset = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(len(CHUNKS)):
        slices, lost = _query_slices(q, q_stride, columns, row, rows, 1.0 / largest * QUERY_TOP, CHUNKS[i][1])
        queries = queries + (slices,)
        offset += lost
        columns += CHUNK * (8 // CHUNKS[i][1])
    slope = largest * (LOG2E / QUERY_TOP)
    offset = tl.load(bias + line * line_stride, mask=live, other=0.0) * LOG2E + offset * slope
    slope = slope / UNIT
    lift = tl.load(zero_query + line * line_stride, mask=live, other=0.0) * LOG2E

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([SLOTS, ROWS], tl.float32)  # Σ 2^(s − M), summed over slots after the last tile
    shift = tl.zeros([SLOTS, ROWS], tl.float32)  # Σ w: where one scale serves a row, what all its values share
    acc = tl.zeros([D_PADDED, ROWS], tl.float32)
    slot = tl.arange(0, SLOTS)

    # tiles that all rows see whole
    soon = whole_begin + slot
    next_sigma = _number(key_scale, key_scale_strides, b, h, soon, soon < whole_end)
    next_a = next_sigma
    if GROUPS == 1:
        next_a = _number(value_scale, value_scale_strides, b, h, soon, soon < whole_end)
    for tile in range(0, (whole_end - whole_begin) // SLOTS):
        t0 = whole_begin + tile * SLOTS
        sigma, a, z = next_sigma, next_a, None
        soon = t0 + SLOTS + slot
        next_sigma = _number(key_scale, key_scale_strides, b, h, soon, soon < whole_end)
        if GROUPS == 1:
            next_a = _number(value_scale, value_scale_strides, b, h, soon, soon < whole_end)
        s = _scores(
            t0, b, h, slot, None, queries, key_planes, key_plane_strides, slope, offset, sigma,
            CHUNKS, SLOTS, ROWS, PTX,
        )  # fmt: skip
        if key_zero is not None:
            s += lift[None, :] * _number(key_zero, key_zero_strides, b, h, t0 + slot, slot >= 0)[:, None]
        if GROUPS == 1 and value_zero is not None:
            z = _number(value_zero, value_zero_strides, b, h, t0 + slot, slot >= 0)
        top, total, shift, acc = _absorb(
            top, total, shift, acc, s, a, z, t0, None, b, h, value_planes, value_plane_strides,
            value_scale, value_scale_strides, value_zero, value_zero_strides,
            HEADROOM, VALUE_BITS, VALUE_WIDTHS, PARTS, D, D_PADDED, GROUPS, PTX,
        )  # fmt: skip

    # the others: at both ends, or all where slots have holes
    before = tl.cdiv(whole_begin - begin, SLOTS)
    for tile in tl.range(0, before + tl.cdiv(end - whole_end, SLOTS), num_stages=1):
        t0 = tl.where(tile < before, begin + tile * SLOTS, whole_end + (tile - before) * SLOTS)
        t = t0 + slot
        here = t < end
        seen = here
        if valid is not None:
            seen = here & (tl.load(valid + t, mask=here, other=0) != 0)
        sigma = _number(key_scale, key_scale_strides, b, h, t, seen)
        a, z = sigma, None
        if GROUPS == 1:
            a = _number(value_scale, value_scale_strides, b, h, t, seen)
            if value_zero is not None:
                z = _number(value_zero, value_zero_strides, b, h, t, seen)
        s = _scores(
            t0, b, h, slot, here, queries, key_planes, key_plane_strides, slope, offset, sigma,
            CHUNKS, SLOTS, ROWS, PTX,
        )  # fmt: skip
        if key_zero is not None:
            s += lift[None, :] * _number(key_zero, key_zero_strides, b, h, t, seen)[:, None]
        s = tl.where((t[:, None] >= first[None, :]) & (t[:, None] < last[None, :]) & seen[:, None], s, float("-inf"))
        top, total, shift, acc = _absorb(
            top, total, shift, acc, s, a, z, t0, end, b, h, value_planes, value_plane_strides,
            value_scale, value_scale_strides, value_zero, value_zero_strides,
            HEADROOM, VALUE_BITS, VALUE_WIDTHS, PARTS, D, D_PADDED, GROUPS, PTX,
        )  # fmt: skip

    if GROUPS == 1:
        of_shift: tl.constexpr = -(2**VALUE_BITS - 1) / 2 if value_zero is None else 1.0
        acc = acc / UNIT + (tl.sum(shift, 0) * of_shift)[None, :]
    mass = tl.sum(total, 0)
    some = tl.where(mass == 0, 1.0, mass)
    line += split.to(tl.int64) * lines
    tl.store(out + d[:, None] + line[None, :] * D, acc / some[None, :], mask=(d < D)[:, None] & live[None, :])
    tl.store(out_lse + line, tl.where(mass == 0, float("-inf"), top + tl.log2(some)), mask=live)


@triton.jit
def _joined_lse(part_lse, line, lines, splits, SPLITS: tl.constexpr):
    """``log2 Σ_i 2^lse_i`` over the splits of one query row; -inf where it sees nothing."""
    top = float("-inf")
    total = 0.0
    for first in range(0, splits, SPLITS):
        i = first + tl.arange(0, SPLITS)
        part = tl.load(part_lse + i.to(tl.int64) * lines + line, mask=i < splits, other=float("-inf"))
        highest = tl.maximum(top, tl.max(part, 0))
        frame = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp2(top - frame) + tl.sum(tl.exp2(part - frame), 0)
        top = highest
    return tl.where(total == 0, float("-inf"), top + tl.log2(tl.where(total == 0, 1.0, total)))


@triton.jit
def _joined(parts, part_lse, lse, line, lines, splits, d, D: tl.constexpr, SPLITS: tl.constexpr):
    """Coordinates ``d`` of ``Σ_i 2^{lse_i − lse} o_i``."""
    o = tl.zeros([d.shape[0]], tl.float32)
    frame = tl.where(lse == float("-inf"), 0.0, lse)
    for first in range(0, splits, SPLITS):
        i = first + tl.arange(0, SPLITS)
        at = i.to(tl.int64) * lines + line
        weight = tl.exp2(tl.load(part_lse + at, mask=i < splits, other=float("-inf")) - frame)
        inside = (i < splits)[:, None] & (d < D)[None, :]
        part = tl.load(parts + at[:, None] * D + d[None, :], mask=inside, other=0.0)
        o += tl.sum(weight[:, None] * part, 0)
    return o


@triton.jit(do_not_specialize=["gauge_stride", "lines", "splits"])
def join_kernel(
    parts, part_lse, gauge, gauge_stride, out, lse, lines, splits,
    D: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """``o = Σ_i 2^{lse_i − lse} o_i`` over splits, ``BLOCK`` coordinates of one query row; ``lse`` in nats, with the
    gauge."""
    line = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    joined = _joined_lse(part_lse, line, lines, splits, SPLITS)
    tl.store(out + line * D + d, _joined(parts, part_lse, joined, line, lines, splits, d, D, SPLITS), mask=d < D)
    if tl.program_id(1) == 0:
        tl.store(lse + line, joined * LN2 + tl.load(gauge + line * gauge_stride))


@triton.jit(do_not_specialize=["gauge_stride", "heads", "group", "new", "lines", "held"])
def finish_kernel(
    parts, part_lse, gauge, gauge_stride, q, k, k_strides, v, v_strides, start, stop,
    read, read_strides, mean, mean_strides, out,
    heads, group, new, lines, splits, held,
    D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One query row: splits joined and taken back by ``o @ readᵀ + mean``, and merged with attention over exact rows.

    ``splits [Hkv]``, of each head. ``q``, ``out`` ``[B, Hq, S, D]`` fp32; ``k``, ``v`` ``[B, Hkv, held, D]``;
    ``read [B, Hkv, D, D]``, ``mean [B, Hkv, D]`` with four and three strides.
    """
    line = tl.program_id(0).to(tl.int64)
    b = line // new // heads
    h = line // new % heads // group
    d = tl.arange(0, D_PADDED)
    splits = tl.load(splits + h)
    joined = _joined_lse(part_lse, line, lines, splits, SPLITS)
    packed_lse = joined + tl.load(gauge + line * gauge_stride) * LOG2E
    packed = tl.zeros([D_PADDED], tl.float32)
    read += b * read_strides[0] + h * read_strides[1]
    for first in tl.static_range(0, D, BLOCK):
        e = first + tl.arange(0, BLOCK)
        inside = (d < D)[:, None] & (e < D)[None, :]
        turn = tl.load(read + d[:, None] * read_strides[2] + e[None, :] * read_strides[3], mask=inside, other=0.0)
        o = _joined(parts, part_lse, joined, line, lines, splits, e, D, SPLITS)
        packed += tl.sum(turn.to(tl.float32) * o[None, :], 1)
    if mean is not None:
        at = mean + b * mean_strides[0] + h * mean_strides[1] + d * mean_strides[2]
        packed += tl.load(at, mask=d < D, other=0.0).to(tl.float32)

    x = tl.load(q + line * D + d, mask=d < D, other=0.0)
    begin = tl.maximum(tl.load(start + b * new + line % new), 0).to(tl.int32)
    end = tl.minimum(tl.load(stop + b * new + line % new), held).to(tl.int32)
    top = float("-inf")
    total = 0.0
    exact = tl.zeros([D_PADDED], tl.float32)
    for t0 in range(begin, end, TILE):
        t = t0 + tl.arange(0, TILE)
        here = (t < end)[:, None] & (d < D)[None, :]
        address = t.to(tl.int64)[:, None] * D + d[None, :]
        key = tl.load(_head(k, k_strides, b, h, address), mask=here, other=0.0).to(tl.float32)
        value = tl.load(_head(v, v_strides, b, h, address), mask=here, other=0.0).to(tl.float32)
        s = tl.where(t < end, tl.sum(key * x[None, :], 1) * LOG2E, float("-inf"))
        highest = tl.maximum(top, tl.max(s, 0))
        decay = tl.exp2(top - highest)
        w = tl.exp2(s - highest)
        exact = exact * decay + tl.sum(w[:, None] * value, 0)
        total = total * decay + tl.sum(w, 0)
        top = highest
    some = tl.where(total == 0, 1.0, total)
    exact_lse = tl.where(total == 0, float("-inf"), top + tl.log2(some))

    highest = tl.maximum(packed_lse, exact_lse)
    frame = tl.where(highest == float("-inf"), 0.0, highest)
    of_packed, of_exact = tl.exp2(packed_lse - frame), tl.exp2(exact_lse - frame)
    both = tl.where(highest == float("-inf"), 1.0, of_packed + of_exact)
    tl.store(out + line * D + d, (packed * of_packed + exact * (of_exact / some)) / both, mask=d < D)


def backend() -> str:
    """What a launch compiles for: "cuda", "hip" or Triton's "interpreter"."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    return str(triton.runtime.driver.active.get_current_target().backend)


@functools.lru_cache(maxsize=256)
def specialization(
    bits: tuple[int, ...], value_bits: int, head_dim: int, groups: int, rows: int, backend: str
) -> dict[str, Any]:
    """What :func:`partial_kernel` is compiled for: layouts, head size and query rows, not lengths or strides.

    A program takes 8 query rows, or 16 where the queries' fp16 columns leave registers for them, and on AMD always:
    its matrix instructions have no narrower form.
    """
    widths, chunks = PIECES[value_bits], key_chunks(bits)
    columns = sum(CHUNK_BYTES * (8 // width) for _, width, *_ in chunks)
    return {
        "CHUNKS": chunks,
        "M": len(bits),
        "VALUE_BITS": value_bits,
        "VALUE_WIDTHS": widths,
        "PARTS": 8 // min(widths),
        "D": head_dim,
        "D_PADDED": triton.next_power_of_2(head_dim),
        "GROUPS": groups,
        "ROWS": 16 if backend == "hip" or (rows > 8 and columns <= 192) else 8,
        "PTX": backend == "cuda",
    }


class Run(NamedTuple):
    """Packed rows of neighbouring KV heads of the same bits, from the head ``first`` on."""

    first: int
    key_planes: Sequence[Tensor]
    key_bits: Sequence[int]
    key_scale: Tensor
    key_zero: Tensor | None
    value_planes: Sequence[Tensor]
    value_bits: int
    value_scale: Tensor
    value_zero: Tensor | None


def decode_attention(
    q: Tensor, bias: Tensor, zero_query: Tensor, gauge: Tensor, run: Run,
    start: Tensor, stop: Tensor, valid: Tensor | None, splits: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`headq_ao.ops.decode_attention` for fp32 queries over packed keys and packed values.

    ``splits`` cuts the visible slots for more programs; None chooses it from the store's length and the device.
    """
    batch, heads, new, _ = q.shape
    head_dim, lines = run.value_planes[0].shape[3] * 16, batch * heads * new
    out, lse = q.new_empty(batch, heads, new, head_dim), q.new_empty(batch, heads, new)
    if not lines:
        return out, lse
    with torch.cuda.device_of(q):
        parts, part_lse, (splits,) = partial_attention(q, bias, zero_query, [run], start, stop, valid, splits)
        join_kernel[(lines, triton.cdiv(head_dim, BLOCK))](
            parts, part_lse, *_rows(gauge), out, lse, lines, splits,
            D=head_dim, BLOCK=BLOCK, SPLITS=JOINED, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def attend(
    q: Tensor, bias: Tensor, zero_query: Tensor, gauge: Tensor, runs: Sequence[Run],
    start: Tensor, stop: Tensor, valid: Tensor | None, exact: ExactRows, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """:func:`headq_ao.ops.attend_runs` for fp32 queries: a launch for each run, and one that joins all."""
    batch, heads, new, head_dim = exact.q.shape
    kv_heads, lines = exact.k.shape[1], batch * heads * new
    out = q.new_empty(batch, heads, new, head_dim)
    if not lines:
        return out
    padded = triton.next_power_of_2(head_dim)
    k, v, read = _dense(exact.k), _dense(exact.v), exact.read.expand(batch, kv_heads, -1, -1)
    mean = None if exact.mean is None else exact.mean.expand(batch, kv_heads, -1)
    with torch.cuda.device_of(q):
        parts, part_lse, of_runs = partial_attention(q, bias, zero_query, runs, start, stop, valid, splits)
        of_heads = tuple(n for run, n in zip(runs, of_runs, strict=True) for _ in range(run.key_scale.shape[1]))
        finish_kernel[(lines,)](
            parts, part_lse, *_rows(gauge), exact.q.contiguous(), k, k.stride()[:2], v, v.stride()[:2],
            exact.start.contiguous(), exact.stop.contiguous(),
            read, read.stride(), mean, None if mean is None else mean.stride(), out,
            heads, heads // kv_heads, new, lines, numbers_on(of_heads, torch.int32, q.device), k.shape[2],
            D=head_dim, D_PADDED=padded, BLOCK=BLOCK, TILE=min(JOINED, 8192 // padded), SPLITS=JOINED,
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def partial_attention(
    q: Tensor, bias: Tensor, zero_query: Tensor, runs: Sequence[Run],
    start: Tensor, stop: Tensor, valid: Tensor | None, splits: int | None = None,
) -> tuple[Tensor, Tensor, list[int]]:  # fmt: skip
    """What :func:`partial_kernel` writes, ``[splits, B·Hq·S, D]`` and ``[splits, B·Hq·S]``, and the splits of each
    run."""
    batch, heads, new, _ = q.shape
    all_heads, slots = sum(run.key_scale.shape[1] for run in runs), runs[0].key_scale.shape[2]
    head_dim, rows, lines = runs[0].value_planes[0].shape[3] * 16, heads // all_heads * new, batch * heads * new
    (q, q_stride), (bias, line_stride), (zero_query, other) = (_rows(x) for x in (q, bias, zero_query))
    if line_stride != other:
        bias, zero_query, line_stride = bias.contiguous(), zero_query.contiguous(), 1
    start, stop = start.contiguous(), stop.contiguous()
    mask = None if valid is None else (valid if valid.stride(1) == 1 else valid.contiguous()).view(torch.uint8)
    target, launches, of_runs = backend(), [], []
    for run in runs:
        kv_heads = run.key_scale.shape[1]
        constants = specialization(
            tuple(run.key_bits), run.value_bits, head_dim, run.value_scale.shape[3], rows, target
        )
        options, held = launch(head_dim, run.value_bits, target)
        blocks = triton.cdiv(rows, constants["ROWS"])
        of_runs.append(splits or split_count(slots, batch * kv_heads * blocks, held, q.device))
        launches.append(((batch * kv_heads, of_runs[-1], blocks), constants | options))
    parts, part_lse = q.new_empty(max(of_runs), lines, head_dim), q.new_empty(max(of_runs), lines)
    for run, n, (grid, options) in zip(runs, of_runs, launches, strict=True):
        keys, values = (tuple(_dense(p) for p in planes) for planes in (run.key_planes, run.value_planes))
        partial_kernel[grid](
            q, q_stride, bias, zero_query, line_stride, query_columns(tuple(run.key_bits), q.device),
            keys, tuple(p.stride()[:2] for p in keys), *_strided(run.key_scale), *_strided(run.key_zero),
            values, tuple(p.stride()[:2] for p in values), *_strided(run.value_scale), *_strided(run.value_zero),
            start, stop, mask, 0 if mask is None else mask.stride(0), parts, part_lse,
            run.first, run.key_scale.shape[1], all_heads, new, rows, slots, n, lines, **options,
        )  # fmt: skip
    return parts, part_lse, of_runs


@functools.lru_cache(maxsize=256)
def launch(head_dim: int, value_bits: int, backend: str) -> tuple[dict[str, Any], int]:
    """Options of :func:`partial_kernel`'s launch, and how many of its programs a processor holds at a time at least.

    One warp a program where its registers suffice, for it waits for no other; on CUDA threads make do with as many as
    65536 leave to each of the warps that are held.
    """
    planes = len(PIECES[value_bits])
    warps = (2 if head_dim > 128 or planes == 2 else 1) * (2 if backend == "hip" else 1)
    held = 8 if planes == 2 or 64 < head_dim <= 128 else 10
    options: dict[str, Any] = {"num_warps": warps, "num_stages": STAGES[backend], "enable_fp_fusion": True}
    if backend == "cuda":
        options["maxnreg"] = min(65536 // (32 * held) // 8 * 8, 255)
    return options, held // warps


def split_count(slots: int, programs: int, held: int, device: torch.device) -> int:
    """Splits with which the programs just fill the device, all at once: a second round would wait for the first."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(processors * held // max(programs, 1), slots // LEAST_SLOTS, MOST_SPLITS))


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """Rows ``[B, Hq, S, ...]`` of which each lies equally far behind the one before, and how far."""
    shape, stride = (x.shape, x.stride()) if x.ndim == 4 else ((*x.shape, 1), (*x.stride(), 1))
    row = row_stride(shape, stride)
    return (x.contiguous(), shape[3]) if row is None else (x, row)


def _strided(x: Tensor | None) -> tuple[Tensor | None, tuple[int, ...] | None]:
    """A scale and its strides of batch and head."""
    if x is None:
        return None, None
    x = _dense(x)
    return x, x.stride()[:2]


def _dense(x: Tensor) -> Tensor:
    """Rows of one head packed; batch and heads may have any stride."""
    apart = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size != 1 and stride != apart:
            return x.contiguous()
        apart *= size
    return x
