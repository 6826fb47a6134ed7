"""The Triton kernels behind ``paged_attention`` on CUDA and HIP: their launch.

Split-KV flash-decoding: one launch for each head group reads packed tokens, and one joins all, sees to the window and
the call's own tokens and merges. Grids depend on shapes alone, lengths and ranges are read on the device: a launch
waits for nothing and can be captured.
"""

import functools
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from headq_ao.ops.layout import PIECES
from headq_ao.ops.page_layout import PagedTokens, PageLayout
from headq_ao.ops.paged_attention.triton_codes import CHUNK_BYTES, key_chunks, query_columns
from headq_ao.ops.paged_attention.triton_join import finish_kernel
from headq_ao.ops.paged_attention.triton_packed import packed_kernel
from headq_ao.ops.types import PagedKV, Readers, Visible

QUERIES = 32  # of one sequence that the kernels take; more go to matrix products over unpacked tiles
MOST_SPLITS, LEAST_TOKENS = 512, 128  # of a split
JOINED, BLOCK, TILE = 128, 32, 64  # splits and coordinates joined at a time, window tokens read at a time
STAGES = {"cuda": 3, "hip": 1, "interpreter": 1}
WINDOW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def launch(
    q: Tensor, scaling: float, kv: PagedKV, readers: Readers, visible: Visible | None = None, sliding: int = 0,
    reads: Tensor | None = None, splits: int | None = None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """:func:`headq_ao.ops.paged_attention.reference.paged_attention`, or None where the kernels do not serve: fp64, a
    side that is not coded, more than :data:`QUERIES` queries.

    ``reads`` ``[2]`` int64: packed tokens and all tokens that each query saw are added. ``splits`` cuts the pages of a
    sequence for more programs; None chooses it from the block table's width and the device.
    """
    layout, (batch, heads, new, _) = PageLayout.parse(kv.layout), q.shape
    if not _served(q, kv, layout):
        return None
    out = torch.empty(batch, heads, new, layout.value_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, new, dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out, lse
    kv, scaled = dense_indices(kv), q.float() * scaling
    shown = (None, None) if visible is None else (visible.low.contiguous(), visible.high.contiguous())
    with torch.cuda.device_of(q):
        parts, part_lse = _packed(scaled, kv, readers, layout, shown, sliding, splits)
        _finish(parts, part_lse, scaled, kv, readers, layout, shown, sliding, out, lse, reads)
    return out, lse


def _served(q: Tensor, kv: PagedKV, layout: PageLayout) -> bool:
    coded = all(g.keys.bits and g.values.bits for g in layout.groups)
    return coded and q.shape[2] <= QUERIES and q.dtype in WINDOW_DTYPES and kv.window_k.dtype in WINDOW_DTYPES


def dense_indices(kv: PagedKV) -> PagedKV:
    """The cache with lengths, block table and segments as kernels read them: contiguous."""
    given = ((n, getattr(kv, n)) for n in ("table", "segment", "packed", "held", "total", "new_start"))
    copies = {name: x.contiguous() for name, x in given if x is not None and not x.is_contiguous()}
    return replace(kv, **copies) if copies else kv


def mapped_queries(q: Tensor, query_map: Tensor, kv_heads: int) -> Tensor:
    """``[G, B, Hkv, g·S, M + 3]`` of scaled queries ``[B, Hq, S, D]``, with any strides; no map is copied where all
    sequences share it."""
    x = q.reshape(len(q), kv_heads, -1, q.shape[-1])
    if query_map.shape[1] > 1:
        return torch.matmul(x, query_map)
    mapped = torch.matmul(x.transpose(0, 1).flatten(1, 2), query_map[:, 0])
    return mapped.unflatten(2, (len(q), -1)).transpose(1, 2)


def _packed(
    q: Tensor, kv: PagedKV, readers: Readers, layout: PageLayout, shown: tuple[Tensor | None, Tensor | None],
    sliding: int, splits: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What :func:`packed_kernel` writes, ``[splits, B·Hq·S, D]`` and ``[splits, B·Hq·S]``."""
    assert readers.query_map is not None
    batch, heads, new, _ = q.shape
    mapped = mapped_queries(q, readers.query_map, layout.kv_heads)
    segments = len(mapped) if kv.segment is not None else 1
    rows, lines, table = heads // layout.kv_heads * new, batch * heads * new, kv.table
    target, launches, most = backend(), [], 1
    for group in layout.split(kv.pages):
        bits, v_bits = group.keys.bits, group.layout.values.bits[0]
        constants = specialization(bits, v_bits, layout.value_dim, group.layout.values.groups, rows, target)
        options, resident = launch_options(layout.value_dim, v_bits, target)
        blocks = triton.cdiv(rows, constants["ROWS"])
        programs = batch * group.layout.heads * blocks * segments
        n = splits or split_count(table.shape[1] * layout.page_tokens, programs, resident, q.device)
        most = max(most, n * segments)
        launches.append((group, n, (batch * group.layout.heads, n * segments, blocks), constants | options))
    parts = torch.empty(most, lines, layout.value_dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(most, lines, dtype=torch.float32, device=q.device)
    segment = kv.segment if segments > 1 else None
    for group, n, grid, options in launches:
        packed_kernel[grid](
            mapped, mapped.stride()[:4], query_columns(group.keys.bits, q.device), _side(group.keys),
            _side(group.values), table, table.stride(0), table.shape[1], segment, kv.packed, kv.total, *shown,
            kv.n_sink, sliding, parts, part_lse, group.layout.first, group.layout.heads, layout.kv_heads, new, rows,
            n, most, lines, P=layout.page_tokens, SEGMENTS=segments, **options,
        )  # fmt: skip
    return parts, part_lse


def _finish(
    parts: Tensor, part_lse: Tensor, q: Tensor, kv: PagedKV, readers: Readers, layout: PageLayout,
    shown: tuple[Tensor | None, Tensor | None], sliding: int, out: Tensor, lse: Tensor, reads: Tensor | None,
) -> None:  # fmt: skip
    batch, heads, new, key_dim = q.shape
    kv_heads, padded = layout.kv_heads, triton.next_power_of_2(layout.value_dim)
    key_padded = triton.next_power_of_2(key_dim)
    read = None if readers.read is None else readers.read.expand(batch, kv_heads, -1, -1)
    mean = None if readers.mean is None else readers.mean.expand(batch, kv_heads, -1)
    finish_kernel[(batch * heads * new,)](
        parts, part_lse, *_tokens(q), *_tokens(kv.window_k), *_tokens(kv.window_v), *_tokens(kv.new_k),
        *_tokens(kv.new_v), kv.new_start, kv.packed, kv.held, kv.total, *shown,
        read, None if read is None else read.stride(), mean, None if mean is None else mean.stride(), out, lse, reads,
        heads, heads // kv_heads, new, parts.shape[1], parts.shape[0], kv.n_sink, kv.window_k.shape[2] - kv.n_sink,
        sliding, kv.table.shape[1], KEY_D=key_dim, KEY_PADDED=key_padded, D=layout.value_dim, D_PADDED=padded,
        P=layout.page_tokens, BLOCK=BLOCK, TILE=min(TILE, 8192 // max(padded, key_padded)), SPLITS=JOINED,
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip


def backend() -> str:
    """What a launch compiles for: "cuda", "hip" or Triton's "interpreter"."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    return str(triton.runtime.driver.active.get_current_target().backend)


@functools.lru_cache(maxsize=256)
def specialization(
    bits: tuple[int, ...], value_bits: int, head_dim: int, groups: int, rows: int, backend: str
) -> dict[str, Any]:
    """What :func:`packed_kernel` is compiled for: layouts, head size and query rows, not lengths or strides.

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


@functools.lru_cache(maxsize=256)
def launch_options(head_dim: int, value_bits: int, backend: str) -> tuple[dict[str, Any], int]:
    """Options of :func:`packed_kernel`'s launch, and how many of its programs a processor holds at a time at least.

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


def split_count(tokens: int, programs: int, held: int, device: torch.device) -> int:
    """Splits with which the programs just fill the device, all at once: a second round would wait for the first."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(processors * held // max(programs, 1), tokens // LEAST_TOKENS, MOST_SPLITS))


def _side(side: PagedTokens) -> tuple[Any, ...]:
    """Planes, scale and zero, each followed by its strides of page and head."""
    assert side.scale is not None
    zero = (None, None) if side.zero is None else (side.zero, side.zero.stride()[:2])
    strides = tuple(plane.stride()[:2] for plane in side.planes)
    return side.planes, strides, side.scale, side.scale.stride()[:2], *zero


def _tokens(x: Tensor | None) -> tuple[Tensor | None, tuple[int, ...] | None]:
    """Tokens ``[B, H, n, D]`` and their strides of batch, head and token."""
    if x is None:
        return None, None
    x = x if x.stride(3) == 1 else x.contiguous()
    return x, x.stride()[:3]
