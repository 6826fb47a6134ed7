"""``decode_attention``: attention of a few queries over one segment of packed or exact rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from headq_ao.ops.cpu_build import direct
from headq_ao.ops.decode_attention import cpu_kernel, reference
from headq_ao.ops.decode_attention.cpu_kernel import ExactRows
from headq_ao.ops.gpu_build import optional
from headq_ao.ops.layout import CHANNEL_TILE, PIECES, TOKEN_TILE, granule

KERNEL_QUERIES = 32  # of one sequence that the Triton kernel takes; more go to matrix products over unpacked tiles
SLOT_TILE = 1024  # slots unpacked at a time by the reference: extra memory is bounded by a tile, not by the context
QUERY_TILE = 256


@dataclass(frozen=True)
class MappedQuery:
    """Queries in the integers' coordinates, the softmax scaling and steps folded in.

    ``s_j = σ_j (codes_j·c + bias) + m_j·zero + gauge``, all fp32 (fp64 for an fp64 model):
    ``codes [B, Hq, S, M]``; ``bias``, ``zero``, ``gauge`` ``[B, Hq, S]``.
    For exact keys ``codes`` is ``q · scaling`` itself and the others are zero.
    """

    codes: Tensor
    bias: Tensor
    zero: Tensor
    gauge: Tensor

    @staticmethod
    def scaled(q: Tensor, scaling: float) -> Tensor:
        """``q · scaling``, fp32 or fp64."""
        q = q.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        return q if scaling == 1 else q * scaling

    @classmethod
    def exact(cls, q: Tensor, scaling: float) -> "MappedQuery":
        """``q [B, Hq, S, D]`` for keys that are read as they are."""
        q = cls.scaled(q, scaling)
        nothing = q.new_zeros(q.shape[:-1])
        return cls(q, nothing, nothing, nothing)

    def of_heads(self, part: slice) -> "MappedQuery":
        """Those of some query heads."""
        return MappedQuery(self.codes[:, part], self.bias[:, part], self.zero[:, part], self.gauge[:, part])


@dataclass(frozen=True)
class Rows:
    """Key or value rows of one segment: exact rows ``[B, Hkv, T, D]``, or planes with ``bits`` and per-token scales."""

    exact: Tensor | None = None
    planes: list[Tensor] = field(default_factory=list)
    bits: Sequence[int] = ()
    scale: Tensor | None = None
    zero: Tensor | None = None


def decode_attention(
    q: MappedQuery, keys: Rows, values: Rows, start: Tensor, stop: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend over slots ``start ≤ t < stop`` of one segment, reading packed rows.

    ``o = Σ_j softmax(s)_j v_j`` and ``lse = log Σ_j exp(s_j)``, with ``s_j`` as in :class:`MappedQuery`. Segments
    are joined by :func:`merge_segments`. Accumulation is fp32 (fp64 for fp64 queries).

    Args:
        q: mapped queries, ``Hq`` a multiple of ``Hkv``.
        keys: packed (``planes``, ``bits`` per coordinate, ``scale``, optional ``zero`` ``[B, Hkv, T]``) or exact.
        values: packed (``planes``, ``bits`` = (b,), ``scale``, optional ``zero`` ``[B, Hkv, T, D/g]``) or exact.
        start, stop: ``[B, S]`` int64, the visible slots of each query.
        valid: ``[B, T]`` bool, or None when no slot in the range is a hole.

    Returns:
        ``o [B, Hq, S, D]`` in the values' stored (rotated) basis and ``lse [B, Hq, S]``; 0 and −inf where no slot is
        visible.

    Raises:
        ValueError: when shapes do not fit each other.

    Example:
        >>> import torch
        >>> from headq_ao.ops import MappedQuery, Rows, decode_attention
        >>> q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16)
        >>> seen = torch.tensor([[0]]), torch.tensor([[8]])
        >>> out, lse = decode_attention(MappedQuery.exact(q, 0.25), Rows(exact=k), Rows(exact=v), *seen)
        >>> torch.testing.assert_close(
        ...     out, torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.25, enable_gqa=True)
        ... )
    """
    _check_packed(q, keys, values, start, stop, valid)
    out, lse = (KERNELS[q.codes.device.type] if direct(q.codes) else _decode_attention)(
        q.codes, q.bias, q.zero, q.gauge,
        keys.exact, keys.planes, list(keys.bits), keys.scale, keys.zero,
        values.exact, values.planes, values.bits[0] if values.planes else 0, values.scale, values.zero,
        start, stop, valid,
    )  # fmt: skip
    return out, lse


def attend(
    q: MappedQuery, keys: Rows, values: Rows, start: Tensor, stop: Tensor, valid: Tensor | None, exact: ExactRows
) -> Tensor:
    """Attention over one segment of packed rows and over exact rows, in the basis of the exact values.

    The same as :func:`decode_attention` over each, ``o = Σ_j a_j ŷ_j`` of the packed one taken back by
    ``o @ readᵀ + mean``, and :func:`merge_segments`; one call, for a decoding step has little to do in each.

    Args:
        q, keys, values, start, stop, valid: of the packed segment, as in :func:`decode_attention`.
        exact: the exact rows, their queries and ranges, and the way back from the values' basis.

    Returns:
        ``[B, Hq, S, D]`` in the mapped queries' dtype; 0 where no row is visible.

    Raises:
        ValueError: when shapes do not fit each other.

    Example:
        >>> import torch
        >>> from headq_ao.ops import ExactRows, MappedQuery, Rows, attend, encode_keys, encode_values
        >>> q, k, v = (torch.randn(1, h, n, 16) for h, n in ((2, 1), (1, 48), (1, 48)))
        >>> eye, ones = torch.eye(16)[None, None], torch.ones(1, 1, 16)
        >>> planes, scale, _ = encode_keys(k[:, :, :32], torch.zeros(1, 1, 16), eye, eye, ones, [4] * 16, weight=ones)
        >>> v_planes, v_scale, _ = encode_values(v[:, :, :32], eye, 4, group_size=16, step=0.34)
        >>> codes, nothing = q * 0.25, torch.zeros(1, 2, 1)
        >>> query = MappedQuery(codes, -7.5 * codes.sum(-1), nothing, nothing)
        >>> seen = torch.tensor([[0]]), torch.tensor([[32]])
        >>> rows = ExactRows(q * 0.25, k[:, :, 32:], v[:, :, 32:], torch.tensor([[0]]), torch.tensor([[16]]), eye, None)
        >>> keys, values = Rows(None, planes, [4] * 16, scale), Rows(None, v_planes, (4,), v_scale)
        >>> attend(query, keys, values, *seen, None, rows).shape
        torch.Size([1, 2, 1, 16])
    """
    _check_packed(q, keys, values, start, stop, valid)
    _check_exact(q, exact)
    return _attend_run(q, keys, values, start, stop, valid, exact)


def _attend_run(
    q: MappedQuery, keys: Rows, values: Rows, start: Tensor, stop: Tensor, valid: Tensor | None, exact: ExactRows
) -> Tensor:
    """:func:`attend` of arguments that were checked."""
    out: Tensor = (ATTEND_KERNELS[q.codes.device.type] if direct(q.codes) else _attend)(
        q.codes, q.bias, q.zero, q.gauge, keys.planes, list(keys.bits), keys.scale, keys.zero,
        values.planes, values.bits[0], values.scale, values.zero, start, stop, valid,
        exact.q, exact.k, exact.v, exact.start, exact.stop, exact.read, exact.mean,
    )  # fmt: skip
    return out


def attend_runs(
    q: MappedQuery,
    start: Tensor,
    stop: Tensor,
    valid: Tensor | None,
    runs: Sequence[tuple[slice, Rows, Rows]],
    exact: ExactRows,
) -> Tensor:
    """:func:`attend` where KV heads may differ in bits.

    Args:
        q, start, stop, valid, exact: of all heads, as in :func:`attend`.
        runs: neighbouring KV heads of the same bits, in order: which they are, their keys and their values.

    Returns:
        ``[B, Hq, S, D]`` in the mapped queries' dtype; 0 where no row is visible.

    Raises:
        ValueError: when shapes do not fit each other.
    """
    _check_exact(q, exact)
    _check_runs(runs, exact.k.shape[1])
    for _, keys, values in runs:
        _check_rows(q, keys, values, start, stop, valid)
    if direct(q.codes) and q.codes.is_cuda and known_dtype(exact):
        kernel = _kernel(q.codes, runs[0][1].planes)
        if kernel is not None:
            return launch_runs(kernel, q, start, stop, valid, runs, exact)
    kv_heads = exact.k.shape[1]
    group, outs = q.codes.shape[1] // kv_heads, []
    for heads, keys, values in runs:
        first, last, _ = heads.indices(kv_heads)
        of_q = slice(first * group, last * group)
        read, mean = (x if x is None or x.shape[1] == 1 else x[:, heads] for x in (exact.read, exact.mean))
        assert read is not None
        of_run = ExactRows(exact.q[:, of_q], exact.k[:, heads], exact.v[:, heads], exact.start, exact.stop, read, mean)
        outs.append(_attend_run(q.of_heads(of_q), keys, values, start, stop, valid, of_run))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def launch_runs(
    kernel: ModuleType, q: MappedQuery, start: Tensor, stop: Tensor, valid: Tensor | None,
    runs: Sequence[tuple[slice, Rows, Rows]], exact: ExactRows,
) -> Tensor:  # fmt: skip
    """:func:`attend_runs` by the module of Triton kernels, of arguments that were checked."""
    of_kernel = []
    for heads, keys, values in runs:
        of_keys, of_values = (keys.planes, keys.bits, keys.scale, keys.zero), (values.scale, values.zero)
        first = heads.indices(exact.k.shape[1])[0]
        of_kernel.append(kernel.Run(first, *of_keys, values.planes, values.bits[0], *of_values))
    out: Tensor = kernel.attend(q.codes, q.bias, q.zero, q.gauge, of_kernel, start, stop, valid, exact)
    return out


def merge_segments(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint segments: ``o = Σ_i e^{lse_i − lse} o_i``, ``lse = log Σ_i e^{lse_i}``.

    Args:
        parts: pairs ``o_i [..., D]``, ``lse_i [...]``; a segment with ``lse = −inf`` adds nothing.

    Returns:
        ``o`` and ``lse``, as if one softmax had run over all rows.

    Example:
        >>> import torch
        >>> one, two = (torch.ones(1, 2), torch.zeros(1)), (torch.zeros(1, 2), torch.zeros(1))
        >>> merge_segments([one, two])[0]
        tensor([[0.5000, 0.5000]])
    """
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])
    lse = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - lse.nan_to_num(neginf=0.0))
    out = sum(w[..., None] * o for w, (o, _) in zip(weights, parts, strict=True))
    assert isinstance(out, Tensor)
    return out, lse


def _tiled(
    q: Tensor,
    bias: Tensor,
    zero_query: Tensor,
    gauge: Tensor,
    k: Tensor | None,
    key_planes: list[Tensor],
    key_bits: list[int],
    key_scale: Tensor | None,
    key_zero: Tensor | None,
    v: Tensor | None,
    value_planes: list[Tensor],
    value_bits: int,
    value_scale: Tensor | None,
    value_zero: Tensor | None,
    start: Tensor,
    stop: Tensor,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    hkv = (k if k is not None else key_planes[0]).shape[1]
    slots = k.shape[2] if k is not None else key_planes[0].shape[2] * TOKEN_TILE
    q, bias, zero_query, gauge = (x.unflatten(1, (hkv, -1)) for x in (q, bias, zero_query, gauge))
    outs, lses = [], []
    for s in _tiles(q.shape[3], QUERY_TILE):
        parts = []
        for t in _tiles(slots, SLOT_TILE):
            parts.append(
                reference.decode_attention(
                    q[:, :, :, s], bias[..., s], zero_query[..., s], gauge[..., s],
                    _cut(k, t), [_cut(p, t, TOKEN_TILE) for p in key_planes], key_bits, _cut(key_scale, t),
                    _cut(key_zero, t), _cut(v, t),
                    [_cut(p, t, granule(w)) for p, w in zip(value_planes, PIECES.get(value_bits, ()), strict=True)],
                    value_bits, _cut(value_scale, t), _cut(value_zero, t),
                    start[:, s] - t.start, stop[:, s] - t.start, None if valid is None else valid[:, t],
                )
            )  # fmt: skip
        out, lse = merge_segments(parts)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 3).flatten(1, 2), torch.cat(lses, 3).flatten(1, 2)


_decode_attention = torch.library.custom_op("headq::decode_attention", _tiled, mutates_args=())


def _attend_parts(
    q: Tensor, bias: Tensor, zero_query: Tensor, gauge: Tensor, key_planes: list[Tensor], key_bits: list[int],
    key_scale: Tensor, key_zero: Tensor | None, value_planes: list[Tensor], value_bits: int, value_scale: Tensor,
    value_zero: Tensor | None, start: Tensor, stop: Tensor, valid: Tensor | None, exact_q: Tensor, k: Tensor, v: Tensor,
    exact_start: Tensor, exact_stop: Tensor, read: Tensor, mean: Tensor | None,
) -> Tensor:  # fmt: skip
    out, lse = _decode_attention(
        q, bias, zero_query, gauge, None, key_planes, key_bits, key_scale, key_zero,
        None, value_planes, value_bits, value_scale, value_zero, start, stop, valid,
    )  # fmt: skip
    nothing = exact_q.new_zeros(exact_q.shape[:-1])
    exact = _decode_attention(
        exact_q, nothing, nothing, nothing, k, [], [], None, None, v, [], 0, None, None, exact_start, exact_stop, None
    )
    merged: Tensor = merge_segments([(reference.read_back(out, read, mean), lse), exact])[0]
    return merged


_attend = torch.library.custom_op("headq::attend", _attend_parts, mutates_args=())


@_attend.register_kernel("cpu")
def _attend_cpu(q, bias, zero_query, gauge, key_planes, *rest):
    packed, exact = rest[:-7], cpu_kernel.ExactRows(*rest[-7:])
    lib = cpu_kernel.library() if known_dtype(exact) and q.dtype == torch.float32 else None
    if lib is None or q.shape[2] > QUERY_TILE:
        return _attend_parts(q, bias, zero_query, gauge, key_planes, *rest)
    return cpu_kernel.decode_attention(lib, q, bias, zero_query, gauge, key_planes, *packed, exact=exact)[0]


@_attend.register_kernel("cuda")
def _attend_cuda(q, bias, zero_query, gauge, key_planes, *rest):
    """Two launches of Triton kernels, on CUDA and HIP; fp64, long chunks and empty stores keep to the parts."""
    *packed, start, stop, valid = rest[:-7]
    exact = cpu_kernel.ExactRows(*rest[-7:])
    kernel = _kernel(q, key_planes) if known_dtype(exact) else None
    if kernel is None:
        return _attend_parts(q, bias, zero_query, gauge, key_planes, *rest)
    runs = [kernel.Run(0, key_planes, *packed)]
    return kernel.attend(q, bias, zero_query, gauge, runs, start, stop, valid, exact)


@_attend.register_fake
def _(q, bias, zero_query, gauge, key_planes, key_bits, key_scale, key_zero, value_planes, *rest):
    return q.new_empty((*q.shape[:3], value_planes[0].shape[3] * CHANNEL_TILE))


@_decode_attention.register_kernel("cpu")
def _cpu(q, bias, zero_query, gauge, k, key_planes, key_bits, key_scale, key_zero, v, value_planes, *rest):
    lib = cpu_kernel.library() if k is None and v is None and q.dtype == torch.float32 else None
    if lib is None:
        return _tiled(q, bias, zero_query, gauge, k, key_planes, key_bits, key_scale, key_zero, v, value_planes, *rest)
    if q.shape[2] <= QUERY_TILE:
        return cpu_kernel.decode_attention(
            lib, q, bias, zero_query, gauge, key_planes, key_bits, key_scale, key_zero, value_planes, *rest
        )
    value_bits, value_scale, value_zero, start, stop, valid = rest
    parts = [
        cpu_kernel.decode_attention(
            lib, q[:, :, s], bias[..., s], zero_query[..., s], gauge[..., s],
            key_planes, key_bits, key_scale, key_zero,
            value_planes, value_bits, value_scale, value_zero, start[:, s], stop[:, s], valid,
        )
        for s in _tiles(q.shape[2], QUERY_TILE)
    ]  # fmt: skip
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


@_decode_attention.register_kernel("cuda")
def _cuda(q, bias, zero_query, gauge, k, key_planes, key_bits, key_scale, key_zero, v, value_planes, *rest):
    """The Triton kernel, on CUDA and HIP; exact rows, fp64, long chunks and empty stores keep to the tiled reference.

    The operator stays opaque to Inductor: the kernel takes tuples of planes and its grid depends on the device, which
    ``torch.library.triton_op`` does not carry, and there is nothing around it to fuse.
    """
    kernel = _kernel(q, key_planes) if k is None and v is None else None
    if kernel is None:
        return _tiled(q, bias, zero_query, gauge, k, key_planes, key_bits, key_scale, key_zero, v, value_planes, *rest)
    value_bits, value_scale, value_zero, *seen = rest
    of_keys, of_values = (key_planes, key_bits, key_scale, key_zero), (value_bits, value_scale, value_zero)
    run = kernel.Run(0, *of_keys, value_planes, *of_values)
    return kernel.decode_attention(q, bias, zero_query, gauge, run, *seen)


KERNELS = {"cpu": _cpu, "cuda": _cuda}  # where nothing is traced, without the dispatcher
ATTEND_KERNELS = {"cpu": _attend_cpu, "cuda": _attend_cuda}


def _kernel(q: Tensor, key_planes: list[Tensor]) -> ModuleType | None:
    """The Triton kernels where they serve these queries of packed rows."""
    served = q.dtype == torch.float32 and q.shape[2] <= KERNEL_QUERIES and key_planes[0].numel()
    return optional("decode_attention.triton_kernel") if served else None


def _check_packed(q: MappedQuery, keys: Rows, values: Rows, start: Tensor, stop: Tensor, valid: Tensor | None) -> None:
    """Raise ValueError where queries, rows and ranges do not fit each other."""
    hkv = (keys.exact if keys.exact is not None else keys.planes[0]).shape[1]
    if q.codes.shape[1] % hkv:
        raise ValueError(f"query heads must be a multiple of the {hkv} KV heads, got {q.codes.shape[1]}")
    _check_rows(q, keys, values, start, stop, valid)


def _check_exact(q: MappedQuery, exact: ExactRows) -> None:
    """Raise ValueError where exact rows do not fit each other or the queries: compiled kernels read them by address."""
    batch, heads, new = of_q = q.codes.shape[:3]
    if exact.k.shape != exact.v.shape or exact.q.shape[-1] != exact.k.shape[-1] or exact.k.shape[0] != batch:
        raise ValueError(
            f"exact rows must share their shape, the batch {batch} and the head_dim of q, got {tuple(exact.k.shape)}, "
            f"{tuple(exact.v.shape)} and {tuple(exact.q.shape)}"
        )
    kv_heads, head_dim = exact.k.shape[1], exact.k.shape[3]
    if exact.q.shape[:3] != of_q or exact.q.dtype != q.codes.dtype or heads % kv_heads:
        raise ValueError(
            f"the exact rows' queries must be {tuple(of_q)} {q.codes.dtype}, of a multiple of {kv_heads} heads, "
            f"got {tuple(exact.q.shape)} {exact.q.dtype}"
        )
    for name, x in (("start", exact.start), ("stop", exact.stop)):
        if x.shape != (batch, new) or x.dtype != torch.int64:
            raise ValueError(f"exact {name} must be int64 {(batch, new)}, got {x.dtype} {tuple(x.shape)}")
    for name, y, trailing in (("read", exact.read, (head_dim, head_dim)), ("mean", exact.mean, (head_dim,))):
        if y is None:
            continue
        fits = y.shape[0] in (1, batch) and y.shape[1] in (1, kv_heads) and y.shape[2:] == trailing
        if not fits or y.dtype not in (torch.float32, q.codes.dtype):
            raise ValueError(
                f"{name} must be float32 [{batch} or 1, {kv_heads} or 1, {', '.join(map(str, trailing))}], "
                f"got {y.dtype} {tuple(y.shape)}"
            )


def _check_runs(runs: Sequence[tuple[slice, Rows, Rows]], kv_heads: int) -> None:
    """Raise ValueError where packed runs do not cover the KV heads in order, or differ in slots."""
    covered, slots = 0, set()
    for heads, keys, values in runs:
        first, last, _ = heads.indices(kv_heads)
        if not keys.planes or not values.planes or first != covered or keys.planes[0].shape[1] != last - first:
            break
        covered = last
        slots.add(keys.planes[0].shape[2])
    if covered != kv_heads or len(slots) != 1:
        shown = [(heads, tuple(keys.planes[0].shape) if keys.planes else None) for heads, keys, _ in runs]
        raise ValueError(
            f"runs must be packed rows of all {kv_heads} KV heads in order, of the same slots, got {shown}"
        )


def known_dtype(exact: ExactRows) -> bool:
    """Whether the kernels read exact rows of this dtype."""
    return exact.k.dtype == exact.v.dtype and exact.k.dtype in cpu_kernel.EXACT_DTYPES


def _check_rows(q: MappedQuery, keys: Rows, values: Rows, start: Tensor, stop: Tensor, valid: Tensor | None) -> None:
    """Raise ValueError where queries of these or more heads do not fit the rows and ranges."""
    hkv = (keys.exact if keys.exact is not None else keys.planes[0]).shape[1]
    if q.codes.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"mapped queries must be float32 or float64, got {q.codes.dtype}")
    width = keys.exact.shape[-1] if keys.exact is not None else len(keys.bits)
    if q.codes.shape[-1] != width:
        raise ValueError(f"the query must have one coordinate per key coordinate, {width}, got {q.codes.shape[-1]}")
    slots = _slots(keys, TOKEN_TILE), _slots(values, granule(PIECES[values.bits[0]][0]) if values.bits else 1)
    if slots[0] != slots[1]:
        raise ValueError(f"keys and values must hold the same slots, got {slots[0]} and {slots[1]}")
    _check_operands(q, keys, values, start, stop, valid, (q.codes.shape[0], hkv, slots[0]))
    if start.shape != q.bias.shape[::2] or stop.shape != start.shape:
        raise ValueError(
            f"start and stop must be [B, S] = {tuple(q.bias.shape[::2])}, "
            f"got {tuple(start.shape)} and {tuple(stop.shape)}"
        )


def _check_operands(
    q: MappedQuery,
    keys: Rows,
    values: Rows,
    start: Tensor,
    stop: Tensor,
    valid: Tensor | None,
    rows: tuple[int, int, int],
) -> None:
    """Every operand has the rows' ``[B, Hkv, T]`` and its dtype: compiled kernels read them by address."""
    of_q, dtype, lead = q.codes.shape[:-1], q.codes.dtype, rows[:2]
    for name, x in (("bias", q.bias), ("zero", q.zero), ("gauge", q.gauge)):
        if x.dtype != dtype or x.shape != of_q:
            raise ValueError(f"q.{name} must be {tuple(of_q)} {dtype}, got {tuple(x.shape)} {x.dtype}")
    for side, operand in (("keys", keys), ("values", values)):
        for plane in operand.planes:
            if plane.shape[:2] != lead or plane.dtype != torch.uint8:
                what = f"{tuple(plane.shape[:2])} {plane.dtype}"
                raise ValueError(f"{side} planes must be uint8 with [B, Hkv] = {lead}, got {what}")
        for name, row in (("scale", operand.scale), ("zero", operand.zero)):
            if row is not None and (row.shape[:3] != rows or row.dtype != torch.float16):
                what = f"{tuple(row.shape)} {row.dtype}"
                raise ValueError(f"{side} {name} must be fp16 with [B, Hkv, T] = {rows}, got {what}")
        if operand.planes and operand.scale is None:
            raise ValueError(f"packed {side} need their scale")
        if operand.exact is not None and operand.exact.shape[:2] != lead:
            raise ValueError(f"exact {side} must have [B, Hkv] = {lead}, got {tuple(operand.exact.shape[:2])}")
    if start.dtype != torch.int64 or stop.dtype != torch.int64:
        raise ValueError(f"start and stop must be int64, got {start.dtype} and {stop.dtype}")
    if valid is not None and (valid.shape != rows[::2] or valid.dtype != torch.bool):
        raise ValueError(f"valid must be bool [B, T] = {rows[::2]}, got {tuple(valid.shape)} {valid.dtype}")


def _slots(rows: Rows, tokens_per_entry: int) -> int:
    return rows.exact.shape[2] if rows.exact is not None else rows.planes[0].shape[2] * tokens_per_entry


def _tiles(length: int, size: int) -> Iterator[slice]:
    return (slice(a, min(a + size, length)) for a in range(0, max(length, 1), size))


def _cut(x: Tensor | None, t: slice, tokens_per_entry: int = 1) -> Tensor:
    if x is None:
        return None  # type: ignore[return-value]
    return x[:, :, t.start // tokens_per_entry : -(-t.stop // tokens_per_entry)]


@_decode_attention.register_fake
def _(q, bias, zero_query, gauge, k, key_planes, key_bits, key_scale, key_zero, v, value_planes, *rest):
    head_dim = v.shape[-1] if v is not None else value_planes[0].shape[3] * CHANNEL_TILE
    return q.new_empty((*q.shape[:3], head_dim)), q.new_empty(q.shape[:3])
