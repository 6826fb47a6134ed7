"""The Triton kernel behind ``decode_attention`` on CUDA and HIP: split-KV flash-decoding over packed rows.

One program owns one KV head of one sequence, one block of its ``G·S`` query rows and one split of the visible slots; a
second kernel joins the splits by log-sum-exp. A tile is ``PARTS`` parts of 16 slots: part ``j`` holds
the slots ``t0 + (r // 4)·4·PARTS + 4j + r % 4``, those whose value codes lie at one bit position of the value bytes
``[R, D]``. So every plane byte is loaded once, every piece is a constant shift and mask away, and each feeds one
``tl.dot`` with fp16 operands and fp32 sums:

- scores, ``s_j = σ_j (Σ_pieces q_piece · (c_piece − c0) + b + q·c0) + m_j h``, the query scaled to at most 1 by row;
- readout, ``Σ_j w_j (c_j − c0)`` with ``w_j = 2^{s_j − M} a_j``, ``a_j`` the values' scale.

``c0 = (2^width − 1)/2``, so ``c − c0`` is exact in fp16. ``M`` is the running maximum of ``s_j + log2 a_j − 14``:
weights lie in [0, 2^14], and fp16's normal numbers reach down to 4e-9 of the largest.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from headq_ao.ops.layout import PIECES, plane_columns, plane_pieces

R = tl.constexpr(16)  # slots of one part
MOST_SPLITS, LEAST_SLOTS = 128, 512  # of a split
LAUNCH = {"num_warps": 2, "enable_fp_fusion": True}
STAGES = {"cuda": 2, "hip": 1, "interpreter": 1}
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
HEADROOM = tl.constexpr(14.0)  # the largest weight is 2**14 in fp16
SMALLEST, LARGEST = tl.constexpr(2.0**-24), tl.constexpr(65504.0)  # positive fp16


@functools.lru_cache(maxsize=256)
def key_chunks(bits: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Key planes cut to dot widths: ``(plane, width, first byte, bytes, padded bytes, bytes of a whole row)``.

    Example:
        >>> key_chunks((2,) * 144)  # 36 bytes a row: 32, then 4 of 16
        ((0, 2, 0, 32, 32, 36), (0, 2, 32, 4, 16, 36))
    """
    chunks = []
    for plane, (width, pieces) in enumerate(plane_pieces(bits).items()):
        first, total = 0, plane_columns(width, len(pieces)) * width // 8
        while first < total:
            padded = next(w for w in (64, 32, 16) if w <= max(total - first, 16))
            chunks.append((plane, width, first, min(total - first, padded), padded, total))
            first += padded
    return tuple(chunks)


@functools.lru_cache(maxsize=256)
def query_columns(bits: tuple[int, ...], device: torch.device) -> Tensor:
    """For each (chunk, piece, byte): ``coordinate | shift << 16`` of the query's column, −1 for padding; int32."""
    columns: list[int] = []
    planes = list(plane_pieces(bits).items())
    for plane, width, first, _, padded, _ in key_chunks(bits):
        pieces = planes[plane][1]
        for p in range(8 // width):
            for byte in range(first, first + padded):
                index = byte // 4 * (32 // width) + p * 4 + byte % 4
                columns.append(pieces[index][0] | pieces[index][1] << 16 if index < len(pieces) else -1)
    return torch.tensor(columns, dtype=torch.int32).to(device)


@triton.constexpr_function
def spread_ptx(at, width):
    """PTX from four plane bytes to four halves ``1024 + code·2^at``: the code in the mantissa, two to an instruction.

    A piece at bit 0 is read as if at bit 1.
    """
    up = "shl.b32 lo, lo, 1; shl.b32 hi, hi, 1;" if at == 0 else ""
    mask = (2**width - 1) << max(at, 1)
    code = f"0x{mask | mask << 16:08x}, 0x64006400, 0xEA;"  # lo & mask | the exponent of 1024
    return (
        f"{{ .reg .b32 lo, hi; prmt.b32 lo, $2, 0, 0x4140; prmt.b32 hi, $2, 0, 0x4342; {up}"
        f" lop3.b32 $0, lo, {code} lop3.b32 $1, hi, {code} }}"
    )


@triton.jit
def _unpack(byte, AT: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, PTX: tl.constexpr):
    """``(code − c0)·UNIT`` in fp16 (exact) of the piece at bit ``AT`` of each byte."""
    CENTER: tl.constexpr = (2**WIDTH - 1) / 2
    if PTX:
        STEP: tl.constexpr = 2.0 ** -(AT if AT > 0 else 1)
        code = tl.inline_asm_elementwise(
            spread_ptx(AT, WIDTH), "=r,=r,r", [byte], dtype=tl.float16, is_pure=True, pack=4
        )
        return code * (STEP * UNIT) - (1024 * STEP + CENTER) * UNIT
    return (((byte >> AT) & (2**WIDTH - 1)).to(tl.float16) - CENTER) * UNIT


@triton.jit
def _query_slices(q, columns, row, rows, largest, WIDTH: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr):
    """One chunk's query slices, fp16 ``[PADDED, ROWS]`` for each piece, and its part of ``q·c0``, ``[ROWS]``."""
    slices = ()
    center = tl.zeros_like(largest)
    for p in tl.static_range(8 // WIDTH):
        column = tl.load(columns + p * PADDED + tl.arange(0, PADDED))
        mask = (column >= 0)[:, None] & (row < rows)[None, :]
        x = tl.load(q + (column & 0xFFFF)[:, None] + row[None, :] * M, mask=mask, other=0.0) / largest[None, :]
        x = (x * (1 << ((column >> 16) & 7)).to(tl.float32)[:, None]).to(tl.float16)
        center += tl.sum(x.to(tl.float32), 0) * ((2**WIDTH - 1) / 2)
        slices = slices + (x,)
    return slices, center


@triton.jit
def _add_chunk(s, slices, base, local, inside, CHUNK: tl.constexpr, PTX: tl.constexpr):
    """``s [R, ROWS]`` and one chunk's part of ``Σ q·(c − c0)`` for the slots ``base + local``."""
    WIDTH: tl.constexpr = CHUNK[1]
    c = tl.arange(0, CHUNK[4])
    address = (local // 16 * (CHUNK[5] * 16) + local % 16 * 4)[:, None] + (c // 4 * 64 + c % 4)[None, :]
    byte = tl.load(base + CHUNK[2] * 16 + address, mask=inside[:, None] & (c < CHUNK[3])[None, :], other=0)
    for p in tl.static_range(8 // WIDTH):
        s = tl.dot(_unpack(byte, p * WIDTH, WIDTH, 1, PTX), slices[p], s)
    return s


@triton.jit
def _halves(parts):
    """Every tensor ``[2n, ROWS]`` as two ``[n, ROWS]``."""
    halves = ()
    for i in tl.static_range(len(parts)):
        x = tl.reshape(parts[i], [2, parts[i].shape[0] // 2, parts[i].shape[1]])
        halves = halves + tl.split(tl.permute(x, [1, 2, 0]))
    return halves


@triton.jit
def _value_codes(entries, j: tl.constexpr, WIDTHS: tl.constexpr, PARTS: tl.constexpr, PTX: tl.constexpr):
    """``c − c0`` of part ``j`` by planes, fp16 ``[D, R]``: their sum is the code's."""
    codes = ()
    for i in tl.static_range(len(WIDTHS)):
        byte = entries[(PARTS * WIDTHS[0] * i + j * WIDTHS[i]) // 8]
        codes = codes + (_unpack(byte, j * WIDTHS[i] % 8, WIDTHS[i], 2 ** (WIDTHS[0] * i), PTX),)
    return codes


@triton.jit
def _head(x, strides, b, h, offset):
    """Where a head's rows begin, and ``offset`` from there."""
    return x + b * strides[0] + h * strides[1] + offset


@triton.jit
def _number(x, strides, b, h, t, here):
    """The number that each slot has, fp32; 0 where it is not ``here``."""
    return tl.load(_head(x, strides, b, h, t.to(tl.int64)), mask=here, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["kv_heads", "new", "rows", "slots", "splits", "valid_stride"])
def partial_kernel(
    q, bias, zero_query, columns,
    key_planes, key_plane_strides, key_scale, key_scale_strides, key_zero, key_zero_strides,
    value_planes, value_plane_strides, value_scale, value_scale_strides, value_zero, value_zero_strides,
    start, stop, valid, valid_stride, out, out_lse,
    kv_heads, new, rows, slots, splits,
    CHUNKS: tl.constexpr, M: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_WIDTHS: tl.constexpr, PARTS: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Attention over one split: ``out [splits, B·Hkv·rows, D]`` fp32, and ``log2 Σ 2^s`` without the gauge.

    ``q [B·Hkv, rows, M]`` fp32; ``bias``, ``zero_query`` ``[B·Hkv, rows]``, row ``g·S + i``; ``start``, ``stop``
    ``[B, S]``. Strides are those of batch and head. Grid: heads, splits, blocks.
    """
    SLOTS: tl.constexpr = PARTS * R
    LEVELS: tl.constexpr = 1 if PARTS == 2 else 2 if PARTS == 4 else 3
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b = head // kv_heads
    h = head % kv_heads
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    line = head * rows + row
    live = row < rows
    r = tl.arange(0, R)
    d = tl.arange(0, D_PADDED)

    # what the rows see, and this split's share of it in whole tiles
    first = tl.maximum(tl.load(start + b * new + row % new, mask=live, other=0), 0).to(tl.int32)
    last = tl.minimum(tl.load(stop + b * new + row % new, mask=live, other=0), slots).to(tl.int32)
    lowest = tl.min(tl.where(first < last, first, slots), 0) // SLOTS * SLOTS
    highest = tl.max(tl.where(first < last, last, 0), 0)
    share = tl.cdiv(tl.cdiv(tl.maximum(highest - lowest, 0), SLOTS), splits) * SLOTS
    begin = lowest + split * share
    end = tl.minimum(begin + share, highest)

    q += head * rows * M
    m = tl.arange(0, triton.next_power_of_2(M))
    whole = tl.load(q + m[:, None] + row[None, :] * M, mask=(m < M)[:, None] & live[None, :], other=0.0)
    largest = tl.maximum(tl.max(tl.abs(whole), 0), 1e-30)
    queries = ()
    offset = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(len(CHUNKS)):
        slices, center = _query_slices(q, columns, row, rows, largest, CHUNKS[i][1], CHUNKS[i][4], M)
        queries = queries + (slices,)
        offset += center
        columns += CHUNKS[i][4] * (8 // CHUNKS[i][1])
    slope = largest * LOG2E
    offset = tl.load(bias + line, mask=live, other=0.0) * LOG2E + offset * slope
    lift = tl.load(zero_query + line, mask=live, other=0.0) * LOG2E
    if valid is not None:
        valid += b * valid_stride

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([SLOTS, ROWS], tl.float32)  # summed over slots after the last tile
    zeros = tl.zeros([SLOTS, ROWS], tl.float32)  # Σ w · (value at c0), where one zero serves a row
    acc = tl.zeros([D_PADDED, ROWS], tl.float32)
    x = tl.arange(0, SLOTS)
    local = x % R // 4 * (4 * PARTS) + x // R * 4 + x % 4
    for tile in range(0, tl.cdiv(end - begin, SLOTS)):
        t0 = begin + tile * SLOTS
        t64 = t0.to(tl.int64)
        t = t0 + local
        here = t < end
        s = tl.zeros([SLOTS, ROWS], tl.float32)
        for i in tl.static_range(len(CHUNKS)):
            strides = key_plane_strides[CHUNKS[i][0]]
            base = _head(key_planes[CHUNKS[i][0]], strides, b, h, t64 * CHUNKS[i][5])
            s = _add_chunk(s, queries[i], base, local, here, CHUNKS[i], PTX)
        if valid is not None:
            here = here & (tl.load(valid + t, mask=here, other=0) != 0)
        sigma = _number(key_scale, key_scale_strides, b, h, t, here)
        s = (s * slope[None, :] + offset[None, :]) * sigma[:, None]
        if key_zero is not None:
            s += lift[None, :] * _number(key_zero, key_zero_strides, b, h, t, here)[:, None]
        s = tl.where((t[:, None] >= first[None, :]) & (t[:, None] < last[None, :]) & here[:, None], s, float("-inf"))
        weighted = s
        if GROUPS == 1:
            a = _number(value_scale, value_scale_strides, b, h, t, here)
            weighted = s + tl.log2(tl.minimum(tl.maximum(tl.abs(a), SMALLEST), LARGEST))[:, None]

        new_top = tl.maximum(top, tl.max(weighted, 0) - HEADROOM)
        frame = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay = tl.exp2(top - frame)[None, :]
        top = new_top
        w = tl.exp2(s - frame[None, :])
        total = total * decay + w
        acc *= decay
        if GROUPS == 1:
            if value_zero is not None:
                z = _number(value_zero, value_zero_strides, b, h, t, here) + a * ((2**VALUE_BITS - 1) / 2)
                zeros = zeros * decay + tl.where(w == 0, 0.0, w * z[:, None])
            w = tl.where(w == 0, 0.0, w * a[:, None])  # an unseen slot may hold any scale
        weights = (w.to(tl.float16),)
        for _ in tl.static_range(LEVELS):
            weights = _halves(weights)

        entries = ()
        for i in tl.static_range(len(VALUE_WIDTHS)):
            base = _head(value_planes[i], value_plane_strides[i], b, h, t64 * (D * VALUE_WIDTHS[i] // 8))
            for e in tl.static_range(PARTS * VALUE_WIDTHS[i] // 8):
                entry = r // 4 * (PARTS * VALUE_WIDTHS[i] // 8) + e
                inside = (d < D)[:, None] & (t0 + entry * (32 // VALUE_WIDTHS[i]) < end)[None, :]
                address = (d * 4)[:, None] + (entry * (D * 4) + r % 4)[None, :]
                entries = entries + (tl.load(base + address, mask=inside, other=0),)
        for j in tl.static_range(PARTS):
            codes = _value_codes(entries, j, VALUE_WIDTHS, PARTS, PTX)
            if GROUPS > 1:
                slot = t0 + r // 4 * (4 * PARTS) + 4 * j + r % 4
                inside = (d < D)[:, None] & ((slot < end) & (tl.max(weights[j], 1) != 0))[None, :]
                group = (d // (D // GROUPS))[:, None] + slot[None, :] * GROUPS
                a = _number(value_scale, value_scale_strides, b, h, group, inside)
                v = (codes[0] if len(codes) == 1 else codes[0] + codes[1]) * a.to(tl.float16)
                if value_zero is not None:
                    z = _number(value_zero, value_zero_strides, b, h, group, inside) + a * ((2**VALUE_BITS - 1) / 2)
                    v += z.to(tl.float16)
                codes = (v,)
            for i in tl.static_range(len(codes)):
                acc = tl.dot(codes[i], weights[j], acc)

    mass = tl.sum(total, 0)
    some = tl.where(mass == 0, 1.0, mass)
    acc = (acc + tl.sum(zeros, 0)[None, :]) / some[None, :]
    line += split.to(tl.int64) * tl.num_programs(0) * rows
    tl.store(out + d[:, None] + line[None, :] * D, acc, mask=(d < D)[:, None] & live[None, :])
    tl.store(out_lse + line, tl.where(mass == 0, float("-inf"), top + tl.log2(some)), mask=live)


@triton.jit(do_not_specialize=["lines", "splits"])
def join_kernel(parts, part_lse, gauge, out, lse, lines, splits, D: tl.constexpr, D_PADDED: tl.constexpr):
    """One query row: ``o = Σ_i 2^{lse_i − lse} o_i`` over splits; ``lse`` in nats, with the gauge."""
    line = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D_PADDED)
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([D_PADDED], tl.float32)
    for first in range(0, splits, 16):
        i = first + tl.arange(0, 16).to(tl.int64)
        part = tl.load(part_lse + i * lines + line, mask=i < splits, other=float("-inf"))
        highest = tl.maximum(top, tl.max(part, 0))
        frame = tl.where(highest == float("-inf"), 0.0, highest)
        decay = tl.exp2(top - frame)
        weight = tl.exp2(part - frame)
        inside = (i < splits)[:, None] & (d < D)[None, :]
        o = tl.load(parts + (i * lines + line)[:, None] * D + d[None, :], mask=inside, other=0.0)
        acc = acc * decay + tl.sum(weight[:, None] * o, 0)
        total = total * decay + tl.sum(weight, 0)
        top = highest
    some = tl.where(total == 0, 1.0, total)
    tl.store(out + line * D + d, acc / some, mask=d < D)
    nats = (top + tl.log2(some)) * LN2 + tl.load(gauge + line)
    tl.store(lse + line, tl.where(total == 0, float("-inf"), nats))


def backend() -> str:
    """What a launch compiles for: "cuda", "hip" or Triton's "interpreter"."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    return str(triton.runtime.driver.active.get_current_target().backend)


def specialization(
    bits: tuple[int, ...], value_bits: int, head_dim: int, groups: int, rows: int, backend: str
) -> dict[str, Any]:
    """What :func:`partial_kernel` is compiled for: layouts, head size and query rows, not lengths or strides.

    A program takes 8 query rows, or 16 where the queries' fp16 columns leave registers for them, and on AMD always:
    its matrix instructions have no narrower form.
    """
    widths, chunks = PIECES[value_bits], key_chunks(bits)
    columns = sum(padded * (8 // width) for _, width, _, _, padded, _ in chunks)
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


def decode_attention(
    q: Tensor, bias: Tensor, zero_query: Tensor, gauge: Tensor,
    key_planes: Sequence[Tensor], key_bits: Sequence[int], key_scale: Tensor, key_zero: Tensor | None,
    value_planes: Sequence[Tensor], value_bits: int, value_scale: Tensor, value_zero: Tensor | None,
    start: Tensor, stop: Tensor, valid: Tensor | None, splits: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`headq_ao.ops.decode_attention` for fp32 queries over packed keys and packed values.

    ``splits`` cuts the visible slots for more programs; None chooses it from the store's length and the device.
    """
    batch, heads, new, _ = q.shape
    kv_heads, slots = key_scale.shape[1:]
    head_dim, rows, lines = value_planes[0].shape[3] * 16, heads // kv_heads * new, batch * heads * new
    target = backend()
    constants = specialization(tuple(key_bits), value_bits, head_dim, value_scale.shape[3], rows, target)
    blocks = triton.cdiv(rows, constants["ROWS"])
    splits = splits or split_count(slots, batch * kv_heads * blocks, q.device)
    q, bias, zero_query, gauge, start, stop = (x.contiguous() for x in (q, bias, zero_query, gauge, start, stop))
    keys, values = (tuple(_dense(p) for p in planes) for planes in (key_planes, value_planes))
    mask = None if valid is None else (valid if valid.stride(1) == 1 else valid.contiguous()).view(torch.uint8)
    parts, part_lse = q.new_empty(splits, lines, head_dim), q.new_empty(splits, lines)
    out, lse = q.new_empty(batch, heads, new, head_dim), q.new_empty(batch, heads, new)
    if not lines:
        return out, lse
    with torch.cuda.device_of(q):
        partial_kernel[(batch * kv_heads, splits, blocks)](
            q, bias, zero_query, query_columns(tuple(key_bits), q.device),
            keys, tuple(p.stride()[:2] for p in keys), *_strided(key_scale), *_strided(key_zero),
            values, tuple(p.stride()[:2] for p in values), *_strided(value_scale), *_strided(value_zero),
            start, stop, mask, 0 if mask is None else mask.stride(0), parts, part_lse,
            kv_heads, new, rows, slots, splits, **constants, **LAUNCH, num_stages=STAGES[target],
        )  # fmt: skip
        constants = {name: constants[name] for name in ("D", "D_PADDED")}
        join_kernel[(lines,)](parts, part_lse, gauge, out, lse, lines, splits, **constants, **LAUNCH)
    return out, lse


def split_count(slots: int, programs: int, device: torch.device) -> int:
    """Splits that give every multiprocessor about eight programs."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = triton.cdiv(8 * processors, max(programs, 1))
    return max(1, min(wanted, slots // LEAST_SLOTS, MOST_SPLITS))


def _strided(x: Tensor | None) -> tuple[Tensor | None, tuple[int, ...] | None]:
    """A scale and its strides of batch and head."""
    if x is None:
        return None, None
    x = _dense(x)
    return x, x.stride()[:2]


def _dense(x: Tensor) -> Tensor:
    """Rows of one head packed; batch and heads may have any stride."""
    return x if not x.numel() or x[0, 0].is_contiguous() else x.contiguous()
