"""The Triton kernel behind ``feedback_codes`` on CUDA and HIP: the recursion over coordinates in blocks of 16.

With ``y_i / (σ · step_i)`` for ``y_i`` and matrices scaled to match, levels are 1 apart. A sweep rounds coordinate
after coordinate to ``y_i + Σ_{j<i} L_ij e_j + Σ_{j>i} U_ij e_j``, errors before ``i`` being this sweep's and those
after it the last one's. The elimination has ``L = Nᵀ``, and no errors after ``i`` yet; descents have
``L_ij = U_ij = M_ij / M_ii``.

As in GPTQ (arXiv 2210.17323), a block ``b`` of coordinates is rounded first and then enters all sums at once:

    ``pull_i ← (0 if i in b else pull_i) + Σ_{j in b} P_ij e_j``,

with ``P = L`` for coordinates ``i`` after the block, which this sweep rounds next, and ``P = U`` for ``i < j``, which
the next one does: a matrix product onto its accumulators. Only ``Σ L_ij e_j`` over the earlier ``j`` of the same block
is left to a recursion, in the registers of the thread that has the row. After the last sweep ``pull_i`` is
``Σ_{j>i} M_ij e_j / M_ii``, hence ``eᵀ M e = Σ_i M_ii e_i (e_i + 2 pull_i)``. One launch eliminates at all scales,
a second one descends from the codes of the best.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from headq_ao.ops.dispatch import WIDEST
from headq_ao.ops.error_feedback.reference import KEPT, PASSES, SPREADS
from headq_ao.ops.rounding import LEAST_SHORT, MOST_SHORT, stored_scale

BLOCK = tl.constexpr(16)  # coordinates whose errors enter the sums together
INTEGER = tl.constexpr(12582912.0)  # 1.5 · 2^23: a float plus this is rounded to an integer, ties to even
SMALLEST, LARGEST = tl.constexpr(2.0**-24), tl.constexpr(65504.0)  # positive fp16
LEAST_BYTE, MOST_BYTE = tl.constexpr(LEAST_SHORT), tl.constexpr(MOST_SHORT)


@triton.jit
def stored_half(x):
    """``x`` as a scale that is stored in fp16."""
    return tl.minimum(tl.maximum(x, SMALLEST), LARGEST).to(tl.float16).to(tl.float32)


@triton.jit
def stored_byte(x):
    """``x`` as one of the scales that a byte holds."""
    near = tl.minimum(tl.maximum(x, LEAST_BYTE), MOST_BYTE).to(tl.float16).to(tl.float32)
    return ((near.to(tl.int32, bitcast=True) + (1 << 17)) & -(1 << 18)).to(tl.float32, bitcast=True)


@triton.jit
def _columns(x):
    """The 16 columns of ``x``; halves are split off until each is alone, which leaves a row in one thread."""
    parts = (x,)
    for k in tl.static_range(4):
        halves = ()
        for i in tl.static_range(2**k):
            pairs = tl.permute(tl.reshape(parts[i], [x.shape[0], 2, 8 >> k]), [0, 2, 1])
            halves = halves + tl.split(pairs)
        parts = halves
    columns = ()
    for i in tl.static_range(16):
        columns = columns + (tl.reshape(parts[i], [x.shape[0]]),)
    return columns


@triton.jit
def _from_columns(parts):
    """The matrix of 16 columns."""
    for k in tl.static_range(4):
        joined = ()
        for i in tl.static_range(8 >> k):
            joined = joined + (tl.join(parts[i], parts[i + (8 >> k)]),)
        parts = joined
    return tl.reshape(parts[0], [parts[0].shape[0], 16])


@triton.jit
def _tf32(x):
    """``x`` with the mantissa that a TF32 product reads."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _add_product(total, x, y, TF32: tl.constexpr):
    """``total + x y`` in fp32; of TF32 halves all products but that of the two low ones."""
    if TF32:
        x_high, y_high = _tf32(x), _tf32(y)
        total = tl.dot(x - x_high, y_high, total, input_precision="tf32")
        total = tl.dot(x_high, y - y_high, total, input_precision="tf32")
        total = tl.dot(x_high, y_high, total, input_precision="tf32")
    else:
        total = tl.dot(x, y, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["heads"])
def feedback_kernel(
    y, seen, wanted, diagonal, diagonal_strides, pulls, pull_strides, pull_size, scales, codes, kept_scales, errors,
    heads,
    BLOCKS: tl.constexpr, M_PADDED: tl.constexpr, ROWS: tl.constexpr, TOP: tl.constexpr, DESCENTS: tl.constexpr,
    UNBIASED: tl.constexpr, BYTE_SCALE: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Codes and error of a tile of rows at one scale: by elimination, or after ``DESCENTS`` from the codes there.

    ``y``, ``seen = M y`` ``[B·H, tiles, M, ROWS]`` and ``wanted = yᵀ M y`` ``[B·H, tiles, ROWS]`` fp32, with
    ``M`` = 16 · BLOCKS; ``diagonal [B or 1, H or 1, M]`` of the metric, ``pulls [2, B or 1, H or 1, M_PADDED, M]`` of
    the elimination and the descents; ``scales``, ``kept_scales``, ``errors`` ``[spreads, B·H, tiles, ROWS]`` fp32,
    ``codes [spreads, B·H, tiles, M / 4, ROWS]`` int32, a byte each; ``spreads``: those of this launch. Grid: tiles,
    spreads, heads.
    """
    M: tl.constexpr = BLOCKS * BLOCK
    head = tl.program_id(2).to(tl.int64)
    tile = head * tl.num_programs(0) + tl.program_id(0)
    out = tl.program_id(1).to(tl.int64) * tl.num_programs(2) * tl.num_programs(0) + tile
    row = tl.arange(0, ROWS)
    diagonal += head // heads * diagonal_strides[0] + head % heads * diagonal_strides[1]
    pulls += head // heads * pull_strides[0] + head % heads * pull_strides[1]
    y += tile * M * ROWS + row
    seen += tile * M * ROWS + row
    codes += out * (M // 4) * ROWS + row
    scale = tl.load(scales + out * ROWS + row)
    levels = 1 / scale
    m = tl.arange(0, M_PADDED)
    j = tl.arange(0, BLOCK)
    block = tl.arange(0, M_PADDED // BLOCK)

    pull = tl.zeros([ROWS, M_PADDED // BLOCK, BLOCK], tl.float32)
    if DESCENTS > 0:
        pulls += pull_size
        for b in range(0, BLOCKS):
            e = ()
            for i in tl.static_range(BLOCK):
                c = tl.load(codes + (b * BLOCK + i) // 4 * ROWS) >> 8 * (i % 4) & 255
                e = e + (tl.load(y + (b * BLOCK + i) * ROWS) * levels + TOP / 2 - c.to(tl.float32),)
            before = (m < b * BLOCK)[:, None] | ((m // BLOCK == b)[:, None] & ((m % BLOCK)[:, None] < j[None, :]))
            p = tl.load(pulls + b * BLOCK + m[:, None] * M + j[None, :], mask=before, other=0.0)
            pull = _add_product(tl.reshape(pull, [ROWS, M_PADDED]), _from_columns(e), tl.trans(p), TF32)
            pull = tl.reshape(pull, [ROWS, M_PADDED // BLOCK, BLOCK])
        tl.debug_barrier()  # codes are written anew below
    for _ in range(0, tl.maximum(DESCENTS, 1)):
        for b in range(0, BLOCKS):
            p = pulls + b * BLOCK
            here = (block == b).to(tl.float32)[None, :, None]
            own = _columns(tl.sum(pull * here, 1))
            e, word = (), tl.zeros([ROWS], tl.int32)  # the block's errors; four codes
            for i in tl.static_range(BLOCK):
                y_i = tl.load(y + (b * BLOCK + i) * ROWS) * levels + TOP / 2
                target = y_i + own[i]
                for l in tl.static_range(i):
                    target += e[l] * tl.load(p + (b * BLOCK + i) * M + l)
                c = tl.minimum(tl.maximum(target, 0.0), TOP) + INTEGER
                e = e + (y_i - (c - INTEGER),)
                word |= (c.to(tl.int32, bitcast=True) & 255) << 8 * (i % 4)
                if i % 4 == 3:
                    tl.store(codes + (b * BLOCK + i) // 4 * ROWS, word)
                    word = tl.zeros([ROWS], tl.int32)
            outside = (m // BLOCK != b)[:, None] | ((m % BLOCK)[:, None] < j[None, :])
            p = tl.load(p + m[:, None] * M + j[None, :], mask=outside, other=0.0)
            pull = tl.reshape(pull * (1 - here), [ROWS, M_PADDED])
            pull = _add_product(pull, _from_columns(e), tl.trans(p), TF32)
            pull = tl.reshape(pull, [ROWS, M_PADDED // BLOCK, BLOCK])

    tl.debug_barrier()  # other threads than those that wrote the codes may read them
    size, cross = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)  # eᵀ M e and eᵀ M y, in levels
    for b in range(0, BLOCKS):
        own = _columns(tl.sum(pull * (block == b).to(tl.float32)[None, :, None], 1))
        for i in tl.static_range(BLOCK):
            at = (b * BLOCK + i) * ROWS
            c = (tl.load(codes + (b * BLOCK + i) // 4 * ROWS) >> 8 * (i % 4) & 255).to(tl.float32)
            e = tl.load(y + at) * levels - (c - TOP / 2)
            size += tl.load(diagonal + b * BLOCK + i) * e * (e + 2 * own[i])
            cross += tl.load(seen + at) * e
    error = size * scale * scale
    if UNBIASED:
        energy = tl.load(wanted + tile * ROWS + row)
        cross *= scale
        gain = energy / tl.maximum(energy - cross, 1e-30)
        gain = tl.where(gain > 0, gain, 1.0)
        if BYTE_SCALE:
            kept = stored_byte(scale * tl.where(scale > LEAST_BYTE, gain, 1.0))
        else:
            kept = stored_half(scale * gain)
        gain = kept / scale  # the error is now y − gain · ŷ = gain · e + (1 − gain) · y
        error = gain * gain * error + (1 - gain) * (2 * gain * cross + (1 - gain) * energy)
        scale = kept
    tl.store(kept_scales + out * ROWS + row, scale)
    tl.store(errors + out * ROWS + row, error)


def tiling(padded: int) -> dict[str, int]:
    """Rows of a program, its warps and the form of its products, for rows padded to ``padded`` coordinates.

    As many rows as threads, or fewer where the sums would take too many of their registers; 16 are the least of a
    product. Hopper's products read ``P`` from shared memory, which leaves more registers to the sums; with one or two
    warps Blackwell's take the path of older chips.
    """
    if triton.knobs.runtime.interpret:
        return {"ROWS": 32, "TF32": True, "num_warps": 1}
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return {"ROWS": max(16, min(256, 8192 // padded)), "TF32": False, "num_warps": 4}
    if target.arch // 10 == 9:
        return {"ROWS": max(16, min(128, 16384 // padded)), "TF32": True, "num_warps": 4}
    return {"ROWS": max(16, min(32, 4096 // padded)), "TF32": True, "num_warps": 1 if padded <= 64 else 2}


def in_levels(hessian: Tensor, factor: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``M`` for errors in levels, ``[.., M, M]``, its diagonal, and what errors add to the pulls of the elimination and
    of the descents, ``[2, .., M, M]``; of a ``factor`` as :func:`headq_ao.ops.ldl_factor` gives it."""
    hessian = hessian * step[..., None] * step[..., None, :]
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    descent = hessian / diagonal.clamp(min=torch.finfo(torch.float32).tiny)[..., None]  # no pull on what is not seen
    elimination = factor.transpose(-1, -2) * (step[..., None, :] / step[..., None])
    pulls = [elimination.tril(-1) + descent.triu(1), descent.tril(-1) + descent.triu(1)]
    return hessian, diagonal, torch.stack(pulls)


def launch(
    y: Tensor,
    metric: Tensor,
    feedback: Tensor,
    step: Tensor,
    bits: int,
    unbiased: bool,
    scale_bits: int = 16,
) -> tuple[Tensor, Tensor] | None:
    """:func:`headq_ao.ops.feedback_codes` in fp32; None for fp64, and for rows of more than 256."""
    if y.dtype == torch.float64 or y.shape[-1] > WIDEST["cuda"]:
        return None
    batch, heads, rows, width = y.shape
    if not y.numel():
        return y.new_empty(y.shape, dtype=torch.uint8), y.new_empty(y.shape[:-1], dtype=torch.float16)
    y, metric, feedback, step = (x.float() for x in (y, metric, feedback, step))
    padded = max(BLOCK.value, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, BLOCK.value)
    with torch.cuda.device_of(y):
        tile = tiling(padded)
    in_tiles = (triton.cdiv(rows, tile["ROWS"]), tile["ROWS"])
    spare, spare_rows = blocks * BLOCK.value - width, -rows % tile["ROWS"]

    metric, diagonal, pulls = in_levels(metric, feedback, step)
    pulls = pad(pulls, (0, spare, 0, padded - width))
    metric, diagonal = pad(metric, (0, spare, 0, spare)), pad(diagonal, (0, spare)).contiguous()

    rms = pad(y.square().mean(-1).sqrt(), (0, spare_rows))
    tried = stored_scale(torch.stack([rms * spread for spread in SPREADS]), scale_bits)  # [spreads, B, H, T]
    y = pad(y / step[..., None, :], (0, spare, 0, spare_rows))
    seen = y @ metric
    wanted = (seen * y).sum(-1)
    y, seen = (x.unflatten(-2, in_tiles).transpose(-1, -2).contiguous() for x in (y, seen))
    words = (batch, heads, in_tiles[0], 4 * blocks, in_tiles[1])  # of four codes

    def run(scales: Tensor, codes: Tensor, descents: int) -> tuple[Tensor, Tensor]:
        """Errors and the scales to be stored."""
        kept, errors = torch.empty_like(scales), torch.empty_like(scales)
        with torch.cuda.device_of(y):
            feedback_kernel[(in_tiles[0], len(scales), batch * heads)](
                y, seen, wanted, diagonal, diagonal.expand(batch, heads, -1).stride()[:2],
                pulls, pulls[0].expand(batch, heads, -1, -1).stride()[:2], pulls.stride(0), scales, codes, kept, errors,
                heads, BLOCKS=blocks, M_PADDED=padded, TOP=2**bits - 1, DESCENTS=descents,
                UNBIASED=unbiased and descents > 0,
                BYTE_SCALE=scale_bits == 8, num_stages=1, enable_fp_fusion=True, **tile,
            )  # fmt: skip
        return errors, kept

    def of_best(best: Tensor) -> Tensor:
        """``codes`` of the scales ``best [n, B, H, T]``."""
        return codes.take_along_dim(best.unflatten(-1, in_tiles).unsqueeze(-2), 0)

    codes = torch.empty(len(SPREADS), *words, dtype=torch.int32, device=y.device)
    best = run(tried, codes, 0)[0].sort(dim=0, stable=True).indices[:KEPT]
    codes = of_best(best).contiguous()
    errors, kept = run(tried.take_along_dim(best, 0).contiguous(), codes, PASSES)
    best = errors.argmin(0, keepdim=True)
    codes = of_best(best)[0].transpose(-1, -2).contiguous().view(torch.uint8)
    codes = codes.flatten(2, 3)[:, :, :rows, :width].contiguous()
    return codes, kept.take_along_dim(best, 0)[0, :, :, :rows].half()
