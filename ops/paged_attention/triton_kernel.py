"""The Triton kernels behind ``paged_attention`` on CUDA and HIP: their launch.

For few queries split-KV flash-decoding in three launches, for heads of any mix of bits: the query is mapped; splits of
the packed tokens, of the window and of the call's own tokens are read; all are joined. For many queries packed tokens
are unpacked first (:mod:`headq_ao.ops.paged_attention.triton_prefill`). Grids depend on shapes alone, lengths and
ranges are read on the device: a launch waits for nothing and can be captured.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from headq_ao.ops.dispatch import WIDEST
from headq_ao.ops.page_layout import PageLayout
from headq_ao.ops.paged_attention import tiled, triton_prefill
from headq_ao.ops.paged_attention.triton_arguments import (
    backend,
    dense_indices,
    in_full,
    of_frame,
    of_keys,
    of_values,
    padded,
    ranges,
    split_count,
    strides_of_shared,
    tokens,
)
from headq_ao.ops.paged_attention.triton_codes import CHUNK_BYTES
from headq_ao.ops.paged_attention.triton_heads import Form, all_query_columns, head_table, kinds
from headq_ao.ops.paged_attention.triton_join import join_kernel, map_kernel
from headq_ao.ops.paged_attention.triton_packed import split_kernel
from headq_ao.ops.types import PagedKV, Readers, Visible, visible_positions

if TYPE_CHECKING:
    from headq_ao.ops.requests import Requests

LONGEST_TILE = 128  # tokens
QUERIES = 32  # of one sequence that read codes; more read what was unpacked for them
COLUMNS, BLOCK = 32, 64  # coordinates that one program maps the query to, and that one program joins
PRECISION = {"cuda": "tf32x3", "hip": "ieee", "interpreter": "interpreter"}  # of products in fp32
STAGES = {"cuda": 3, "hip": 1, "interpreter": 1}
WINDOW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def launch(
    q: Tensor, scaling: float, kv: PagedKV, readers: Readers, visible: Visible | None = None, sliding: int = 0,
    reads: Tensor | None = None, splits: int | None = None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """:func:`headq_ao.ops.paged_attention.reference.paged_attention`, or None where the kernels do not serve: fp64, a
    side that is not coded, wide heads.

    ``reads`` ``[2]`` int64: packed tokens and all tokens that each query saw are added. ``splits`` cuts the pages of a
    sequence for more programs; None chooses it from the block table's width and the device.
    """
    layout, (batch, heads, new, _) = PageLayout.parse(kv.layout), q.shape
    if not _served(q, kv, layout, readers):
        return None
    q = q if q.stride(3) == 1 else q.contiguous()
    if new > QUERIES and q.numel():
        return _chunk(q, scaling, kv, readers, visible, sliding, reads, splits)
    out = torch.empty(batch, heads, new, layout.value_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, new, dtype=torch.float32, device=q.device)
    if lse.numel():
        _launch(q, new, q.stride()[:3], scaling, kv, readers, visible, sliding, reads, splits, out, lse, None)
    return out, lse


def _chunk(
    q: Tensor, scaling: float, kv: PagedKV, readers: Readers, visible: Visible | None, sliding: int,
    reads: Tensor | None, splits: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`launch` for many queries. One split, as where they fill the device, needs no joining."""
    layout, (batch, heads, new, _), target = PageLayout.parse(kv.layout), q.shape, backend()
    kv = dense_indices(kv)
    parts = triton_prefill.parts(q, scaling, kv, readers, visible, sliding, splits, target, PRECISION[target])
    if len(parts[1]) > 1:
        out = torch.empty(batch, heads, new, layout.value_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(batch, heads, new, dtype=torch.float32, device=q.device)
        _join(*parts, 0, kv, None, visible, sliding, out, lse, None, new, reads, target)
        return out, lse
    if reads is not None:
        shown = visible_positions(kv.total, new, sliding) if visible is None else visible
        tiled.count(kv, shown, layout, reads)
    return parts[0].view(batch, heads, new, -1), parts[1].mul_(math.log(2)).view(batch, heads, new)


def _launch(
    q: Tensor, new: int, q_strides: tuple[int, ...], scaling: float, kv: PagedKV, readers: Readers,
    visible: Visible | None, sliding: int, reads: Tensor | None, splits: int | None, out: Tensor, lse: Tensor | None,
    start: Tensor | None,
) -> None:  # fmt: skip
    """The three launches for ``new`` queries of each sequence.

    ``q_strides``: of batch, head and token. With ``start [B + 1]`` queries ``q`` and results ``out`` are
    ``[T, Hq, D]``, those of a sequence one after the other, ``new`` at most.
    """
    layout, batch, heads, device = PageLayout.parse(kv.layout), len(kv.table), q.shape[1], q.device
    dim, key_dim, kv = layout.value_dim, layout.key_dim, dense_indices(kv)
    query_map, (low, high) = of_keys(readers), ranges(visible)
    segments, m = (len(query_map) if kv.segment is not None else 1), query_map.shape[-1] - 3
    rows, lines, target = heads // layout.kv_heads * new, batch * heads * new, backend()
    forms = layout.known_forms
    constants, options, resident = specialization(layout, forms, rows, kv.window_k.element_size(), target)
    programs = batch * layout.kv_heads * triton.cdiv(rows, constants["ROWS"])
    length = kv.table.shape[1] * layout.page_tokens
    splits = splits or split_count(length, programs * segments, resident, device)
    owned, ring = in_full(kv)
    new_slots = 0 if kv.new_k is None else kv.new_k.shape[2]
    tile, packed_parts = constants["TILE"], splits * segments
    slots = [kv.n_sink + ring, new_slots] if owned is None else [kv.n_sink, ring, new_slots]
    parts = packed_parts + sum(triton.cdiv(n, tile) for n in slots)
    frame, frames = of_frame(readers.frame), 1
    if frame is not None:
        frames = min(triton.cdiv(length, frame[2]) + 1, frame[3])
    mapped = torch.empty(frames * segments, lines, m + 3, dtype=torch.float32, device=device)
    part_out = torch.empty(parts, lines, dim, dtype=torch.float32, device=device)
    part_lse = torch.empty(parts, lines, dtype=torch.float32, device=device)
    sizes = {"M": m, "KEY_D": key_dim, "KEY_PADDED": padded(key_dim), "PRECISION": PRECISION[target]}
    with torch.cuda.device_of(q):
        map_kernel[(batch * layout.kv_heads, triton.cdiv(m + 3, COLUMNS) * triton.cdiv(rows, 16), frames * segments)](
            q, q_strides, start, scaling, query_map, strides_of_shared(query_map, 4), mapped,
            frame, kv.packed, kv.recent, kv.total, kv.table.shape[1], layout.kv_heads,
            new, rows,
            P=layout.page_tokens, SEGMENTS=segments, COLUMNS=COLUMNS, num_warps=4, enable_fp_fusion=True, **sizes,
        )  # fmt: skip
        split_kernel[(batch * layout.kv_heads, parts, triton.cdiv(rows, constants["ROWS"]))](
            mapped, all_query_columns(forms, device), head_table(layout, kv.pages), kv.table, kv.table.stride(0),
            kv.table.shape[1], kv.segment if segments > 1 else None, None if frame is None else frame[2:], q,
            q_strides, start, scaling, tokens(kv.window_k, kv.window_v), owned,
            None if kv.new_k is None else tokens(kv.new_k, kv.new_v), kv.new_start, kv.packed, kv.recent, kv.held,
            kv.total, low, high, kv.n_sink, ring, sliding, kv.softcap, part_out, part_lse, layout.kv_heads, new, rows,
            splits, new_slots, SEGMENTS=segments, **sizes, **constants, **options,
        )  # fmt: skip
    _join(part_out, part_lse, packed_parts, kv, readers, visible, sliding, out, lse, start, new, reads, target)


def _join(
    part_out: Tensor, part_lse: Tensor, coded_parts: int, kv: PagedKV, readers: Readers | None,
    visible: Visible | None, sliding: int, out: Tensor, lse: Tensor | None, start: Tensor | None, new: int,
    reads: Tensor | None, target: str,
) -> None:  # fmt: skip
    """The parts ``[parts, B·Hq·S, D]`` into ``out`` and ``lse``: ``coded_parts`` of them, the first, in the values'
    basis, the others in the model's. ``kv``: of :func:`dense_indices`."""
    layout = PageLayout.parse(kv.layout)
    batch, dim, (parts, lines) = len(kv.table), layout.value_dim, part_lse.shape
    heads, width = lines // (batch * new), padded(dim)
    # registers: by itself ptxas stops at 96 where it then spills
    joining = {"maxnreg": 128 if width <= 128 else 255} if target == "cuda" else {}
    with torch.cuda.device_of(part_out):
        join_kernel[(lines, triton.cdiv(dim, min(BLOCK, width)))](
            part_out, part_lse, kv.packed, kv.recent, kv.held, kv.total, *ranges(visible),
            *of_values(readers, batch, layout.kv_heads), out, start, lse, reads, heads, heads // layout.kv_heads, new,
            lines, coded_parts, parts, kv.n_sink, sliding, kv.table.shape[1], in_full(kv)[1],
            D=dim, D_PADDED=width, BLOCK=min(BLOCK, width), P=layout.page_tokens, SPLITS=4096 // width,
            BY_POSITION=kv.window_table is not None, num_warps=4, enable_fp_fusion=True,
            **joining,
        )  # fmt: skip


def plan(
    kv: PagedKV, readers: Readers, q_heads: int, sliding: int, reads: Tensor | None
) -> "Callable[[Tensor, float], Tensor] | OwnedPlan | None":
    """:func:`headq_ao.ops.plan_attention`."""
    if not _served(kv.window_k[:, :, :0], kv, PageLayout.parse(kv.layout), readers) or readers.query_map is None:
        return None
    if kv.window_table is not None:
        return OwnedPlan(kv, readers, sliding)

    def attend(q: Tensor, scaling: float) -> Tensor:
        found = launch(q, scaling, kv, readers, None, sliding, reads)
        if found is None:
            raise ValueError(f"a plan is for queries in {WINDOW_DTYPES}, got {tuple(q.shape)} {q.dtype}")
        return found[0]

    return attend


class OwnedPlan:
    """Attention over an engine's pages, of the requests of a step."""

    def __init__(self, kv: PagedKV, readers: Readers, sliding: int) -> None:
        self.kv, self.readers, self.sliding = kv, readers, sliding

    def requests(self, q: Tensor, scaling: float, out: Tensor, of: "Requests") -> None:
        """``out`` of ``q``, ``[T, Hq, D]`` both, in three launches; no request has more than :data:`QUERIES` tokens.

        Raises:
            ValueError: where coordinates do not lie side by side, or ``out`` is not contiguous.
        """
        if q.stride(2) != 1 or not out.is_contiguous() or q.dtype not in WINDOW_DTYPES or of.most > QUERIES:
            raise ValueError(
                f"a plan is for at most {QUERIES} queries in {WINDOW_DTYPES} with coordinates side by side and a "
                f"contiguous out, got {of.most} {q.dtype} with strides {q.stride()} and {out.stride()}"
            )
        kv = of.cache(self.kv, of.packed, of.total)
        strides = (0, q.stride(1), q.stride(0))
        _launch(
            q, of.most, strides, scaling, kv, self.readers, None, self.sliding, None, None, out, None,
            of.start.contiguous(),
        )  # fmt: skip


def _served(q: Tensor, kv: PagedKV, layout: PageLayout, readers: Readers) -> bool:
    """Segments must be whole tiles of a program, whatever the values' bits; tokens that few queries read as codes, or
    in full precision, by their distance, are in pages."""
    coded = all(g.keys.bits and g.values.bits for g in layout.groups)
    coded = coded and (readers.frame is None or readers.frame.tokens % LONGEST_TILE == 0)
    coded = coded and (kv.recent is None or kv.new_k is None or q.shape[2] > QUERIES)
    coded = coded and max(layout.key_dim, layout.value_dim) <= WIDEST["cuda"]
    return coded and q.dtype in WINDOW_DTYPES and kv.window_k.dtype in WINDOW_DTYPES


@functools.lru_cache(maxsize=256)
def specialization(
    layout: PageLayout, forms: tuple[Form, ...], rows: int, window_bytes: int, backend: str
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """What :func:`split_kernel` is compiled for, its launch options, and how many of its programs a processor holds.

    Neither depends on lengths or strides. A program takes 8 query rows, or 16 where the queries' fp16 columns leave
    registers for them, and on AMD always: its matrix instructions have no narrower form. It has one warp where its
    registers suffice, for it waits for no other; on CUDA threads make do with as many as 65536 leave to each of the
    warps that are held.
    """
    kind_of, dim = kinds(forms), layout.value_dim
    columns = max(sum(CHUNK_BYTES * (8 // width) for _, width, *_ in kind[0]) for kind in kind_of)
    two_planes = any(len(kind[4]) == 2 for kind in kind_of)
    constants = {
        "KINDS": kind_of,
        "D": dim,
        "D_PADDED": padded(dim),
        "ROWS": 16 if backend == "hip" or (rows > 8 and columns <= 192) else 8,
        "PTX": backend == "cuda",
        "P": layout.page_tokens,
        "TILE": 32 if window_bytes == 2 else 16,
    }
    warps = (2 if dim > 128 or two_planes else 1) * (1 if backend != "hip" else 4 if two_planes else 2)
    held = 8 if two_planes or dim > 64 else 9
    options: dict[str, Any] = {"num_warps": warps, "num_stages": STAGES[backend], "enable_fp_fusion": True}
    if backend == "cuda":
        options["maxnreg"] = min(65536 // (32 * held) // 8 * 8, 255)
    return constants, options, held // warps
