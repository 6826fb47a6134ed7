"""The Triton kernels of a decoding step's ``cache_update``: two launches, whatever bits the heads have.

One program of a single warp codes one token of one side of one head at one of the scales, since what counts is how
long a token takes: there are as many programs as a device has processors. Each descends from its scale, for none
knows yet whether it is one of the best. The recursion over coordinates is that
of :mod:`headq_ao.ops.error_feedback.triton_kernel`, in scalars. The second launch puts the best of the codes into the
pages, and the call's tokens into the window: nothing reads the window then.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from headq_ao.ops.cache_update import triton_matrices
from headq_ao.ops.cache_update.encoders import frame_of, unflatten
from headq_ao.ops.cache_update.triton_pages import (
    append_to_pages,
    append_token,
    key_byte,
    page_of,
    put_number,
    put_value_piece,
    window_page,
)
from headq_ao.ops.error_feedback.reference import KEPT, SPREADS
from headq_ao.ops.error_feedback.triton_kernel import INTEGER, LEAST_BYTE, stored_byte, stored_half
from headq_ao.ops.page_layout import PageLayout
from headq_ao.ops.paged_attention.triton_codes import CHUNK
from headq_ao.ops.paged_attention.triton_heads import FIELDS, all_query_columns, form, head_table, kinds, sides
from headq_ao.ops.types import PagedKV, SegmentFrame

MOST = 16  # tokens that leave at once; more are coded in bulk
BLOCK, _FIELDS = tl.constexpr(triton_matrices.BLOCK), tl.constexpr(FIELDS)
_SPREADS, _KEPT = tl.constexpr(len(SPREADS)), tl.constexpr(KEPT)
_FOUND = tl.constexpr(3)  # of one scale: what is stored, the error, the error of elimination
_UNIT, _FACTOR, _TOP, _SWEEPS, _UNBIASED, _WIDTH, _BYTE_SCALE, _FIRST_SPREAD = (
    tl.constexpr(getattr(triton_matrices, name))
    for name in ("UNIT", "FACTOR", "TOP", "SWEEPS", "UNBIASED", "WIDTH", "BYTE_SCALE", "FIRST_SPREAD")
)


@triton.jit
def _stored(x, in_byte):
    """``x`` as a scale that is stored, in a byte or in fp16."""
    return tl.where(in_byte > 0, stored_byte(x), stored_half(x))


@triton.jit
def _token(window, window_strides, owned, new, new_strides, b, h, j, number, slot, ring, in_ring):
    """Where a token that leaves lies: in the window, or among the call's own."""
    if in_ring:
        page = window_page(owned, b, j, ring)
        x = window + page * window_strides[0] + h * window_strides[1] + slot * window_strides[2]
    else:
        x = new + b * new_strides[0] + h * new_strides[1] + number * new_strides[2]
    return x


@triton.jit
def _prefetch(start, SIZE: tl.constexpr, PTX: tl.constexpr):
    """Ask for ``SIZE`` numbers, to have them in L2 when they are read."""
    if PTX:
        line = tl.arange(0, 32)
        for i in range(0, SIZE // 32, 32):
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [start + tl.minimum(i + line, SIZE // 32 - 1) * 32],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip


@triton.jit
def _transformed(x, dim, row, angles, partner, rotated, PARTS: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    """``y = (x / unit − mean) @ encode``, ``[M]``; the first ``rotated`` coordinates of ``x`` in the
    frame of its segment."""
    ROWS: tl.constexpr = min(D, 2048 // M)
    d, m = tl.arange(0, ROWS), tl.arange(0, M)
    unit = tl.load(row + _UNIT)
    encode = row + PARTS[4] + d[:, None] * M + m[None, :]
    total, tile = tl.zeros([ROWS, M], tl.float32), tl.load(encode)
    for first in range(0, D, ROWS):
        following = tl.load(encode + tl.minimum(first + ROWS, D - ROWS) * M)
        token = tl.load(x + first + d, mask=first + d < dim, other=0.0).to(tl.float32)
        if angles is not None:
            here = first + d < rotated
            other = tl.load(partner + first + d, mask=here, other=0)
            own = tl.load(angles + first + d, mask=here, other=1.0).to(tl.float64) * token.to(tl.float64)
            of_other = tl.load(angles + dim + first + d, mask=here, other=0.0).to(tl.float64)
            token = (own + of_other * tl.load(x + other, mask=here, other=0.0).to(tl.float64)).to(tl.float32)
        token /= unit
        total += (token - tl.load(row + PARTS[0] + first + d))[:, None] * tile
        tile = following
    return tl.sum(total, 0)


@triton.jit
def _pair(x):
    """Two neighbouring numbers, loaded together."""
    both = tl.load(x.to(tl.pointer_type(tl.int64)))
    return both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(v, own, inner, top):
    """One block's codes, plus :data:`INTEGER`, errors, and distances to where each coordinate should be: coordinate
    after coordinate, in scalars."""
    j = tl.arange(0, BLOCK)
    e, found, missed = (), (), ()
    for i in tl.static_range(BLOCK):
        if i % 2 == 0:
            v_i, v_next = _pair(v + i)
        else:
            v_i = v_next
        target = v_i + tl.sum(tl.where(j == i, own, 0.0))
        for l in tl.static_range(0, i, 2):
            first, second = _pair(inner + i * BLOCK + l)
            target += e[l] * first
            if l + 1 < i:
                target += e[l + 1] * second
        c = tl.minimum(tl.maximum(target, 0.0), top) + INTEGER
        e = e + (v_i - (c - INTEGER),)
        found = found + (c,)
        missed = missed + (target - (c - INTEGER),)
    return found, e, missed


@triton.jit
def _tile(row, step, blocks, PARTS: tl.constexpr, M: tl.constexpr):
    """What the errors of a block's coordinates add to all pulls, ``[M / 16, 16]`` of each, and the first 8 bytes of
    each 32 of ``inner``, which brings them close."""
    k = tl.minimum(step // blocks, 1)
    b = step % blocks
    block, j = tl.arange(0, M // BLOCK), tl.arange(0, BLOCK)
    at = block[:, None] * BLOCK + j[None, :]
    outer = ()
    for i in tl.static_range(BLOCK):
        outer = outer + (tl.load(row + PARTS[6] + (k * M + b * BLOCK + i) * M + at),)
    inner = tl.load(row + PARTS[5] + (k * M + b * BLOCK) * BLOCK + tl.arange(0, 32) * 8)
    return outer, inner


@triton.jit
def _swept(v, codes, row, top, PARTS: tl.constexpr, M: tl.constexpr):
    """All sweeps over the coordinates of ``v = y / (σ · step) + c0``: writes codes, gives ``Σ_{j>i} M_ij x_j / M_ii``
    of ``x = e`` and of ``x = y``, ``[M / 16, 16]`` each, and ``eᵀ M e`` after the first.

    Its fourth result means nothing; it is there so that what was loaded ahead is not thought to be of no use.
    """
    block = tl.arange(0, M // BLOCK)
    blocks = (tl.load(row + _WIDTH).to(tl.int32) + BLOCK - 1) // BLOCK
    steps = blocks * tl.load(row + _SWEEPS).to(tl.int32)
    pull, of_y = tl.zeros([M // BLOCK, BLOCK], tl.float32), tl.zeros([M // BLOCK, BLOCK], tl.float32)
    first = 0.0
    outer, near = _tile(row, 0, blocks, PARTS, M)
    for step in range(0, steps):
        b = step % blocks
        next_outer, next_near = outer, near
        if M <= 128:  # there are registers for two
            next_outer, next_near = _tile(row, tl.minimum(step + 1, steps - 1), blocks, PARTS, M)
        here = (block == b)[:, None]
        own = tl.sum(tl.where(here, pull, 0.0), 0)
        pull = tl.where(here, 0.0, pull)
        inner = row + PARTS[5] + (tl.minimum(step // blocks, 1) * M + b * BLOCK) * BLOCK
        found, e, missed = _rounded(v + b * BLOCK, own, inner, top)
        if M > 128:
            outer, next_near = _tile(row, step, blocks, PARTS, M)
        for k in tl.static_range(BLOCK):
            pull += e[k] * outer[k]
        if step < blocks:
            of_y = tl.where(here, 0.0, of_y)
            for k in tl.static_range(BLOCK):
                y = tl.load(v + b * BLOCK + k) - top / 2
                of_y += y * outer[k]
                first += tl.load(row + PARTS[3] + b * BLOCK + k) * missed[k] * missed[k]
        for k in tl.static_range(0, BLOCK, 4):
            word = 0
            for l in tl.static_range(4):
                word |= (found[k + l].to(tl.int32, bitcast=True) & 255) << 8 * l
            tl.store(codes + (b * BLOCK + k) // 4, word, mask=step >= steps - blocks)
        outer, near = next_outer, near + next_near
    return pull, of_y, first, tl.sum(near)


@triton.jit(
    do_not_specialize=["heads", "body_start", "ring"],
    do_not_specialize_on_alignment=["packed", "packed_after", "held", "start"],
)
def code_kernel(
    window_k, window_k_strides, window_v, window_v_strides, k, k_strides, v, v_strides, owned, rows, packed,
    packed_after, held, start, frame, scratch, codes, found, heads, body_start, ring,
    DIMS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Codes of body tokens from ``packed`` on, from the window or the call's own, at all scales.

    ``rows`` of :func:`headq_ao.ops.cache_update.triton_matrices.matrices`; for each head, token, side and scale
    ``scratch [.., M]`` fp32, ``codes [.., M]`` uint8 and ``found [.., 3]`` fp32, the scale to be stored, the error, and
    that of elimination alone. ``owned``: tables of an engine's pages, ``ring`` then tokens of a page. Grid: heads,
    tokens and sides, scales.
    """
    b = tl.program_id(0).to(tl.int64) // heads
    h = tl.program_id(0).to(tl.int64) % heads
    side = tl.program_id(1) % 2
    row = rows + (side * heads + h) * PARTS[7]
    j = tl.load(packed + b) + tl.program_id(1) // 2
    out = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * _SPREADS + tl.program_id(2)
    spread = tl.load(row + _FIRST_SPREAD + tl.program_id(2))
    found += _FOUND * out
    if (j < tl.load(packed_after + b)) & (spread > 0):
        _prefetch(row + PARTS[4], PARTS[7] - PARTS[4], PTX)
        number = j + body_start - tl.load(held + b)
        in_ring = number < 0
        if start is not None:
            number += tl.load(start + b)
        slot = body_start + j % ring
        if side == 0:
            x = _token(window_k, window_k_strides, owned, k, k_strides, b, h, j, number, slot, ring, in_ring)
            dim = DIMS[0]
        else:
            x = _token(window_v, window_v_strides, owned, v, v_strides, b, h, j, number, slot, ring, in_ring)
            dim = DIMS[1]
        angles, partner = None, None
        if frame is not None:
            angles, partner = frame[0] + tl.minimum(j // frame[2], frame[3] - 1) * (2 * DIMS[0]), frame[1]
        y = _transformed(x, dim, row, angles, partner, tl.where(side == 0, DIMS[0], 0), PARTS, D, M)
        top = tl.load(row + _TOP)
        in_byte = tl.load(row + _BYTE_SCALE)
        scale = _stored(tl.sqrt(tl.sum(y * y) / tl.load(row + _WIDTH)) * spread, in_byte)
        m = tl.arange(0, M)
        scratch += out * M
        words = codes.to(tl.pointer_type(tl.int32)) + out * (M // 4)
        tl.store(scratch + m, y / tl.load(row + PARTS[1] + m) / scale + top / 2)
        tl.debug_barrier()  # other threads than those that wrote it may read it
        near = tl.sum(tl.load(scratch + m))
        pull, of_y, first, also = _swept(scratch, words, row, top, PARTS, M)
        tl.store(found + 2, first * scale * scale)
        tl.debug_barrier()
        at = tl.arange(0, M // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        live = at < tl.load(row + _WIDTH).to(tl.int32)
        code = tl.load(words + at // 4, mask=live, other=0) >> at % 4 * 8 & 255
        v_at, diagonal = tl.load(scratch + at), tl.load(row + PARTS[2] + at)
        y, e = v_at - top / 2, v_at - code.to(tl.float32)  # in levels
        error = tl.sum(diagonal * e * (e + 2 * pull)) * scale * scale  # eᵀ M e
        cross = tl.sum(diagonal * (e * (y + of_y) + y * pull)) * scale * scale  # eᵀ M y
        energy = tl.sum(diagonal * y * (y + 2 * of_y)) * scale * scale  # yᵀ M y
        if tl.load(row + _UNBIASED) > 0:
            gain = energy / tl.maximum(energy - cross, 1e-30)
            usable = (gain > 0) & ((in_byte == 0) | (scale > LEAST_BYTE))
            kept = _stored(scale * tl.where(usable, gain, 1.0), in_byte)
            gain = kept / scale  # the error is now y − gain · ŷ = gain · e + (1 − gain) · y
            error = gain * gain * error + (1 - gain) * (2 * gain * cross + (1 - gain) * energy)
            scale = kept
        tl.store(found, _stored(scale * tl.load(row + _FACTOR), in_byte))
        tl.store(found + 1, error)
        tl.store(scratch, near + also)
    else:
        tl.store(found + 1, float("inf"))
        tl.store(found + 2, float("inf"))


@triton.jit
def _put_key(codes, columns, scale, keys, page, inside, CHUNKS: tl.constexpr):
    """A key's codes and its scale into its page."""
    planes, strides, scales, scale_stride, _, _ = keys
    c = tl.arange(0, CHUNK)
    for i in tl.static_range(len(CHUNKS)):
        byte = key_byte(codes, columns, CHUNKS[i][1])
        columns += CHUNK * (8 // CHUNKS[i][1])
        to = planes[CHUNKS[i][0]] + page * strides[CHUNKS[i][0]]
        to += inside // 16 * (CHUNKS[i][4] * 16) + inside % 16 * 4 + CHUNKS[i][2] * 16
        tl.store(to + c // 4 * 64 + c % 4, byte, mask=c < CHUNKS[i][3])
    put_number(scales + page * scale_stride + inside, scale, True)


@triton.jit
def _put_value(codes, scale, values, page, inside, WIDTHS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr):
    """A value's codes, which share bytes with other tokens', and its scale into its page."""
    planes, strides, scales, scale_stride, _, _ = values
    d = tl.arange(0, D_PADDED)
    code = tl.load(codes + d, mask=d < D, other=0).to(tl.int32)
    for i in tl.static_range(len(WIDTHS)):
        put_value_piece(planes[i] + page * strides[i], code, inside, WIDTHS[i], D, D_PADDED)
        code = code >> WIDTHS[i]
    put_number(scales + page * scale_stride + inside, scale, True)


@triton.jit
def _best(found, out):
    """Of the two scales that elimination leaves the least error at, that of the least error after descent: its number,
    and what is stored."""
    tl.static_assert(_KEPT == 2)
    found += out * (_FOUND * _SPREADS)
    best, second, least, next_least = 0, 0, float("inf"), float("inf")
    for i in tl.static_range(_SPREADS):
        first = tl.load(found + _FOUND * i + 2)
        less, between = first < least, (first >= least) & (first < next_least)
        second = tl.where(less, best, tl.where(between, i, second))
        next_least = tl.where(less, least, tl.where(between, first, next_least))
        best, least = tl.where(less, i, best), tl.where(less, first, least)
    if tl.load(found + _FOUND * second + 1) < tl.load(found + _FOUND * best + 1):
        best = second
    return out * _SPREADS + best, tl.load(found + _FOUND * best)


@triton.jit
def _put_leaving(
    codes, found, table, columns, block_table, table_stride, table_columns, packed, packed_after, heads, most,
    KINDS: tl.constexpr, DIMS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """One side of a head's tokens into their pages, one after the other: values share bytes."""
    b = tl.program_id(0).to(tl.int64) // heads
    h = tl.program_id(0).to(tl.int64) % heads
    side = tl.program_id(1)
    begin = tl.load(packed + b)
    n = tl.minimum(tl.load(packed_after + b) - begin, most).to(tl.int32)
    kind = tl.load(table + h * _FIELDS)
    for token in tl.range(0, n, num_stages=1):
        j = begin + token
        page = page_of(block_table, table_stride, table_columns, b, j, P)
        out, scale = _best(found, (tl.program_id(0).to(tl.int64) * most + token) * 2 + side)
        for i in tl.static_range(len(KINDS)):
            if kind == i:
                keys, values = sides(table, h, KINDS, i)
                if side == 0:
                    _put_key(codes + out * M, columns + form(KINDS, i, 1), scale, keys, page, j % P, form(KINDS, i, 0))
                else:
                    _put_value(codes + out * M, scale, values, page, j % P, form(KINDS, i, 4), DIMS[1], D)
        tl.debug_barrier()  # other threads than those that wrote a byte may read it for the next token


@triton.jit(
    do_not_specialize=["table_columns", "heads", "most", "n_sink", "ring"],
    do_not_specialize_on_alignment=["block_table", "packed", "packed_after", "held", "total", "start"],
)
def finish_kernel(
    window_k, window_k_strides, window_v, window_v_strides, k, k_strides, v, v_strides, owned, sinks, codes, found,
    table, columns, block_table, table_stride, table_columns, packed, packed_after, held, total, start, heads, most,
    n_sink, ring,
    KINDS: tl.constexpr, DIMS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The best codes of :func:`code_kernel` into pages, and the call's tokens into the window; ``sinks``: of an
    engine's pages those of keys and values, with strides. Grid: heads, sides, one and the call's slots; with ``owned``
    one and the most tokens of a sequence."""
    if tl.program_id(2) == 0:
        _put_leaving(
            codes, found, table, columns, block_table, table_stride, table_columns, packed, packed_after, heads, most,
            KINDS, DIMS, D, M, P,
        )  # fmt: skip
    else:
        b = tl.program_id(0).to(tl.int64) // heads
        h = tl.program_id(0).to(tl.int64) % heads
        n = tl.program_id(2).to(tl.int64) - 1
        if owned is not None:
            if tl.program_id(1) == 0:
                append_to_pages(
                    window_k, window_k_strides, sinks[0], sinks[1], k, k_strides, owned, held, total, start, b, h,
                    n, n_sink, ring, DIMS[0], D,
                )  # fmt: skip
            else:
                append_to_pages(
                    window_v, window_v_strides, sinks[2], sinks[3], v, v_strides, owned, held, total, start, b, h,
                    n, n_sink, ring, DIMS[1], D,
                )  # fmt: skip
        elif tl.program_id(1) == 0:
            append_token(
                window_k, window_k_strides, k, k_strides, held, total, start, b, h, n, n_sink, ring, DIMS[0], D
            )
        else:
            append_token(
                window_v, window_v_strides, v, v_strides, held, total, start, b, h, n, n_sink, ring, DIMS[1], D
            )


class Step:
    """A layer's ``cache_update`` of a few tokens, its arguments put together once; call it with ``k`` and ``v``.

    Args:
        kv, packed: as in :func:`headq_ao.ops.cache_update`, read where they lie at the time of a call; contiguous.
        frame: that keys are coded in.
        rows: of :func:`headq_ao.ops.cache_update.triton_matrices.matrices`.
    """

    def __init__(self, kv: PagedKV, packed: Tensor, rows: Tensor, frame: SegmentFrame | None) -> None:
        self.frame = None if frame is None else (frame.table, frame.partner, frame.tokens, len(frame.table))
        self.kv, self.packed, self.rows, self.layout = kv, packed, rows, PageLayout.parse(kv.layout)
        shape, layout = triton_matrices.shape_of(self.layout), self.layout
        self.windows, self.dims = with_strides(kv.window_k, kv.window_v), (layout.key_dim, layout.value_dim)
        self.ring, self.sinks = kv.window_k.shape[2] - kv.body_start, None
        if kv.window_table is not None:
            self.sinks = with_strides(*sinks_of(kv))
        self.sizes = {"DIMS": self.dims, "D": shape.dim, "M": shape.width, "num_warps": 1, "enable_fp_fusion": True}
        self.coding = {"PARTS": shape.parts, "PTX": with_ptx()} | ({"maxnreg": 255} if with_ptx() else {})
        self.kinds, device = kinds(layout.known_forms), kv.window_k.device
        self.places = head_table(layout, kv.pages), all_query_columns(layout.known_forms, device)
        self.width = shape.width

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """None: a copied cache makes one of its own."""

    def __call__(self, k: Tensor, v: Tensor, most: int | None = None) -> None:
        """Append ``k`` and ``v``, and pack what leaves the window: at most ``most`` tokens, or as many as come.

        Raises:
            ValueError: where they are not of the cache's form.
        """
        dtype, new = self.kv.window_k.dtype, k.shape[2]
        k, v = (x if x.dtype == dtype and x.stride(3) == 1 else x.to(dtype).contiguous() for x in (k, v))
        self.launch(self.kv, self.packed, k, v, new, new if most is None else most)

    def launch(self, kv: PagedKV, packed: Tensor, k: Tensor, v: Tensor, new: int, most: int) -> None:
        """The two launches for a cache whose pages and window are this one's, with tokens of their dtype; ``new``
        slots of them, or, of an engine's pages, ``new`` tokens of a sequence at most."""
        batch, heads, (scratch, codes, found) = len(kv.table), k.shape[1], self.room(len(kv.table) * k.shape[1] * most)
        tokens, owned = (*self.windows, *with_strides(k, v)), tables(kv)
        with torch.cuda.device_of(k):
            if most:
                code_kernel[(batch * heads, 2 * most, len(SPREADS))](
                    *tokens, owned, self.rows, kv.packed, packed, kv.held, kv.new_start, self.frame, scratch, codes,
                    found, heads, kv.body_start, self.ring, **self.sizes, **self.coding,
                )  # fmt: skip
            finish_kernel[(batch * heads, 2, 1 + new)](
                *tokens, owned, self.sinks, codes, found, *self.places, kv.table, kv.table.stride(0), kv.table.shape[1],
                kv.packed, packed, kv.held, kv.total, kv.new_start, heads, most, kv.n_sink, self.ring,
                KINDS=self.kinds, P=self.layout.page_tokens, **self.sizes,
            )  # fmt: skip

    def room(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the first launch leaves to the second: of that many tokens of heads."""
        like, programs = self.rows, tokens * 2 * len(SPREADS)
        return (
            like.new_empty(programs, self.width),
            like.new_empty(programs, self.width, dtype=torch.uint8),
            like.new_empty(programs, _FOUND.value),
        )


def with_strides(*tokens: Tensor) -> tuple[object, ...]:
    """Each of the tokens ``[B, Hkv, n, D]`` and its strides of batch, head and token."""
    return tuple(y for x in tokens for y in (x, x.stride()[:3]))


def tables(kv: PagedKV) -> tuple[object, ...] | None:
    """An engine's tables as kernels take them: of the window and of packed pages, each with its stride."""
    window = kv.window_table
    return None if window is None else (window, window.stride(0), kv.table, kv.table.stride(0))


def sinks_of(kv: PagedKV) -> tuple[Tensor, Tensor]:
    """Those of keys and values in an engine's pages; where there are none, something that nobody looks at."""
    if not kv.n_sink:
        return kv.window_k, kv.window_v
    assert kv.sink_k is not None and kv.sink_v is not None
    return kv.sink_k, kv.sink_v


def with_ptx() -> bool:
    """Whether inline PTX is understood."""
    return not triton.knobs.runtime.interpret and triton.runtime.driver.active.get_current_target().backend == "cuda"


def step(kv: PagedKV, packed: Tensor, encoders: Sequence[Tensor], spec: str) -> Step | None:
    """:class:`Step` for flat encoders; None where the kernels do not serve."""
    layout, dtype = PageLayout.parse(kv.layout), kv.window_k.dtype
    dense = (kv.table, kv.packed, kv.held, kv.total, packed)
    more = [x for x in (kv.new_start, kv.window_table) if x is not None]
    if (
        not triton_matrices.served(layout, spec)
        or kv.window_v.dtype != dtype
        or any(w is not None and w.stride(3) != 1 for w in (kv.window_k, kv.window_v, kv.sink_k, kv.sink_v))
        or not all(x.is_contiguous() for x in (*dense, *more))
    ):
        return None
    with torch.cuda.device_of(kv.window_k):
        rows = triton_matrices.matrices(layout, encoders, spec)
        return None if rows is None else Step(kv, packed, rows, frame_of(unflatten(encoders, spec)[0]))
