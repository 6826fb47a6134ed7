"""Where the packed tokens of each KV head lie, as Triton kernels read it: heads of different bits in one launch.

A row of the table of heads names a head's *kind* (the form of its codes) and the addresses and page strides of its
planes, scales and zeros. A kernel is compiled for the kinds of a layer, not for which heads have which.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from headq_ao.ops.layout import PIECES
from headq_ao.ops.page_layout import PagedTokens, PageLayout, Side
from headq_ao.ops.paged_attention.triton_codes import CHUNK_BYTES, key_chunks, query_columns

KEY_PLANES, VALUE_PLANES = 3, 2
# of a row, in int64: kind; address and page stride (in elements) of each plane, scale and zero, keys first
FIELDS = 1 + 2 * (KEY_PLANES + 2 + VALUE_PLANES + 2)
ALIGNED = 16  # bytes, of addresses and strides in the table
_FIELDS, _KEY_PLANES, _VALUE_PLANES = tl.constexpr(FIELDS), tl.constexpr(KEY_PLANES), tl.constexpr(VALUE_PLANES)

Kind = tuple[tuple[tuple[int, ...], ...], int, bool, int, tuple[int, ...], int, bool, int, bool, bool]


Form = tuple[Side, Side]


@functools.lru_cache(maxsize=256)
def kinds(forms: tuple[Form, ...]) -> tuple[Kind, ...]:
    """Of each form of keys and values: ``(key chunks, first query column, zeros of keys, bits of values, their widths,
    parts of a tile, zeros of values, scales of a value, whether scales of keys are bytes, of values)``."""
    found, first = [], 0
    for keys, values in forms:
        widths, chunks = PIECES[values.bits[0]], key_chunks(keys.bits)
        parts = 8 // min(widths)
        byte_scales = keys.scale_bits == 8, values.scale_bits == 8
        found.append(
            (chunks, first, keys.zero, values.bits[0], widths, parts, values.zero, values.groups, *byte_scales)
        )
        first += sum(CHUNK_BYTES * (8 // width) for _, width, *_ in chunks)
    return tuple(found)


@functools.lru_cache(maxsize=256)
def all_query_columns(forms: tuple[Form, ...], device: torch.device) -> Tensor:
    """:func:`query_columns` of each form, one after the other."""
    return torch.cat([query_columns(keys.bits, device) for keys, _ in forms])


def head_table(layout: PageLayout, pages: Sequence[Tensor]) -> Tensor:
    """The table of heads ``[Hkv, FIELDS]`` int64 on the device of the pages, kept for as long as they lie there."""
    return _table(layout, tuple((t.data_ptr(), *t.stride()[:2]) for t in pages), pages[0].device)


@functools.lru_cache(maxsize=4096)
def _table(layout: PageLayout, places: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """From address, page stride and head stride of each tensor; it holds numbers alone, and keeps no tensor alive."""
    forms, rows = layout.known_forms, []
    for group in layout.split(places):  # type: ignore[arg-type]  # it deals them out, whatever they are
        for head in range(group.layout.heads):
            row = [forms.index((group.layout.keys, group.layout.values))]
            row += _fields(group.keys, group.layout.keys, KEY_PLANES, head)
            row += _fields(group.values, group.layout.values, VALUE_PLANES, head)
            rows.append(row)
    table = torch.tensor(rows, dtype=torch.int64, device="cpu")
    misplaced = [x for x in table[:, 1:].flatten().tolist() if x % ALIGNED]
    if misplaced:
        raise ValueError(f"pages must lie at multiples of {ALIGNED} bytes, got {misplaced[0]}")
    return table.to(device)


def _fields(side: PagedTokens, form: Side, planes: int, head: int) -> list[int]:
    """Address and page stride of each tensor of one head; 0 where there is none."""
    numbers = [(p, 1) for p in side.planes] + [None] * (planes - len(side.planes))
    numbers += [None if x is None else (x, size) for x, size in ((side.scale, form.scale_bits // 8), (side.zero, 2))]
    found = []
    for entry in numbers:
        if entry is None:
            found += [0, 0]
            continue
        (address, page_stride, head_stride), size = entry
        found += [address + head * head_stride * size, page_stride]
    return found


@triton.jit
def _place(row, i: tl.constexpr, dtype: tl.constexpr):
    """Where tensor ``i`` of a row lies: its address as a pointer, and its page stride."""
    pointer = tl.load(row + 1 + 2 * i).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16), tl.multiple_of(tl.load(row + 2 + 2 * i), 16)


@triton.jit
def _side(row, FIRST: tl.constexpr, MOST: tl.constexpr, PLANES: tl.constexpr, BYTE_SCALE: tl.constexpr):
    """Planes, their page strides, scale and its page stride, zero and its page stride."""
    planes, strides = (), ()
    for i in tl.static_range(PLANES):
        plane, stride = _place(row, FIRST + i, tl.uint8)
        planes, strides = planes + (plane,), strides + (stride,)
    scale, scale_stride = _place(row, FIRST + MOST, tl.uint8 if BYTE_SCALE else tl.float16)
    zero, zero_stride = _place(row, FIRST + MOST + 1, tl.float16)
    return planes, strides, scale, scale_stride, zero, zero_stride


@triton.constexpr_function
def form(kinds, kind, field):
    """One field of one of :func:`kinds`, whatever it is: Triton 3.6 does not index what has tuples within tuples."""
    return kinds[kind][field]


@triton.constexpr_function
def _key_planes(kinds, kind):
    return kinds[kind][0][-1][0] + 1


@triton.jit
def sides(table, h, KINDS: tl.constexpr, KIND: tl.constexpr):
    """Of KV head ``h``, whose kind is ``KINDS[KIND]``: its keys and its values; their zeros lie nowhere where there are
    none."""
    row = table + h * _FIELDS
    VALUE_WIDTHS: tl.constexpr = form(KINDS, KIND, 4)
    keys = _side(row, 0, _KEY_PLANES, _key_planes(KINDS, KIND), form(KINDS, KIND, 8))
    values = _side(row, _KEY_PLANES + 2, _VALUE_PLANES, len(VALUE_WIDTHS), form(KINDS, KIND, 9))
    return keys, values
