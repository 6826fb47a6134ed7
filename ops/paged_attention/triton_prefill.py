"""``paged_attention`` of many queries on CUDA and HIP: packed tokens are unpacked once, and read by flash attention.

A kernel that reads codes unpacks them again for each block of query rows, and maps all queries for each segment's
frame: of 4096 queries with four heads to a KV head and segments of 512 tokens, 128 times, and an eighth of all
products. Here rows are written once for all blocks, in the model's basis and dtype, for as many tokens at a time as
:data:`ROWS_BYTES` hold. Two launches for each such tile and one for what is in full precision; grids depend on shapes
alone, lengths and ranges are read on the device.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from headq_ao.ops.page_layout import PageLayout
from headq_ao.ops.paged_attention.triton_arguments import (
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
from headq_ao.ops.paged_attention.triton_flash import flash_kernel
from headq_ao.ops.paged_attention.triton_heads import all_query_columns, head_table, kinds
from headq_ao.ops.paged_attention.triton_unpack import unpack_kernel
from headq_ao.ops.types import PagedKV, Readers, Visible

ROWS_BYTES = 64 << 20  # of unpacked tokens, most that are there at a time
GRANULE = 128  # tokens: tiles are a whole number of them
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def parts(
    q: Tensor, scaling: float, kv: PagedKV, readers: Readers, visible: Visible | None, sliding: int,
    splits: int | None, backend: str, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention ``[splits, B·Hq·S, D]`` and ``log2 Σ e^s [splits, B·Hq·S]``, fp32, of the queries ``q [B, Hq, S, D]``,
    in the model's basis, to be joined; ``kv``: of :func:`headq_ao.ops.paged_attention.triton_arguments.dense_indices`.

    ``precision``: of products in fp32; those that unpack to bf16 need no more than a mantissa of ten bits.
    """
    layout, (batch, heads, new, _), device = PageLayout.parse(kv.layout), q.shape, q.device
    hkv = layout.kv_heads
    dtype = q.dtype if q.dtype == kv.window_k.dtype else torch.float32
    rows, lines, columns = heads // hkv * new, batch * heads * new, kv.table.shape[1]
    constants, options, held = specialization(layout.key_dim, layout.value_dim, dtype.itemsize, rows, backend)
    token_bytes = batch * hkv * (layout.key_dim + layout.value_dim) * dtype.itemsize
    tile, count = tiling(columns * layout.page_tokens, token_bytes)
    blocks = triton.cdiv(rows, constants["ROWS"])
    splits = splits or split_count(tile, blocks * batch * hkv, held, device)
    k, v = (torch.empty(batch, hkv, tile, d, dtype=dtype, device=device) for d in (layout.key_dim, layout.value_dim))
    out = torch.empty(splits, lines, layout.value_dim, dtype=torch.float32, device=device)
    lse = torch.empty(splits, lines, dtype=torch.float32, device=device)
    low, high = ranges(visible)
    lowest = None if low is None else low.amin(1)
    owned, ring = in_full(kv)
    exact = "tf32" if dtype == torch.bfloat16 and backend == "cuda" else precision
    query_map, (read, read_strides, mean, mean_strides) = of_keys(readers), of_values(readers, batch, hkv)
    slots = 64 if max(layout.key_dim, layout.value_dim) <= 128 else 32
    fresh = None if kv.new_k is None else tokens(kv.new_k, kv.new_v)

    def unpack(first: int) -> None:
        unpack_kernel[(triton.cdiv(tile, slots), batch * hkv, 2)](
            head_table(layout, kv.pages), all_query_columns(layout.known_forms, device), query_map,
            strides_of_shared(query_map, 4), read, read_strides, mean, mean_strides, of_frame(readers.frame), kv.table,
            kv.table.stride(0), columns, kv.segment if len(query_map) > 1 else None, kv.packed, kv.recent, kv.total,
            lowest, sliding, kv.n_sink, new, k, v, hkv, first, tile,
            KINDS=kinds(layout.known_forms), SEGMENTS=len(query_map) if kv.segment is not None else 1,
            M=query_map.shape[-1] - 3, KEY_D=layout.key_dim, KEY_PADDED=padded(layout.key_dim), D=layout.value_dim,
            D_PADDED=padded(layout.value_dim), P=layout.page_tokens, SLOTS=slots,
            BY_POSITION=kv.window_table is not None, PRECISION=exact, num_warps=8, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip

    def flash(grid: tuple[int, int, int], first: int, closing: bool) -> None:
        flash_kernel[grid](
            q, q.stride()[:3], scaling, k, v, first, tile, tokens(kv.window_k, kv.window_v), owned, kv.table,
            kv.table.stride(0), columns, fresh, 0 if fresh is None else fresh[0].shape[2], kv.new_start, kv.packed,
            kv.recent, kv.held, kv.total, low, high, kv.n_sink, ring, sliding, kv.softcap, out, lse, hkv, new, rows,
            P=layout.page_tokens, DTYPE=DTYPES[dtype], PRECISION=precision, CLOSING=closing, **constants, **options,
        )  # fmt: skip

    with torch.cuda.device_of(q):
        for i in range(count):
            unpack(i * tile)
            flash((blocks, splits, batch * hkv), i * tile, False)
        flash((blocks, 1, batch * hkv), 0, True)
    return out, lse


def tiling(length: int, token_bytes: int) -> tuple[int, int]:
    """Tokens that are unpacked at a time, and how many such tiles there are.

    Example:
        >>> tiling(28672, 4096)  # of eight heads of 128 in half precision: 16384 would fit
        (14336, 2)
    """
    most = max(ROWS_BYTES // token_bytes // GRANULE, 1) * GRANULE
    count = -(-length // most)
    return -(-length // count // GRANULE) * GRANULE, count


@functools.lru_cache(maxsize=256)
def specialization(
    key_dim: int, value_dim: int, itemsize: int, rows: int, backend: str
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """What :func:`flash_kernel` is compiled for, its launch options, and how many of its programs a processor holds."""
    key_padded, d_padded = padded(key_dim), padded(value_dim)
    wide = max(key_padded, d_padded) > 128
    if itemsize == 2:
        block, tile, warps = 64 if wide or rows <= 64 else 128, 64 if backend == "cuda" else 32, 8
    else:  # products in three parts, each with its operands
        block, tile, warps = 32, 32, 8
    constants = {
        "KEY_D": key_dim, "KEY_PADDED": key_padded, "D": value_dim, "D_PADDED": d_padded, "ROWS": block, "TILE": tile,
    }  # fmt: skip
    stages = {"cuda": 2 if wide or itemsize == 4 else 3}.get(backend, 1)
    return constants, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}, 1
