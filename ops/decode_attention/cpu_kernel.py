"""The compiled CPU kernel behind ``decode_attention``: arguments for the C interface of cpu_kernel.cpp."""

import ctypes
import functools
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headq_ao.ops import cpu_build
from headq_ao.ops.layout import PIECES, granule, plane_pieces, query_planes

PATHS = {"portable": 0, "avx2": 1, "avx512": 2}
_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Plane(ctypes.Structure):
    _fields_ = (("data", _P), ("batch", _I64), ("head", _I64), ("tile", _I64), ("width", _I32), ("columns", _I32))


class _Scale(ctypes.Structure):
    _fields_ = (("data", _P), ("batch", _I64), ("head", _I64), ("token", _I64))


class _Exact(ctypes.Structure):
    _fields_ = (
        ("k", _P),
        ("v", _P),
        *((name, _I64) for name in ["k_batch", "k_head", "k_token", "v_batch", "v_head", "v_token", "q_row"]),
        *((name, _P) for name in ("q", "start", "stop")),
        ("dtype", _I32),
        ("rows", _I32),
        ("scaling", ctypes.c_float),
    )


EXACT_DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_INTS = "batch kv_heads queries slots head_dim threads isa new_tokens"
_RUN_INTS = "first heads key_planes value_planes value_bits groups"


class _Run(ctypes.Structure):
    _fields_ = (
        *((name, _I32) for name in _RUN_INTS.split()),
        ("k", _Plane * 3),
        ("v", _Plane * 2),
        *((name, _Scale) for name in ("k_scale", "k_zero", "v_scale", "v_zero")),
        ("q_weight", ctypes.c_float * 3),
    )


class _Args(ctypes.Structure):
    _anonymous_ = ("run",)
    _fields_ = (
        ("run", _Run),
        *((name, _I32) for name in _INTS.split()),
        ("q", _P * 3),
        *((name, _P) for name in ("bias", "zero_query", "gauge")),
        ("q_row", _I64 * 3),
        ("scalar_row", _I64),
        *((name, _P) for name in ("start", "stop", "valid")),
        ("valid_stride", _I64),
        ("out", _P),
        ("lse", _P),
        ("exact", _Exact),
        ("read", _P),
        ("mean", _P),
        *((name, _I64) for name in ["read_batch", "read_head", "mean_batch", "mean_head"]),
        ("map", _P),
        ("map_batch", _I64),
        ("map_head", _I64),
    )


class ExactRows(NamedTuple):
    """Exact rows that the same queries see: ``q [B, Hq, S, D]`` with the scaling in it, ``k``, ``v [B, Hkv, n, D]``,
    the visible range ``start``, ``stop [B, S]``, and ``read [B or 1, Hkv or 1, D, D]``, ``mean [B or 1, Hkv or 1, D]``
    or None, with which the packed rows' readout returns to the basis of ``v``."""

    q: Tensor
    k: Tensor
    v: Tensor
    start: Tensor
    stop: Tensor
    read: Tensor
    mean: Tensor | None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where there is no compiler."""
    lib = cpu_build.load(Path(__file__).with_name("cpu_kernel.cpp"))
    if lib is not None:
        lib.headq_decode_attention.restype = ctypes.c_int
        same = lib.headq_args_size() == ctypes.sizeof(_Args) and lib.headq_run_size() == ctypes.sizeof(_Run)
        assert same, "cpu_kernel.py and cpu_kernel.cpp disagree about Args or Run"
    return lib


def code_path(lib: ctypes.CDLL) -> int:
    """The best path that was compiled, or a lower one that ``HEADQ_CPU_ISA`` names."""
    path: int = lib.headq_isa()
    if path < 0:
        known = [name for name, i in PATHS.items() if i <= lib.headq_best_isa()]
        raise ValueError(f"HEADQ_CPU_ISA must be one of {known}, got {os.environ.get('HEADQ_CPU_ISA')!r}")
    return path


def decode_attention(
    lib: ctypes.CDLL,
    q: Tensor,
    bias: Tensor,
    zero_query: Tensor,
    gauge: Tensor,
    key_planes: Sequence[Tensor],
    key_bits: Sequence[int],
    key_scale: Tensor,
    key_zero: Tensor | None,
    value_planes: Sequence[Tensor],
    value_bits: int,
    value_scale: Tensor,
    value_zero: Tensor | None,
    start: Tensor,
    stop: Tensor,
    valid: Tensor | None,
    *,
    exact: ExactRows | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`headq_ao.ops.decode_attention` for fp32 queries over packed keys and packed values; with ``exact``,
    :func:`headq_ao.ops.attend`."""
    batch, heads, new, _ = q.shape
    kv_heads, slots = key_scale.shape[1:]
    planes, strides, weights = _query_planes(q, tuple(key_bits))
    scalars, scalar_row = _rows(bias, zero_query, gauge)
    rows = [start.contiguous(), stop.contiguous()]
    mask = None if valid is None else valid if valid.stride(1) == 1 else valid.contiguous()
    columns = tuple([x.shape[-1] for x in planes])
    scales = [key_scale, key_zero, value_scale, value_zero]
    run, stored = _stored(tuple(key_bits), columns, value_bits, key_planes, value_planes, scales)
    args = _Args(run=run, head_dim=run.v[0].columns)
    out = q.new_empty(batch, heads, new, args.head_dim)
    lse = q.new_empty(batch, heads, new)
    args.heads = args.kv_heads = kv_heads
    args.batch, args.queries, args.slots = batch, heads // kv_heads * new, slots
    args.new_tokens, args.threads, args.isa = new, torch.get_num_threads(), code_path(lib)
    for i, (x, stride, weight) in enumerate(zip(planes, strides, weights, strict=True)):
        args.q[i], args.q_row[i], args.q_weight[i] = x.data_ptr(), stride, weight
    args.bias, args.zero_query, args.gauge = [x.data_ptr() for x in scalars]
    args.start, args.stop, args.scalar_row = rows[0].data_ptr(), rows[1].data_ptr(), scalar_row
    if mask is not None:
        args.valid, args.valid_stride = mask.data_ptr(), mask.stride(0)
    args.out, args.lse = out.data_ptr(), lse.data_ptr()
    kept = [] if exact is None else _set_exact(args, exact)
    if lib.headq_decode_attention(ctypes.byref(args), None, 0):
        raise MemoryError(f"decode_attention had no memory for its partial sums over {slots} slots")
    del stored, kept  # what was made contiguous lives until here
    return out, lse


class Step:
    """:func:`headq_ao.ops.attend` for one new token per sequence, with arguments that are put together once.

    What changes from step to step are the query, the map that takes it to the codes' coordinates, and how many rows
    there are. So the rows are given whole, with unused capacity, and the kernel maps the query: a step over short rows
    costs more in Python than in the kernel.

    Args:
        lib: of :func:`library`.
        runs: packed rows ``[B, heads of the run, capacity]`` of keys and values, run by run of KV heads;
            :func:`one_query` of the keys' bits.
        k, v: exact rows ``[B, Hkv, capacity, D]``.
        read, mean: as in :class:`ExactRows`.
        groups: query heads per KV head.
    """

    def __init__(
        self, lib: ctypes.CDLL, runs: Sequence[tuple[Any, Any]], k: Tensor, v: Tensor, read: Tensor,
        mean: Tensor | None, groups: int,
    ) -> None:  # fmt: skip
        self.lib = lib
        batch, kv_heads, _, head_dim = k.shape
        read, mean = read.contiguous(), None if mean is None else mean.contiguous()
        self.start, self.stop, self.exact_stop = ((_I64 * batch)() for _ in range(3))
        start, stop, exact_stop = (ctypes.addressof(x) for x in (self.start, self.stop, self.exact_stop))
        lse = k.new_empty(batch, kv_heads, groups, dtype=torch.float32)
        self.runs, self.kept = (_Run * len(runs))(), [k, v, read, mean, lse]
        first = 0
        for i, (keys, values) in enumerate(runs):
            scales = (keys.scale, keys.zero, values.scale, values.zero)
            columns = (len(keys.bits),) * len(keys.planes)
            run, stored = _stored(tuple(keys.bits), columns, values.bits[0], keys.planes, values.planes, scales)
            given = (*keys.planes, *values.planes, *scales)
            assert all(map(operator.is_, stored, given)), "a cache's planes lie as the kernel reads them"
            run.first, run.heads = first, keys.scale.shape[1]
            run.q_weight = (ctypes.c_float * 3)(*_weights(keys.bits))
            self.runs[i], first = run, first + run.heads
            self.kept += stored
        self.args = args = _Args(batch=batch, kv_heads=kv_heads, queries=groups, new_tokens=1, head_dim=head_dim)
        args.start, args.stop, args.lse = start, stop, lse.data_ptr()
        args.exact = _Exact(**_exact_store(k, v), q_row=head_dim, start=start, stop=exact_stop)
        _set_per_head(args, read=read, mean=mean)
        self.exact, self.reference = args.exact, ctypes.byref(args)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: a copied cache makes one of its own."""

    def __call__(
        self, q: Tensor, query_map: Tensor, scaling: float, slots: Sequence[int], exact_rows: Sequence[int]
    ) -> Tensor:
        """``[B, Hq, 1, D]`` fp32, where each sequence sees so many rows of either kind, from fp32 and contiguous
        ``q [B, Hq, 1, D]`` and ``query_map [B or 1, Hkv or 1, D, M + 3]``: ``q · scaling`` times it gives ``q̃``, ``b``,
        ``h`` and ``q·μ``."""
        assert query_map.is_contiguous()
        out = torch.empty_like(q)
        args, exact = self.args, self.exact
        self.stop[:], self.exact_stop[:] = slots, exact_rows
        args.slots, exact.rows, exact.scaling = max(slots), max(exact_rows), scaling
        args.threads, args.isa = torch.get_num_threads(), code_path(self.lib)
        exact.q, args.out = q.data_ptr(), out.data_ptr()
        _set_per_head(args, map=query_map)
        if self.lib.headq_decode_attention(self.reference, self.runs, len(self.runs)):
            raise MemoryError(f"decode_attention had no memory for its partial sums over {max(slots)} slots")
        return out


@functools.lru_cache(maxsize=256)
def one_query(bits: tuple[int, ...]) -> bool:
    """Whether all planes read the query as it is: the same bits in whole granules, and a plane for each piece."""
    pieces = PIECES[bits[0]]
    same = len(set(bits)) == 1 and len(set(pieces)) == len(pieces)
    return same and all(len(bits) % granule(w) == 0 for w in pieces)


def _query_planes(q: Tensor, bits: tuple[int, ...]) -> tuple[list[Tensor], list[int], list[float]]:
    """The query of each plane, the distance of its rows, and what the plane's codes count.

    Where all coordinates have the same bits and fill whole granules, that is the query itself, times a power of two.
    """
    if one_query(bits) and (row := _row_stride(q.shape, q.stride())) is not None:
        weights = _weights(bits)
        return [q] * len(weights), [row] * len(weights), weights
    planes = [p.contiguous() for p in query_planes(q, bits)]
    return planes, [p.shape[-1] for p in planes], [1.0] * len(planes)


def _weights(bits: tuple[int, ...]) -> list[float]:
    """What the codes of each plane count where :func:`one_query` holds."""
    pieces = PIECES[bits[0]]
    return [float(1 << sum(pieces[:i])) for i in range(len(pieces))]


@functools.lru_cache(maxsize=1024)
def _row_stride(shape: tuple[int, ...], stride: tuple[int, ...]) -> int | None:
    """The distance of rows ``[.., n]`` of ``[B, H, S, n]`` that lie evenly, None where they do not."""
    b, h, s, n = shape
    row = stride[2] if s > 1 else stride[1] if h > 1 else stride[0] if b > 1 else n
    even = (b == 1 or stride[0] == h * s * row) and (h == 1 or stride[1] == s * row) and (s == 1 or stride[2] == row)
    return row if even and (n == 1 or stride[3] == 1) else None


def _rows(*tensors: Tensor) -> tuple[list[Tensor], int]:
    """``[B, H, S]`` tensors whose entries all lie one distance apart."""
    strides = {_row_stride((*x.shape, 1), (*x.stride(), 1)) for x in tensors}
    if len(strides) == 1 and (row := strides.pop()) is not None:
        return list(tensors), row
    return [x.contiguous() for x in tensors], 1


def _set_exact(args: _Args, x: ExactRows) -> list[Tensor]:
    """Fill in exact rows; returns the tensors that must live until the call returns."""
    row = _row_stride(x.q.shape, x.q.stride())
    q, row = (x.q, row) if row is not None else (x.q.contiguous(), x.q.shape[-1])
    k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (x.k, x.v))
    start, stop, read = x.start.contiguous(), x.stop.contiguous(), x.read.contiguous()
    mean = None if x.mean is None else x.mean.contiguous()
    args.exact = _Exact(
        **_exact_store(k, v), q_row=row, q=q.data_ptr(), start=start.data_ptr(), stop=stop.data_ptr(), rows=k.shape[2],
        scaling=1.0,
    )  # fmt: skip
    _set_per_head(args, read=read, mean=mean)
    return [t for t in (q, k, v, start, stop, read, mean) if t is not None]


def _exact_store(k: Tensor, v: Tensor) -> dict[str, int]:
    """The fields of ``_Exact`` that say where keys and values lie."""
    fields = {"k": k.data_ptr(), "v": v.data_ptr(), "dtype": EXACT_DTYPES[k.dtype]}
    for name, t in (("k", k), ("v", v)):
        fields |= {f"{name}_{axis}": t.stride(i) for i, axis in enumerate(("batch", "head", "token"))}
    return fields


def _set_per_head(args: _Args, **tensors: Tensor | None) -> None:
    """Where tensors ``[B or 1, Hkv or 1, ..]`` lie, contiguous for a head: the fields of ``_Args`` of those names."""
    for name, t in tensors.items():
        if t is not None:
            batch, heads = t.shape[:2]
            setattr(args, name, t.data_ptr())
            setattr(args, f"{name}_batch", 0 if batch == 1 else t.stride(0))
            setattr(args, f"{name}_head", 0 if heads == 1 else t.stride(1))


_Form = tuple[tuple[int, ...], tuple[int, ...]]  # shape and stride


def _stored(
    key_bits: tuple[int, ...], columns: tuple[int, ...], value_bits: int, key_planes: Sequence[Tensor],
    value_planes: Sequence[Tensor], scales: Sequence[Tensor | None],
) -> tuple[_Run, list[Tensor | None]]:  # fmt: skip
    """``_Run`` of packed rows, and the tensors that it points to; ``scales``: scale and zero of keys, then of values.

    Everything but addresses is kept for the next call with rows of this form.
    """
    stored, n = [*key_planes, *value_planes, *scales], len(key_planes)
    forms = tuple([None if x is None else (x.shape, x.stride()) for x in stored])
    layout = _layout(key_bits, columns, value_bits, forms)
    if layout is None:
        keys, values = ([x.contiguous() for x in planes] for planes in (key_planes, value_planes))
        dense = [None if x is None else x.contiguous() for x in scales]
        return _stored(key_bits, columns, value_bits, keys, values, dense)
    run = _Run.from_buffer_copy(layout)
    addresses = [None if x is None else x.data_ptr() for x in stored]
    for i, at in enumerate(addresses[:n]):
        run.k[i].data = at
    for i, at in enumerate(addresses[n:-4]):
        run.v[i].data = at
    run.k_scale.data, run.k_zero.data, run.v_scale.data, run.v_zero.data = addresses[-4:]
    return run, stored


@functools.lru_cache(maxsize=1024)
def _layout(
    key_bits: tuple[int, ...], columns: tuple[int, ...], value_bits: int, forms: tuple[_Form | None, ...]
) -> _Run | None:
    """``_Run`` of packed rows without addresses; None where the entries of a token tile do not lie together.

    ``forms`` are those of the planes of keys, of the planes of values, and of four scales, of which some may lack.
    """
    n, planes = len(plane_pieces(key_bits)), [f for f in forms[:-4] if f is not None]
    k_scale, k_zero, v_scale, v_zero = forms[-4:]
    if not all(_dense(f) for f in (*planes, v_scale, v_zero) if f is not None):
        return None
    assert v_scale is not None
    head_dim = planes[n][0][3] * planes[n][0][4]
    key = zip(planes[:n], plane_pieces(key_bits), columns, strict=True)
    value = zip(planes[n:], PIECES[value_bits], strict=True)
    return _Run(
        key_planes=n, value_planes=len(planes) - n, value_bits=value_bits, groups=v_scale[0][3],
        k=(_Plane * 3)(*(_Plane(None, *f[1][:3], width, columns) for f, width, columns in key)),
        v=(_Plane * 2)(*(_Plane(None, *f[1][:3], width, head_dim) for f, width in value)),
        k_scale=_scale(k_scale), k_zero=_scale(k_zero), v_scale=_scale(v_scale), v_zero=_scale(v_zero),
    )  # fmt: skip


def _dense(form: _Form) -> bool:
    """Whether the entries of one token tile lie together; batch, heads and tokens may have any stride."""
    expected = 1
    for size, step in zip(reversed(form[0][3:]), reversed(form[1][3:]), strict=True):
        if size != 1 and step != expected:
            return 0 in form[0]
        expected *= size
    return True


def _scale(form: _Form | None) -> _Scale:
    return _Scale() if form is None else _Scale(None, *form[1][:3])
