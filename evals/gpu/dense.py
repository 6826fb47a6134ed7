"""Flash-decoding of dense bf16 keys and values in Triton: a baseline near to full bandwidth."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from headq_ao.ops.paged_attention.triton_join import _joined, _joined_lse

BLOCK, ROWS = 64, 8
COORDINATES, SPLITS = 32, 128  # joined at a time
LOG2E = 1.4426950408889634


@triton.jit
def _partial_kernel(
    q, k, v, out, out_lse, scale, slots, splits, group, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Attention of the ``group`` query rows of one KV head over one split of its rows."""
    head = tl.program_id(0).to(tl.int64)
    share = tl.cdiv(tl.cdiv(slots, BLOCK), splits) * BLOCK
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, slots)
    r, d, t = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, BLOCK)
    x = tl.load(q + (head * group + r)[None, :] * D + d[:, None], mask=(r < group)[None, :], other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([D, ROWS], tl.float32)
    k += head * slots * D
    v += head * slots * D
    for t0 in range(begin, end, BLOCK):
        here = t0 + t < end
        key = tl.load(k + (t0 + t)[:, None] * D + d[None, :], mask=here[:, None], other=0.0)
        s = tl.where(here[:, None], tl.dot(key, x) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 0))
        decay = tl.exp2(top - new_top)
        w = tl.exp2(s - new_top[None, :])
        total = total * decay + tl.sum(w, 0)
        value = tl.load(v + (t0 + t)[None, :] * D + d[:, None], mask=here[None, :], other=0.0)
        acc = tl.dot(value, w.to(tl.bfloat16), acc * decay[None, :])
        top = new_top
    line = tl.program_id(1).to(tl.int64) * tl.num_programs(0) * group + head * group + r
    some = tl.where(total == 0, 1.0, total)
    tl.store(out + d[:, None] + line[None, :] * D, acc / some[None, :], mask=(r < group)[None, :])
    tl.store(out_lse + line, tl.where(total == 0, float("-inf"), top + tl.log2(some)), mask=r < group)


@triton.jit
def _join_kernel(parts, part_lse, out, lines, splits, D: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """``BLOCK`` coordinates of one query row, over all splits."""
    line = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    parts += line * D
    part_lse += line
    lse = _joined_lse(part_lse, lines, splits, SPLITS)
    joined, _ = _joined(parts, part_lse, lse, lines, 0, splits, d, D, SPLITS)
    tl.store(out + line * D + d, joined, mask=d < D)


def bf16_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q kᵀ / √D) v`` fp32 for one token: ``q [B, Hq, 1, D]``, ``k``, ``v`` ``[B, Hkv, T, D]``, bf16."""
    batch, kv_heads, slots, d = k.shape
    heads, lines = q.shape[1], batch * q.shape[1]
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    assert heads // kv_heads <= ROWS, "a program takes one group of query heads"
    splits = max(1, min(4 * processors // (batch * kv_heads), slots // 256))
    parts, part_lse = (torch.empty(splits, lines, *size, device=q.device) for size in ((d,), ()))
    out = torch.empty(batch, heads, 1, d, device=q.device)
    _partial_kernel[(batch * kv_heads, splits)](
        q, k, v, parts, part_lse, d**-0.5 * LOG2E, slots, splits, heads // kv_heads,
        D=d, BLOCK=BLOCK, ROWS=ROWS, num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    _join_kernel[(lines, triton.cdiv(d, COORDINATES))](
        parts, part_lse, out, lines, splits, D=d, BLOCK=COORDINATES, SPLITS=SPLITS, num_warps=4, enable_fp_fusion=True
    )
    return out
