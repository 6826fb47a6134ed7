"""The Triton kernels behind ``cache_update`` on CUDA and HIP, around the encoders of the codec.

One launch reads the tokens that leave the window, one for each side of each head group puts their codes into pages, and
one writes the call's tokens into the window. Grids depend on shapes alone: a launch waits for nothing.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from headq_ao.ops.cache_update import triton_step
from headq_ao.ops.cache_update.check import refuse_not_finite
from headq_ao.ops.cache_update.encoders import Encoders, coders, flatten, frame_of, unflatten
from headq_ao.ops.cache_update.reference import Encoder
from headq_ao.ops.cache_update.triton_pages import (
    append_to_pages,
    append_token,
    copy_token,
    key_byte,
    page_of,
    put_number,
    put_value_piece,
    window_page,
)
from headq_ao.ops.dispatch import WIDEST
from headq_ao.ops.layout import PIECES
from headq_ao.ops.page_layout import PagedTokens, PageLayout
from headq_ao.ops.paged_attention.triton_arguments import dense_indices
from headq_ao.ops.paged_attention.triton_codes import CHUNK, key_chunks, query_columns
from headq_ao.ops.types import PagedKV, SegmentFrame

if TYPE_CHECKING:
    from headq_ao.ops.requests import Requests

GRANULE = tl.constexpr(32)  # tokens whose value codes one program writes: no others share their bytes
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(
    do_not_specialize=["heads", "body_start", "ring"],
    do_not_specialize_on_alignment=["packed", "packed_after", "held", "start"],
)
def leaving_kernel(
    sides, owned, packed, packed_after, held, start, heads, body_start, ring, DIMS: tl.constexpr, PADDED: tl.constexpr
):
    """Body tokens from ``packed`` on, from the window or the call's own. ``sides``, of keys and values: what they go to
    ``[B, Hkv, most, D]``, the window, the call's tokens, each with strides; ``owned``: tables of an engine's pages,
    ``ring`` then tokens of a page. Grid: heads, ``most``."""
    b = tl.program_id(0).to(tl.int64) // heads
    h = tl.program_id(0).to(tl.int64) % heads
    n = tl.program_id(1).to(tl.int64)
    j = tl.load(packed + b) + n
    live = j < tl.load(packed_after + b)
    number = j + body_start - tl.load(held + b)
    in_ring = number < 0
    if start is not None:
        number += tl.load(start + b)
    for i in tl.static_range(2):
        to, to_strides, window, window_strides, new, new_strides = sides[i]
        kept = tl.where(live, DIMS[i], 0)
        if in_ring:
            page, slot = window_page(owned, b, j, ring), body_start + j % ring
            copy_token(to, to_strides, b, n, window, window_strides, page, slot, h, kept, DIMS[i], PADDED[i])
        else:
            copy_token(to, to_strides, b, n, new, new_strides, b, number, h, kept, DIMS[i], PADDED[i])


@triton.jit(
    do_not_specialize=["heads", "n_sink", "ring"],
    do_not_specialize_on_alignment=["held", "total", "start"],
)
def append_kernel(sides, owned, held, total, start, heads, n_sink, ring, DIMS: tl.constexpr, PADDED: tl.constexpr):
    """The call's tokens into the window, of those that share a slot the last. ``sides``, of keys and values: the window
    and the call's tokens, each with strides, of an engine's pages (``owned``) then the sinks. Grid: heads, the call's
    slots; with ``owned`` the most tokens of a sequence."""
    b = tl.program_id(0).to(tl.int64) // heads
    h = tl.program_id(0).to(tl.int64) % heads
    n = tl.program_id(1).to(tl.int64)
    for i in tl.static_range(2):
        if owned is None:
            window, window_strides, new, new_strides = sides[i]
            append_token(
                window, window_strides, new, new_strides, held, total, start, b, h, n, n_sink, ring, DIMS[i], PADDED[i]
            )
        else:
            window, window_strides, new, new_strides, sinks, sink_strides = sides[i]
            append_to_pages(
                window, window_strides, sinks, sink_strides, new, new_strides, owned, held, total, start, b, h, n,
                n_sink, ring, DIMS[i], PADDED[i],
            )  # fmt: skip


@triton.jit
def _put_numbers(stored, strides, numbers, n, page, h, inside, GROUPS: tl.constexpr, PADDED: tl.constexpr):
    """The ``GROUPS`` scales or zeros of token ``n``."""
    g = tl.arange(0, PADDED)
    number = tl.load(numbers + n * GROUPS + g, mask=g < GROUPS, other=0.0)
    to = stored + page * strides[0] + h * strides[1] + inside * GROUPS
    put_number(to + g, number.to(tl.float32), g < GROUPS)


@triton.jit(
    do_not_specialize=["heads", "table_columns", "most"],
    do_not_specialize_on_alignment=["packed", "packed_after", "table"],
)
def keys_kernel(
    codes, scales, zeros, columns, side, table, table_stride, table_columns, packed, packed_after, heads, most,
    CHUNKS: tl.constexpr, M: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """``codes [B, h, most, M]`` of keys, ``scales``, ``zeros`` ``[B, h, most]`` into pages. Grid: heads, ``most``."""
    b = tl.program_id(0).to(tl.int64) // heads
    h = tl.program_id(0).to(tl.int64) % heads
    n = tl.program_id(0).to(tl.int64) * most + tl.program_id(1)
    j = tl.load(packed + b) + tl.program_id(1)
    planes, strides, scale, scale_strides, zero, zero_strides = side
    if j < tl.load(packed_after + b):
        page, inside = page_of(table, table_stride, table_columns, b, j, P), j % P
        c = tl.arange(0, CHUNK)
        for i in tl.static_range(len(CHUNKS)):
            byte = key_byte(codes + n * M, columns, CHUNKS[i][1])
            columns += CHUNK * (8 // CHUNKS[i][1])
            to = planes[CHUNKS[i][0]] + page * strides[CHUNKS[i][0]][0] + h * strides[CHUNKS[i][0]][1]
            to += inside // 16 * (CHUNKS[i][4] * 16) + inside % 16 * 4 + CHUNKS[i][2] * 16
            tl.store(to + c // 4 * 64 + c % 4, byte, mask=c < CHUNKS[i][3])
        _put_numbers(scale, scale_strides, scales, n, page, h, inside, 1, 1)
        if zero is not None:
            _put_numbers(zero, zero_strides, zeros, n, page, h, inside, 1, 1)


@triton.jit(
    do_not_specialize=["heads", "table_columns", "most"],
    do_not_specialize_on_alignment=["packed", "packed_after", "table"],
)
def values_kernel(
    codes, scales, zeros, side, table, table_stride, table_columns, packed, packed_after, heads, most,
    WIDTHS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """``codes [B, h, most, D]`` of values, ``scales`` and ``zeros`` ``[B, h, most, GROUPS]`` into pages, where several
    tokens share a byte: one program goes through the tokens of :data:`GRANULE`. Grid: heads, granules."""
    b = tl.program_id(0).to(tl.int64) // heads
    h = tl.program_id(0).to(tl.int64) % heads
    begin, end = tl.load(packed + b), tl.load(packed_after + b)
    first = (begin // GRANULE + tl.program_id(1)) * GRANULE
    d = tl.arange(0, D_PADDED)
    planes, strides, scale, scale_strides, zero, zero_strides = side
    start = tl.maximum(first, begin)
    for token in tl.range(0, (tl.minimum(first + GRANULE, end) - start).to(tl.int32), num_stages=1):
        j = start + token
        n = tl.program_id(0).to(tl.int64) * most + (j - begin)
        page, inside = page_of(table, table_stride, table_columns, b, j, P), j % P
        code = tl.load(codes + n * D + d, mask=d < D, other=0).to(tl.int32)
        for i in tl.static_range(len(WIDTHS)):
            plane = planes[i] + page * strides[i][0] + h * strides[i][1]
            put_value_piece(plane, code, inside, WIDTHS[i], D, D_PADDED)
            code = code >> WIDTHS[i]
        _put_numbers(scale, scale_strides, scales, n, page, h, inside, GROUPS, GROUPS_PADDED)
        if zero is not None:
            _put_numbers(zero, zero_strides, zeros, n, page, h, inside, GROUPS, GROUPS_PADDED)
        tl.debug_barrier()  # other threads than those that wrote a byte may read it for the next token


def launch(
    kv: PagedKV, k: Tensor, v: Tensor, packed: Tensor, most: int, encoders: Sequence[Tensor], spec: str,
    check_finite: bool,
) -> bool:  # fmt: skip
    """:func:`headq_ao.ops.cache_update` with flat encoders; False, and nothing is done, where :func:`update`
    gives that."""
    layout = PageLayout.parse(kv.layout)
    if not _served(kv, k, layout):
        return False
    if check_finite:
        refuse_not_finite(kv, k, v)
    if most <= triton_step.MOST and len(k):
        few = triton_step.step(dense_indices(kv), packed.contiguous(), encoders, spec)
        if few is not None:
            few(k, v, most)
            return True
    sides = unflatten(encoders, spec)
    return update(kv, k, v, packed, most, *coders(layout, *sides), frame_of(sides[0]))


def plan(
    kv: PagedKV, packed: Tensor, key_encoders: Encoders, value_encoders: Encoders, check_finite: bool
) -> "triton_step.Step | OwnedPlan | None":
    """:func:`headq_ao.ops.plan_update`; a call with ``S`` tokens packs at most so many."""
    layout = PageLayout.parse(kv.layout)
    if check_finite or not _served(kv, kv.window_k, layout) or None in (*key_encoders, *value_encoders):
        return None
    step = triton_step.step(kv, packed, *flatten(key_encoders, value_encoders))
    if kv.window_table is None:
        return step
    return OwnedPlan(kv, step, *coders(layout, key_encoders, value_encoders), frame_of(key_encoders))


class OwnedPlan:
    """``cache_update`` of the requests of a step in an engine's pages: two launches where each brings few tokens and
    the codec is calibrated, a fixed number in any case."""

    def __init__(
        self, kv: PagedKV, step: triton_step.Step | None, keys: Encoder, values: Encoder,
        frame: SegmentFrame | None = None,
    ) -> None:  # fmt: skip
        self.kv, self.step, self.coding, self.dtype = kv, step, (keys, values, frame), kv.window_k.dtype

    def requests(self, k: Tensor, v: Tensor, of: "Requests") -> None:
        """Code all new tokens, ``k``, ``v`` ``[T, Hkv, D]``."""
        k, v = (x if x.dtype == self.dtype and x.stride(2) == 1 else x.to(self.dtype).contiguous() for x in (k, v))
        for part, _ in of.parts(len(k)):
            kv = dense_indices(replace(part.cache(self.kv, part.held, part.held), new_start=part.start))
            own_k, own_v = (x.transpose(0, 1).expand(len(part), -1, -1, -1) for x in (k, v))
            if self.step is not None and part.most <= triton_step.MOST:
                self.step.launch(kv, kv.total, own_k, own_v, part.most, part.most)
            elif not update(kv, own_k, own_v, kv.total, part.most, *self.coding, part.most):
                raise ValueError(f"an engine's window must have coordinates side by side, got {kv.window_k.stride()}")


def update(
    kv: PagedKV, k: Tensor, v: Tensor, packed: Tensor, most: int, encode_keys: Encoder, encode_values: Encoder,
    frame: SegmentFrame | None = None, slots: int | None = None,
) -> bool:  # fmt: skip
    """:func:`headq_ao.ops.cache_update.reference.cache_update`; False, and nothing is done, where the kernels do not
    serve: fp64, a side that is not coded, a window whose coordinates do not lie side by side.

    ``slots``: with an engine's pages, the most tokens that a sequence brings; None: as many as ``k`` has.
    """
    layout = PageLayout.parse(kv.layout)
    coded = all(g.keys.bits and g.values.bits for g in layout.groups)
    windows = (kv.window_k, kv.window_v)
    if not coded or any(x.dtype not in DTYPES for x in (k, v, *windows)) or any(w.stride(3) != 1 for w in windows):
        return False
    kv, packed = dense_indices(kv), packed.contiguous()
    batch, heads, new, _ = k.shape
    dims = (layout.key_dim, layout.value_dim)
    sizes = {"DIMS": dims, "PADDED": tuple(map(triton.next_power_of_2, dims)), "num_warps": 1, "enable_fp_fusion": True}
    ring, owned = kv.window_k.shape[2] - kv.body_start, triton_step.tables(kv)
    with torch.cuda.device_of(k):
        if most and batch:
            left = tuple(w.new_empty(batch, heads, most, d) for w, d in zip(windows, dims, strict=True))
            sides = tuple(_with_strides(*x) for x in zip(left, windows, (k, v), strict=True))
            leaving_kernel[(batch * heads, most)](
                sides, owned, kv.packed, packed, kv.held, kv.new_start, heads, kv.body_start, ring, **sizes
            )
            if frame is not None:
                body = kv.packed[:, None] + torch.arange(most, device=k.device)
                left = frame.into(left[0], frame.of(body)[:, None]), left[1]
            _pack(kv, layout, left, packed, most, encode_keys, encode_values)
        if new and batch:
            into = [windows, (k, v)] if owned is None else [windows, (k, v), triton_step.sinks_of(kv)]
            append_kernel[(batch * heads, new if slots is None else slots)](
                tuple(_with_strides(*x) for x in zip(*into, strict=True)), owned, kv.held, kv.total,
                kv.new_start, heads, kv.n_sink, ring, **sizes,
            )  # fmt: skip
    return True


def _served(kv: PagedKV, k: Tensor, layout: PageLayout) -> bool:
    coded = all(g.keys.bits and g.values.bits for g in layout.groups)
    coded = coded and max(layout.key_dim, layout.value_dim) <= WIDEST["cuda"]
    return coded and k.dtype in DTYPES and kv.window_k.dtype in DTYPES


def _pack(
    kv: PagedKV, layout: PageLayout, left: tuple[Tensor, ...], packed: Tensor, most: int, encode_keys: Encoder,
    encode_values: Encoder,
) -> None:  # fmt: skip
    """Code the tokens that left the window, and put the codes into pages."""
    batch, dim, p = len(packed), layout.value_dim, layout.page_tokens
    where = (kv.table, kv.table.stride(0), kv.table.shape[1], kv.packed, packed)
    for group in layout.split(kv.pages):
        part, heads, bits = group.layout.part, group.layout.heads, group.keys.bits
        keys_kernel[(batch * heads, most)](
            *_codes(encode_keys(left[0][:, part], part)), query_columns(bits, left[0].device), _side(group.keys),
            *where, heads, most, CHUNKS=key_chunks(bits), M=len(bits), P=p, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
        groups = group.layout.values.groups
        values_kernel[(batch * heads, (most + GRANULE.value - 2) // GRANULE.value + 1)](
            *_codes(encode_values(left[1][:, part], part)), _side(group.values), *where, heads, most,
            WIDTHS=PIECES[group.values.bits[0]], D=dim, D_PADDED=triton.next_power_of_2(dim), GROUPS=groups,
            GROUPS_PADDED=triton.next_power_of_2(groups), P=p, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip


def _codes(found: tuple[Tensor, Tensor, Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in found]


def _with_strides(*tokens: Tensor) -> tuple[object, ...]:
    """The same of tokens of any strides."""
    return triton_step.with_strides(*(t if t.stride(3) == 1 else t.contiguous() for t in tokens))


def _side(side: PagedTokens) -> tuple[object, ...]:
    """Planes, scale and zero, each followed by its strides of page and head."""
    assert side.scale is not None
    zero = (None, None) if side.zero is None else (side.zero, side.zero.stride()[:2])
    return side.planes, tuple(plane.stride()[:2] for plane in side.planes), side.scale, side.scale.stride()[:2], *zero
