"""The compiled CPU kernel behind ``decode_attention``: arguments for the C interface of cpu_kernel.cpp."""

import ctypes
import functools
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
_INTS = "batch kv_heads queries slots head_dim key_planes value_planes value_bits groups threads isa new_tokens"


class _Args(ctypes.Structure):
    _fields_ = (
        *((name, _I32) for name in _INTS.split()),
        ("k", _Plane * 3),
        ("v", _Plane * 2),
        *((name, _Scale) for name in ("k_scale", "k_zero", "v_scale", "v_zero")),
        ("q", _P * 3),
        *((name, _P) for name in ("bias", "zero_query", "gauge")),
        ("q_row", _I64 * 3),
        ("scalar_row", _I64),
        ("q_weight", ctypes.c_float * 3),
        *((name, _P) for name in ("start", "stop", "valid")),
        ("valid_stride", _I64),
        ("out", _P),
        ("lse", _P),
        ("exact", _Exact),
        ("read", _P),
        ("mean", _P),
        *((name, _I64) for name in ["read_batch", "read_head", "mean_batch", "mean_head"]),
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
        assert lib.headq_args_size() == ctypes.sizeof(_Args), "cpu_kernel.py and cpu_kernel.cpp disagree about Args"
    return lib


def code_path(lib: ctypes.CDLL) -> int:
    """The best path that was compiled, or a lower one that ``HEADQ_CPU_ISA`` names."""
    best: int = lib.headq_best_isa()
    wanted = os.environ.get("HEADQ_CPU_ISA")
    if wanted is None:
        return best
    if wanted not in PATHS or PATHS[wanted] > best:
        raise ValueError(f"HEADQ_CPU_ISA must be one of {[n for n, i in PATHS.items() if i <= best]}, got {wanted!r}")
    return PATHS[wanted]


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
    planes, weights = _query_planes(q, tuple(key_bits))
    scalars, scalar_row = _rows(bias, zero_query, gauge)
    rows = [start.contiguous(), stop.contiguous()]
    mask = None if valid is None else valid if valid.stride(1) == 1 else valid.contiguous()
    # lists, so that what is made contiguous here lives until the call returns
    key_planes, value_planes = [_dense(p) for p in key_planes], [_dense(p) for p in value_planes]
    scales = [None if x is None else _dense(x) for x in (key_scale, key_zero, value_scale, value_zero)]
    stored = _stored(key_planes, tuple(key_bits), [x.shape[-1] for x in planes], value_planes, value_bits, scales)
    out, lse = q.new_empty(batch, heads, new, stored["head_dim"]), q.new_empty(batch, heads, new)
    fields, kept = ({}, None) if exact is None else _exact(exact)
    args = _Args(
        batch=batch, kv_heads=kv_heads, queries=heads // kv_heads * new, slots=slots, new_tokens=new,
        threads=torch.get_num_threads(), isa=code_path(lib), **stored,
        q=(_P * 3)(*(x.data_ptr() for x in planes)), q_row=(_I64 * 3)(*(x.stride(2) for x in planes)),
        q_weight=(ctypes.c_float * 3)(*weights), scalar_row=scalar_row,
        bias=scalars[0].data_ptr(), zero_query=scalars[1].data_ptr(), gauge=scalars[2].data_ptr(),
        start=rows[0].data_ptr(), stop=rows[1].data_ptr(),
        valid=None if mask is None else mask.data_ptr(), valid_stride=0 if mask is None else mask.stride(0),
        out=out.data_ptr(), lse=lse.data_ptr(), **fields,
    )  # fmt: skip
    if lib.headq_decode_attention(ctypes.byref(args)):
        raise MemoryError(f"decode_attention had no memory for its partial sums over {slots} slots")
    del kept
    return out, lse


class Step:
    """:func:`headq_ao.ops.attend` for one new token per sequence, with arguments that are put together once.

    What changes from step to step are the query and how many rows there are, so the rows are given whole, with unused
    capacity: a step over short rows costs more in Python than in the kernel.

    Args:
        lib: of :func:`library`.
        keys, values: packed rows ``[B, Hkv, capacity]``; :func:`one_query` of the keys' bits.
        k, v: exact rows ``[B, Hkv, capacity, D]``.
        read, mean: as in :class:`ExactRows`.
        groups: query heads per KV head.
    """

    def __init__(
        self, lib: ctypes.CDLL, keys: Any, values: Any, k: Tensor, v: Tensor, read: Tensor, mean: Tensor | None,
        groups: int,
    ) -> None:  # fmt: skip
        self.lib = lib
        batch, kv_heads, _, head_dim = k.shape
        m = len(keys.bits)
        read, mean = read.contiguous(), None if mean is None else mean.contiguous()
        self.start, self.stop, self.exact_stop = ((_I64 * batch)() for _ in range(3))
        self.kept = (keys, values, k, v, read, mean)
        start, stop, exact_stop = (ctypes.addressof(x) for x in (self.start, self.stop, self.exact_stop))
        scales = (keys.scale, keys.zero, values.scale, values.zero)
        stored = _stored(keys.planes, keys.bits, [m] * len(keys.planes), values.planes, values.bits[0], scales)
        self.args = _Args(
            batch=batch, kv_heads=kv_heads, queries=groups, new_tokens=1, **stored, start=start, stop=stop,
            q_row=(_I64 * 3)(*[m + 3] * 3), q_weight=(ctypes.c_float * 3)(*_weights(keys.bits)), scalar_row=m + 3,
            exact=_Exact(**_exact_store(k, v), q_row=head_dim, start=start, stop=exact_stop), **_way_back(read, mean),
        )  # fmt: skip
        self.width = m + 3
        self.reference = ctypes.byref(self.args)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: a copied cache makes one of its own."""

    def __call__(
        self, q: Tensor, mapped: Tensor, scaling: float, slots: Sequence[int], exact_rows: Sequence[int]
    ) -> Tensor:
        """``[B, Hq, 1, D]`` fp32 from contiguous fp32 ``q [B, Hq, 1, D]`` and ``mapped [B, Hkv, G, M + 3]``, where
        each sequence sees so many rows of either kind."""
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
        args, at = self.args, mapped.data_ptr()
        self.stop[:] = [*slots]
        self.exact_stop[:] = [*exact_rows]
        args.slots, args.exact.rows, args.exact.scaling = max(slots), max(exact_rows), scaling
        args.threads, args.isa = torch.get_num_threads(), code_path(self.lib)
        args.q[:] = [at] * 3
        scalars = at + 4 * (self.width - 3)
        args.bias, args.zero_query, args.gauge = scalars, scalars + 4, scalars + 8
        args.exact.q, args.out, args.lse = q.data_ptr(), out.data_ptr(), lse.data_ptr()
        if self.lib.headq_decode_attention(self.reference):
            raise MemoryError(f"decode_attention had no memory for its partial sums over {max(slots)} slots")
        return out


@functools.lru_cache(maxsize=256)
def one_query(bits: tuple[int, ...]) -> bool:
    """Whether all planes read the query as it is: the same bits in whole granules, and a plane for each piece."""
    pieces = PIECES[bits[0]]
    same = len(set(bits)) == 1 and len(set(pieces)) == len(pieces)
    return same and all(len(bits) % granule(w) == 0 for w in pieces)


def _query_planes(q: Tensor, bits: tuple[int, ...]) -> tuple[list[Tensor], list[float]]:
    """The query of each plane, rows any distance apart, and what the plane's codes count.

    Where all coordinates have the same bits and fill whole granules, that is the query itself, times a power of two.
    """
    if one_query(bits) and _row_stride(q) is not None:
        weights = _weights(bits)
        return [q] * len(weights), weights
    planes = [p.contiguous() for p in query_planes(q, bits)]
    return planes, [1.0] * len(planes)


def _weights(bits: tuple[int, ...]) -> list[float]:
    """What the codes of each plane count where :func:`one_query` holds."""
    pieces = PIECES[bits[0]]
    return [float(1 << sum(pieces[:i])) for i in range(len(pieces))]


def _row_stride(x: Tensor) -> int | None:
    """The distance of rows ``[.., n]`` of ``[B, H, S, n]`` that lie evenly, None where they do not."""
    b, h, s, n = x.shape
    row = x.stride(2) if s > 1 else x.stride(1) if h > 1 else x.stride(0) if b > 1 else n
    even = (
        (b == 1 or x.stride(0) == h * s * row) and (h == 1 or x.stride(1) == s * row) and (s == 1 or x.stride(2) == row)
    )
    return row if even and (n == 1 or x.stride(3) == 1) else None


def _rows(*tensors: Tensor) -> tuple[list[Tensor], int]:
    """``[B, H, S]`` tensors whose entries all lie one distance apart."""
    strides = {_row_stride(x[..., None]) for x in tensors}
    if len(strides) == 1 and (row := strides.pop()) is not None:
        return list(tensors), row
    return [x.contiguous() for x in tensors], 1


def _exact(x: ExactRows) -> tuple[dict[str, Any], list[Tensor]]:
    """The fields of ``_Args`` for exact rows, and the tensors that must live until the call returns."""
    q = x.q if _row_stride(x.q) is not None else x.q.contiguous()
    k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (x.k, x.v))
    start, stop, read = x.start.contiguous(), x.stop.contiguous(), x.read.contiguous()
    mean = None if x.mean is None else x.mean.contiguous()
    row = _row_stride(q)
    exact = _Exact(
        **_exact_store(k, v), q_row=row, q=q.data_ptr(), start=start.data_ptr(), stop=stop.data_ptr(), rows=k.shape[2],
        scaling=1.0,
    )  # fmt: skip
    fields = {"exact": exact} | _way_back(read, mean)
    return fields, [t for t in (q, k, v, start, stop, read, mean) if t is not None]


def _exact_store(k: Tensor, v: Tensor) -> dict[str, int]:
    """The fields of ``_Exact`` that say where keys and values lie."""
    fields = {"k": k.data_ptr(), "v": v.data_ptr(), "dtype": EXACT_DTYPES[k.dtype]}
    for name, t in (("k", k), ("v", v)):
        fields |= {f"{name}_{axis}": t.stride(i) for i, axis in enumerate(("batch", "head", "token"))}
    return fields


def _way_back(read: Tensor, mean: Tensor | None) -> dict[str, Any]:
    fields = {"read": read.data_ptr(), "mean": None if mean is None else mean.data_ptr()}
    for name, t in (("read", read), ("mean", mean)):
        for dim, axis in enumerate(("batch", "head")):
            fields[f"{name}_{axis}"] = 0 if t is None or t.shape[dim] == 1 else t.stride(dim)
    return fields


def _dense(x: Tensor) -> Tensor:
    """``x`` with its entries of one token tile packed together; batch, heads and tokens may have any stride."""
    if x.ndim == 3 or not x.shape[2]:
        return x
    return x if x[0, 0, 0].is_contiguous() else x.contiguous()


def _stored(
    key_planes: Sequence[Tensor], key_bits: tuple[int, ...], columns: Sequence[int], value_planes: Sequence[Tensor],
    value_bits: int, scales: Sequence[Tensor | None],
) -> dict[str, Any]:  # fmt: skip
    """The fields of ``_Args`` for packed rows; ``scales``: scale and zero of keys, then of values."""
    head_dim = value_planes[0].shape[3] * value_planes[0].shape[4]
    key = zip(key_planes, plane_pieces(key_bits), columns, strict=True)
    value = zip(value_planes, PIECES[value_bits], strict=True)
    names = ("k_scale", "k_zero", "v_scale", "v_zero")
    assert scales[2] is not None
    return {
        "head_dim": head_dim, "key_planes": len(key_planes), "value_planes": len(value_planes),
        "value_bits": value_bits, "groups": scales[2].shape[3], "k": (_Plane * 3)(*(_plane(*x) for x in key)),
        "v": (_Plane * 2)(*(_plane(*x, head_dim) for x in value)),
        **{name: _scale(x) for name, x in zip(names, scales, strict=True)},
    }  # fmt: skip


def _plane(plane: Tensor, width: int, columns: int) -> _Plane:
    return _Plane(plane.data_ptr(), plane.stride(0), plane.stride(1), plane.stride(2), width, columns)


def _scale(scale: Tensor | None) -> _Scale:
    if scale is None:
        return _Scale()
    return _Scale(scale.data_ptr(), scale.stride(0), scale.stride(1), scale.stride(2))
