"""Codes in Triton: how a tile of packed tokens becomes the operands of matrix products.

A tile is ``16·PARTS`` tokens; part ``j`` of it holds the tokens ``t0 + (r // 4)·4·PARTS + 4j + r % 4``, those whose
value codes lie at one bit position of the value bytes ``[16, D]``. So every plane byte is loaded once and every piece
is a constant mask away: left where it lies, at bit ``at`` of its byte, it counts ``2^at`` times its code, which the
other factor of the product makes up for. On CUDA it is not even converted: a byte in the low bits of an fp16 is the
subnormal number ``2^-24`` times it, and matrix instructions multiply those exactly.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from headq_ao.ops.layout import plane_columns, plane_pieces
from headq_ao.ops.rounding import scale_of_byte

CHUNK_BYTES = 16  # of a key, loaded together: with 8 tokens side by side they fill whole sectors
CHUNK = tl.constexpr(CHUNK_BYTES)
# of a scale in a byte, the fp32 bits of that of byte 0; the byte goes to bit 18 and on
FIRST_BYTE = tl.constexpr(int(scale_of_byte(torch.zeros(1, dtype=torch.uint8, device="cpu")).float().view(torch.int32)))


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
    return torch.tensor(columns, dtype=torch.int32, device="cpu").to(device)


@triton.constexpr_function
def spread_ptx(mask):
    """PTX from four plane bytes to the masked bits of each in the low bits of a half, two to a register."""
    return (
        "{ .reg .b32 lo, hi; prmt.b32 lo, $2, 0, 0x4140; prmt.b32 hi, $2, 0, 0x4342;"
        f" and.b32 $0, lo, 0x{mask | mask << 16:08x}; and.b32 $1, hi, 0x{mask | mask << 16:08x}; }}"
    )


@triton.jit
def piece(byte, AT: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr):
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
def query_slices(q, q_stride, columns, row, live, scale, WIDTH: tl.constexpr):
    """One chunk's query slices, fp16 ``[CHUNK, ROWS]`` for each piece: the query by ``scale`` and ``2^-AT``.

    And what their rounding takes from ``q·c0`` by that scale, ``[ROWS]``.
    """
    slices = ()
    lost = tl.zeros_like(scale)
    for p in tl.static_range(8 // WIDTH):
        column = tl.load(columns + p * CHUNK + tl.arange(0, CHUNK))
        mask = (column >= 0)[:, None] & live[None, :]
        x = tl.load(q + (column & 0xFFFF)[:, None] + row[None, :] * q_stride, mask=mask, other=0.0) * scale[None, :]
        x *= (1 << ((column >> 16) & 7)).to(tl.float32)[:, None]
        rounded = (x * (2.0 ** (-p * WIDTH))).to(tl.float16)
        lost += tl.sum(x - rounded.to(tl.float32) * (2.0 ** (p * WIDTH)), 0) * ((2**WIDTH - 1) / 2)
        slices = slices + (rounded,)
    return slices, lost


@triton.jit
def parts(w, PARTS: tl.constexpr):
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
def log2(x):
    """``log2 |x|``, up to 0.09 too small, of at least 2^-24: exponent and mantissa of an fp32, read as one number."""
    return tl.maximum(tl.abs(x), 2.0**-24).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-23 - 127.0
