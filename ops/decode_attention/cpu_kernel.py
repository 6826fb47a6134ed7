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
from headq_ao.ops.layout import PIECES, granule, plane_columns, plane_pieces, query_planes

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
    _, heads, new, _ = q.shape
    bits = tuple(key_bits)
    direct, planes, strides = _query_planes(q, bits)
    (bias, zero_query, gauge), scalar_row = _rows(bias, zero_query, gauge)
    start, stop = start.contiguous(), stop.contiguous()
    scales = (key_scale, key_zero, value_scale, value_zero)
    args, stored = _stored(bits, direct, value_bits, key_planes, value_planes, scales)
    batch = args.batch
    out, lse = q.new_empty(batch, heads, new, args.head_dim), q.new_empty(batch, heads, new)
    args.queries, args.new_tokens = heads // args.kv_heads * new, new
    args.threads, args.isa = torch.get_num_threads(), code_path(lib)
    args.q[:], args.q_row[:] = [x.data_ptr() for x in planes], strides
    args.bias, args.zero_query, args.gauge = bias.data_ptr(), zero_query.data_ptr(), gauge.data_ptr()
    args.start, args.stop, args.scalar_row = start.data_ptr(), stop.data_ptr(), scalar_row
    if valid is not None:
        valid = valid if valid.stride(1) == 1 else valid.contiguous()
        args.valid, args.valid_stride = valid.data_ptr(), valid.stride(0)
    args.out, args.lse = out.data_ptr(), lse.data_ptr()
    kept = [] if exact is None else _set_exact(args, exact)
    if lib.headq_decode_attention(ctypes.byref(args), None, 0):
        raise MemoryError(f"decode_attention had no memory for its partial sums over {args.slots} slots")
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
            form, stored = _stored(tuple(keys.bits), True, values.bits[0], keys.planes, values.planes, scales)
            given = (*keys.planes, *values.planes, *scales)
            assert all(map(operator.is_, stored, given)), "a cache's planes lie as the kernel reads them"
            form.first, form.heads = first, form.kv_heads
            self.runs[i], first = form.run, first + form.heads
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
        self.stop[:] = [*slots]
        self.exact_stop[:] = [*exact_rows]
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


def _query_planes(q: Tensor, bits: tuple[int, ...]) -> tuple[bool, list[Tensor], list[int]]:
    """Whether all planes read the query as it is, the query of each, and the distance of its rows; three of each.

    As it is where all coordinates have the same bits and fill whole granules: a plane then weighs by a power of two.
    """
    if one_query(bits) and (row := row_stride(q.shape, q.stride())) is not None:
        return True, [q] * 3, [row] * 3
    planes = [p.contiguous() for p in query_planes(q, bits)]
    planes += planes[:1] * (3 - len(planes))
    return False, planes, [p.shape[-1] for p in planes]


@functools.lru_cache(maxsize=1024)
def row_stride(shape: tuple[int, ...], stride: tuple[int, ...]) -> int | None:
    """The distance of rows ``[.., n]`` of ``[B, H, S, n]`` that lie evenly, None where they do not."""
    b, h, s, n = shape
    row = stride[2] if s > 1 else stride[1] if h > 1 else stride[0] if b > 1 else n
    even = (b == 1 or stride[0] == h * s * row) and (h == 1 or stride[1] == s * row) and (s == 1 or stride[2] == row)
    return row if even and (n == 1 or stride[3] == 1) else None


def _rows(*tensors: Tensor) -> tuple[Sequence[Tensor], int]:
    """``[B, H, S]`` tensors of one shape whose entries all lie one distance apart."""
    first, *others = [x.stride() for x in tensors]
    if all([stride == first for stride in others]):
        row = row_stride((*tensors[0].shape, 1), (*first, 1))
        if row is not None:
            return tensors, row
    return [x.contiguous() for x in tensors], 1


def _set_exact(args: _Args, x: ExactRows) -> list[Tensor]:
    """Fill in exact rows; returns the tensors that must live until the call returns."""
    row = row_stride(x.q.shape, x.q.stride())
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
    key_bits: tuple[int, ...], direct: bool, value_bits: int, key_planes: Sequence[Tensor],
    value_planes: Sequence[Tensor], scales: Sequence[Tensor | None],
) -> tuple[_Args, list[Tensor | None]]:  # fmt: skip
    """``_Args`` of packed rows, and the tensors that it points to; ``scales``: scale and zero of keys, then of values;
    ``direct``: of :func:`_query_planes`.

    Everything but addresses is kept for the next call with rows of this form.
    """
    stored, n = [*key_planes, *value_planes, *scales], len(key_planes)
    forms = tuple([None if x is None else (x.shape, x.stride()) for x in stored])
    layout = _layout(key_bits, direct, value_bits, forms)
    if layout is None:
        keys, values = ([x.contiguous() for x in planes] for planes in (key_planes, value_planes))
        dense = [None if x is None else x.contiguous() for x in scales]
        return _stored(key_bits, direct, value_bits, keys, values, dense)
    args = _Args.from_buffer_copy(layout)
    addresses = [None if x is None else x.data_ptr() for x in stored]
    for plane, at in zip((*args.k[:n], *args.v[: len(value_planes)]), addresses[:-4], strict=True):
        plane.data = at
    args.k_scale.data, args.k_zero.data, args.v_scale.data, args.v_zero.data = addresses[-4:]
    return args, stored


@functools.lru_cache(maxsize=1024)
def _layout(key_bits: tuple[int, ...], direct: bool, value_bits: int, forms: tuple[_Form | None, ...]) -> _Args | None:
    """``_Args`` of packed rows without addresses; None where the entries of a token tile do not lie together.

    ``forms`` are those of the planes of keys, of the planes of values, and of four scales, of which some may lack.
    """
    pieces, planes = plane_pieces(key_bits), [f for f in forms[:-4] if f is not None]
    k_scale, k_zero, v_scale, v_zero = forms[-4:]
    if not all(_dense(f) for f in (*planes, v_scale, v_zero) if f is not None):
        return None
    assert k_scale is not None and v_scale is not None
    n, (batch, kv_heads, slots) = len(pieces), k_scale[0]
    head_dim = planes[n][0][3] * planes[n][0][4]
    columns = [len(key_bits) if direct else plane_columns(width, len(x)) for width, x in pieces.items()]
    weights = [float(1 << x[0][1]) if direct else 1.0 for x in pieces.values()]  # else the query has them
    key = zip(planes[:n], pieces, columns, strict=True)
    value = zip(planes[n:], PIECES[value_bits], strict=True)
    run = _Run(
        key_planes=n, value_planes=len(planes) - n, value_bits=value_bits, groups=v_scale[0][3],
        k=(_Plane * 3)(*(_Plane(None, *f[1][:3], width, columns) for f, width, columns in key)),
        v=(_Plane * 2)(*(_Plane(None, *f[1][:3], width, head_dim) for f, width in value)),
        k_scale=_scale(k_scale), k_zero=_scale(k_zero), v_scale=_scale(v_scale), v_zero=_scale(v_zero),
        q_weight=(ctypes.c_float * 3)(*weights),
    )  # fmt: skip
    return _Args(run, batch=batch, kv_heads=kv_heads, slots=slots, head_dim=head_dim)


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
