"""The compiled kernel behind :func:`headq_ao.evals.baselines.trellis_code.viterbi`: arguments for trellis.cpp."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from headq_ao.ops import cpu_build

_P, _I32 = ctypes.c_void_p, ctypes.c_int32
_INTS = "rows width bits classes has_metric has_start threads"
_POINTERS = "x levels factor weight start symbols"


class _Args(ctypes.Structure):
    _fields_ = (*((name, _I32) for name in _INTS.split()), *((name, _P) for name in _POINTERS.split()))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where there is no compiler."""
    lib = cpu_build.load(Path(__file__).with_name("trellis.cpp"))
    if lib is not None:
        assert lib.trellis_args_size() == ctypes.sizeof(_Args), "trellis_kernel.py and .cpp disagree about Args"
    return lib


def launch(
    x: Tensor, levels: Tensor, bits: int, factor: Tensor | None, weight: Tensor | None, start: Tensor | None
) -> Tensor | None:
    """Symbols uint8 ``[n, D]``; None on other devices than the CPU, and where there is no compiler."""
    lib = library() if x.device.type == "cpu" else None
    if lib is None:
        return None
    x, symbols = x.float().contiguous(), torch.empty(x.shape, dtype=torch.uint8)
    table = levels.float().view(-1, 2**bits).T.contiguous()
    tensors = (x, table, *(t if t is None else t.contiguous() for t in (factor, weight, start)), symbols)
    args = _Args(
        rows=len(x), width=x.shape[1], bits=bits, classes=table.shape[1], has_metric=factor is not None,
        has_start=start is not None, threads=torch.get_num_threads(),
        **{name: None if t is None else t.data_ptr() for name, t in zip(_POINTERS.split(), tensors, strict=True)},
    )  # fmt: skip
    if lib.trellis_codes(ctypes.byref(args)):
        raise MemoryError(f"the trellis had no memory for its working set over rows of {x.shape[1]}")
    return symbols
