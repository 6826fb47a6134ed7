"""Triton: what the splits of the packed tokens found, joined, taken back to the model's basis, and merged with
attention over the tokens in full precision."""

import triton
import triton.language as tl

from headq_ao.ops.paged_attention.triton_packed import LOG2E, oldest_token, visible

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _joined_lse(part_lse, line, lines, splits, SPLITS: tl.constexpr):
    """``log2 Σ_i 2^lse_i`` over the splits of one query row; -inf where it sees nothing."""
    top = float("-inf")
    total = 0.0
    for first in range(0, splits, SPLITS):
        i = first + tl.arange(0, SPLITS)
        part = tl.load(part_lse + i.to(tl.int64) * lines + line, mask=i < splits, other=float("-inf"))
        highest = tl.maximum(top, tl.max(part, 0))
        frame = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp2(top - frame) + tl.sum(tl.exp2(part - frame), 0)
        top = highest
    return tl.where(total == 0, float("-inf"), top + tl.log2(tl.where(total == 0, 1.0, total)))


@triton.jit
def _joined(parts, part_lse, lse, line, lines, splits, d, D: tl.constexpr, SPLITS: tl.constexpr):
    """Coordinates ``d`` of ``Σ_i 2^{lse_i − lse} o_i``; splits that saw nothing may hold anything."""
    o = tl.zeros([d.shape[0]], tl.float32)
    frame = tl.where(lse == float("-inf"), 0.0, lse)
    for first in range(0, splits, SPLITS):
        i = first + tl.arange(0, SPLITS)
        at = i.to(tl.int64) * lines + line
        weight = tl.exp2(tl.load(part_lse + at, mask=i < splits, other=float("-inf")) - frame)
        inside = (weight != 0)[:, None] & (d < D)[None, :]
        part = tl.load(parts + at[:, None] * D + d[None, :], mask=inside, other=0.0)
        o += tl.sum(weight[:, None] * part, 0)
    return o


@triton.jit
def _read_back(
    parts, part_lse, joined, line, lines, splits, b, h, read, read_strides, mean, mean_strides,
    D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """``o @ readᵀ + mean`` of the joined packed tokens, ``[D_PADDED]``."""
    d = tl.arange(0, D_PADDED)
    if read is None:
        packed = _joined(parts, part_lse, joined, line, lines, splits, d, D, 16)
    else:
        packed = tl.zeros([D_PADDED], tl.float32)
        read += b * read_strides[0] + h * read_strides[1]
        for first in tl.static_range(0, D, BLOCK):
            e = first + tl.arange(0, BLOCK)
            inside = (d < D)[:, None] & (e < D)[None, :]
            turn = tl.load(read + d[:, None] * read_strides[2] + e[None, :] * read_strides[3], mask=inside, other=0.0)
            o = _joined(parts, part_lse, joined, line, lines, splits, e, D, SPLITS)
            packed += tl.sum(turn.to(tl.float32) * o[None, :], 1)
    if mean is not None:
        at = mean + b * mean_strides[0] + h * mean_strides[1] + d * mean_strides[2]
        packed += tl.load(at, mask=d < D, other=0.0).to(tl.float32)
    return packed


@triton.jit
def _add_tokens(
    sums, x, k, k_strides, v, v_strides, b, h, slot, here,
    KEY_D: tl.constexpr, KEY_PADDED: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """The running sums and tokens ``slot`` of ``k``, ``v`` in full precision, at least one of which is ``here``."""
    top, total, acc = sums
    e = tl.arange(0, KEY_PADDED)
    d = tl.arange(0, D_PADDED)
    slot = slot.to(tl.int64)
    at = k + b * k_strides[0] + h * k_strides[1] + (slot * k_strides[2])[:, None] + e[None, :]
    key = tl.load(at, mask=here[:, None] & (e < KEY_D)[None, :], other=0.0).to(tl.float32)
    at = v + b * v_strides[0] + h * v_strides[1] + (slot * v_strides[2])[:, None] + d[None, :]
    value = tl.load(at, mask=here[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    s = tl.where(here, tl.sum(key * x[None, :], 1) * LOG2E, float("-inf"))
    highest = tl.maximum(top, tl.max(s, 0))
    decay = tl.exp2(top - highest)
    w = tl.exp2(s - highest)
    return highest, total * decay + tl.sum(w, 0), acc * decay + tl.sum(w[:, None] * value, 0)


@triton.jit(
    do_not_specialize=["heads", "group", "new", "lines", "splits", "n_sink", "ring", "sliding", "table_columns"],
    do_not_specialize_on_alignment=["packed", "held", "total", "low", "high", "new_start", "reads"],
)
def finish_kernel(
    parts, part_lse, q, q_strides, k, k_strides, v, v_strides, new_k, new_k_strides, new_v, new_v_strides, new_start,
    packed, held, total, low, high, read, read_strides, mean, mean_strides, out, lse, reads,
    heads, group, new, lines, splits, n_sink, ring, sliding, table_columns,
    KEY_D: tl.constexpr, KEY_PADDED: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, P: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One query row of ``out [B, Hq, S, D]`` fp32 and ``lse [B, Hq, S]``, in nats.

    ``parts``, ``part_lse`` as :func:`packed_kernel` wrote them; ``q [B, Hq, S, KEY_D]`` fp32, scaled; the window ``k``,
    ``v`` and the call's ``new_k``, ``new_v`` with strides of batch, head and token; ``read [B, Hkv, D, D]``,
    ``mean [B, Hkv, D]``. The first head of each query adds the packed tokens and all tokens that it saw to ``reads``.
    """
    line = tl.program_id(0).to(tl.int64)
    i = line % new
    b = line // new // heads
    h = line // new % heads // group
    joined = _joined_lse(part_lse, line, lines, splits, SPLITS)
    of_pages = _read_back(
        parts, part_lse, joined, line, lines, splits, b, h, read, read_strides, mean, mean_strides,
        D, D_PADDED, BLOCK, SPLITS,
    )  # fmt: skip

    # positions that the query sees: sinks from `low` on, the ring's body tokens from `body` on, new tokens from `fresh`
    e = tl.arange(0, KEY_PADDED)
    q += b * q_strides[0] + line // new % heads * q_strides[1] + i * q_strides[2]
    x = tl.load(q + e, mask=e < KEY_D, other=0.0)
    first, last = visible(b, i, True, new, low, high, total, sliding)
    in_pages, in_window, end = tl.load(packed + b), tl.load(held + b), tl.load(total + b)
    seen = tl.maximum(
        tl.minimum(last - n_sink, in_pages) - tl.maximum(first - n_sink, oldest_token(in_pages, table_columns, P)), 0
    )
    stop = tl.minimum(last, in_window)
    first = tl.maximum(first, 0)
    body = tl.maximum(tl.maximum(in_pages, in_window - n_sink - ring), tl.maximum(first - n_sink, 0))
    sinks = tl.maximum(tl.minimum(stop, n_sink) - first, 0).to(tl.int32)
    both = sinks + tl.maximum(stop - n_sink - body, 0).to(tl.int32)
    sums = (float("-inf"), 0.0, tl.zeros([D_PADDED], tl.float32))
    for t0 in range(0, both, TILE):
        t = t0 + tl.arange(0, TILE)
        slot = tl.where(t < sinks, first + t, n_sink + (body + t - sinks) % ring)
        sums = _add_tokens(sums, x, k, k_strides, v, v_strides, b, h, slot, t < both, KEY_D, KEY_PADDED, D, D_PADDED)
    seen_all = seen + both
    if new_k is not None:
        fresh = tl.maximum(first, in_window)
        count = tl.maximum(tl.minimum(last, end) - fresh, 0).to(tl.int32)
        fresh -= in_window
        if new_start is not None:
            fresh += tl.load(new_start + b)
        for t0 in range(0, count, TILE):
            t = t0 + tl.arange(0, TILE)
            sums = _add_tokens(
                sums, x, new_k, new_k_strides, new_v, new_v_strides, b, h, fresh + t, t < count,
                KEY_D, KEY_PADDED, D, D_PADDED,
            )  # fmt: skip
        seen_all += count

    top, mass, exact = sums
    some = tl.where(mass == 0, 1.0, mass)
    exact_lse = tl.where(mass == 0, float("-inf"), top + tl.log2(some))
    highest = tl.maximum(joined, exact_lse)
    frame = tl.where(highest == float("-inf"), 0.0, highest)
    of_packed, of_exact = tl.exp2(joined - frame), tl.exp2(exact_lse - frame)
    whole = tl.where(highest == float("-inf"), 1.0, of_packed + of_exact)
    d = tl.arange(0, D_PADDED)
    tl.store(out + line * D + d, (of_pages * of_packed + exact * (of_exact / some)) / whole, mask=d < D)
    tl.store(lse + line, tl.where(highest == float("-inf"), highest, (frame + tl.log2(whole)) * LN2))
    if reads is not None:
        tl.atomic_add(reads, seen, mask=line // new % heads == 0)
        tl.atomic_add(reads + 1, seen_all, mask=line // new % heads == 0)
