"""The compiled CPU kernel behind ``decode_attention``: arguments for the C interface of cpu_kernel.cpp."""

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from headq_ao.ops import cpu_build
from headq_ao.ops.layout import PIECES, plane_pieces, query_planes

PATHS = {"portable": 0, "avx2": 1, "avx512": 2}
_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Plane(ctypes.Structure):
    _fields_ = (("data", _P), ("batch", _I64), ("head", _I64), ("tile", _I64), ("width", _I32), ("columns", _I32))


class _Scale(ctypes.Structure):
    _fields_ = (("data", _P), ("batch", _I64), ("head", _I64), ("token", _I64))


_INTS = "batch kv_heads queries slots head_dim key_planes value_planes value_bits groups threads isa new_tokens"


class _Args(ctypes.Structure):
    _fields_ = (
        *((name, _I32) for name in _INTS.split()),
        ("k", _Plane * 3),
        ("v", _Plane * 2),
        *((name, _Scale) for name in ("k_scale", "k_zero", "v_scale", "v_zero")),
        ("q", _P * 3),
        *((name, _P) for name in ("bias", "zero_query", "gauge", "start", "stop", "valid")),
        ("valid_stride", _I64),
        ("out", _P),
        ("lse", _P),
    )


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
) -> tuple[Tensor, Tensor]:
    """:func:`headq_ao.ops.decode_attention` for fp32 queries over packed keys and packed values."""
    batch, heads, new, _ = q.shape
    kv_heads, slots = key_scale.shape[1:]
    head_dim = value_planes[0].shape[3] * value_planes[0].shape[4]
    planes = [p.contiguous() for p in query_planes(q, key_bits)]
    rows = [x.contiguous() for x in (bias, zero_query, gauge, start, stop)]
    out, lse = q.new_empty(batch, heads, new, head_dim), q.new_empty(batch, heads, new)
    mask = None if valid is None else valid if valid.stride(1) == 1 else valid.contiguous()
    # lists, so that what is made contiguous here lives until the call returns
    key_planes, value_planes = [_dense(p) for p in key_planes], [_dense(p) for p in value_planes]
    scales = [None if x is None else _dense(x) for x in (key_scale, key_zero, value_scale, value_zero)]
    widths = plane_pieces(tuple(key_bits))
    key = [_plane(p, w, x.shape[-1]) for p, w, x in zip(key_planes, widths, planes, strict=True)]
    args = _Args(
        batch=batch, kv_heads=kv_heads, queries=heads // kv_heads * new, slots=slots, head_dim=head_dim,
        key_planes=len(key_planes), value_planes=len(value_planes), value_bits=value_bits,
        groups=value_scale.shape[3], threads=torch.get_num_threads(), isa=code_path(lib), new_tokens=new,
        k=(_Plane * 3)(*key),
        v=(_Plane * 2)(*(_plane(p, w, head_dim) for p, w in zip(value_planes, PIECES[value_bits], strict=True))),
        **{name: _scale(x) for name, x in zip(("k_scale", "k_zero", "v_scale", "v_zero"), scales, strict=True)},
        q=(_P * 3)(*(x.data_ptr() for x in planes)),
        bias=rows[0].data_ptr(), zero_query=rows[1].data_ptr(), gauge=rows[2].data_ptr(),
        start=rows[3].data_ptr(), stop=rows[4].data_ptr(),
        valid=None if mask is None else mask.data_ptr(), valid_stride=0 if mask is None else mask.stride(0),
        out=out.data_ptr(), lse=lse.data_ptr(),
    )  # fmt: skip
    if lib.headq_decode_attention(ctypes.byref(args)):
        raise MemoryError(f"decode_attention had no memory for its partial sums over {slots} slots")
    return out, lse


def _dense(x: Tensor) -> Tensor:
    """``x`` with its entries of one token tile packed together; batch, heads and tokens may have any stride."""
    if x.ndim == 3 or not x.shape[2]:
        return x
    return x if x[0, 0, 0].is_contiguous() else x.contiguous()


def _plane(plane: Tensor, width: int, columns: int) -> _Plane:
    return _Plane(plane.data_ptr(), plane.stride(0), plane.stride(1), plane.stride(2), width, columns)


def _scale(scale: Tensor | None) -> _Scale:
    if scale is None:
        return _Scale()
    return _Scale(scale.data_ptr(), scale.stride(0), scale.stride(1), scale.stride(2))
