"""The Triton kernel behind ``feedback_codes`` on CUDA and HIP: the recursion over coordinates, rows side by side.

Elimination and descent are one sweep with different pulls: coordinate ``i`` is rounded to ``y_i + Σ_{j≠i} e_j P_ij``,
``P = Nᵀ`` first and ``M_ij / M_ii`` then. One program owns 32 rows and one of the tried scales; a row's error stays in
registers, and the matrices, which all programs of a head share, in the cache.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from headq_ao.ops.rounding import half

ROWS = 32  # of one program, one to a lane of an NVIDIA warp


@triton.jit
def _nearest(x, TOP: tl.constexpr):
    """``round(x)`` clamped to [0, TOP], ties to even."""
    return (tl.minimum(tl.maximum(x, 0.0), TOP) + 12582912.0) - 12582912.0


@triton.jit(do_not_specialize=["heads", "rows"])
def feedback_kernel(
    y, seen, wanted, metric, pulls, matrix_strides, step, step_strides, scales, codes, kept_scales, errors,
    heads, rows, pull_size,
    M: tl.constexpr, M_PADDED: tl.constexpr, ROWS: tl.constexpr, TOP: tl.constexpr, PASSES: tl.constexpr,
    UNBIASED: tl.constexpr,
):  # fmt: skip
    """Codes and error of 32 rows at one scale.

    ``y``, ``seen = y M`` ``[B·H, rows, M]`` and ``wanted = y M yᵀ`` ``[B·H, rows]`` fp32; ``pulls [2, …, M, M]``
    with a zero diagonal;
    ``scales``, ``kept_scales``, ``errors`` ``[spreads, B·H, rows]`` fp32, ``codes [spreads, B·H, rows, M]`` uint8.
    Grid: blocks of rows, spreads, heads.
    """
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    line = head * rows + row
    out = tl.program_id(1).to(tl.int64) * tl.num_programs(2) * rows + line
    matrix = head // heads * matrix_strides[0] + head % heads * matrix_strides[1]
    step += head // heads * step_strides[0] + head % heads * step_strides[1]
    m = tl.arange(0, M_PADDED)
    scale = tl.load(scales + out, mask=live, other=1.0)

    e = tl.zeros([M_PADDED, ROWS], tl.float32)
    for k in range(0, PASSES + 1):
        pull = pulls + matrix + tl.minimum(k, 1) * pull_size
        for i in range(0, M):
            p = tl.load(pull + i * M + m, mask=m < M, other=0.0)
            y_i = tl.load(y + line * M + i, mask=live, other=0.0)
            width = scale * tl.load(step + i)
            c = _nearest((y_i + tl.sum(e * p[:, None], 0)) / width + TOP / 2, TOP)
            e = tl.where((m == i)[:, None], (y_i - width * (c - TOP / 2))[None, :], e)

    inside = (m < M)[:, None] & live[None, :]
    address = m[:, None] + line[None, :] * M
    exact = tl.load(y + address, mask=inside, other=0.0)
    width = tl.load(step + m, mask=m < M, other=1.0)[:, None] * scale[None, :]
    c = _nearest((exact - e) / width + TOP / 2, TOP)
    tl.store(codes + m[:, None] + out[None, :] * M, c.to(tl.uint8), mask=inside)
    if UNBIASED:
        y_hat = tl.where(inside, width * (c - TOP / 2), 0.0)
        got = tl.sum(tl.load(seen + address, mask=inside, other=0.0) * y_hat, 0)
        gain = tl.load(wanted + line, mask=live, other=0.0) / tl.maximum(got, 1e-30)
        kept = tl.minimum(tl.maximum(scale * tl.where(gain > 0, gain, 1.0), 2.0**-24), 65504.0)
        kept = kept.to(tl.float16).to(tl.float32)
        e = exact - y_hat * (kept / scale)[None, :]
        scale = kept
    error = tl.zeros([ROWS], tl.float32)
    for i in range(0, M):
        p = tl.load(metric + matrix + i * M + m, mask=m < M, other=0.0)
        error += tl.sum(e * p[:, None], 0) * tl.sum(tl.where((m == i)[:, None], e, 0.0), 0)
    tl.store(kept_scales + out, scale, mask=live)
    tl.store(errors + out, error, mask=live)


def feedback_codes(
    y: Tensor, metric: Tensor, feedback: Tensor, step: Tensor, bits: int, spreads: Sequence[float], passes: int,
    unbiased: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`headq_ao.ops.feedback_codes` in fp32."""
    batch, heads, rows, width = y.shape
    y, metric, step = (x.float().contiguous() for x in (y, metric, step))
    diagonal = metric.diagonal(dim1=-2, dim2=-1)[..., None]
    pulls = torch.stack([feedback.float().transpose(-1, -2).expand_as(metric), metric / diagonal])
    pulls -= torch.eye(width, device=y.device)
    rms = y.square().mean(-1).sqrt()
    scales = half(torch.stack([rms * spread for spread in spreads]))  # [spreads, B, H, T]
    seen = y @ metric
    wanted = (seen * y).sum(-1)
    codes = y.new_empty((len(spreads), *y.shape), dtype=torch.uint8)
    kept, errors = torch.empty_like(scales), torch.empty_like(scales)
    padded = triton.next_power_of_2(width)
    if y.numel():
        with torch.cuda.device_of(y):
            feedback_kernel[(triton.cdiv(rows, ROWS), len(spreads), batch * heads)](
                y, seen, wanted, metric, pulls, metric.expand(batch, heads, -1, -1).stride()[:2],
                step, step.expand(batch, heads, -1).stride()[:2], scales, codes, kept, errors,
                heads, rows, pulls.stride(0), M=width, M_PADDED=padded, ROWS=ROWS, TOP=2**bits - 1, PASSES=passes,
                UNBIASED=unbiased, num_warps=max(1, padded // 32), enable_fp_fusion=True,
            )  # fmt: skip
    best = errors.argmin(0, keepdim=True)
    return codes.take_along_dim(best[..., None], 0)[0], kept.take_along_dim(best, 0)[0].half()
