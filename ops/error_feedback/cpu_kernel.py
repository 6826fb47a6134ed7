"""The compiled CPU kernel behind ``feedback_codes``: arguments for the C interface of cpu_kernel.cpp."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from headq_ao.ops import cpu_build

_P, _I32 = ctypes.c_void_p, ctypes.c_int32
_INTS = "matrices heads batch tokens width bits unbiased scale_bits threads"
_POINTERS = "y hessian ldl step matrix codes scale"


class _Args(ctypes.Structure):
    _fields_ = (*((name, _I32) for name in _INTS.split()), *((name, _P) for name in _POINTERS.split()))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where there is no compiler."""
    lib = cpu_build.load(Path(__file__).with_name("cpu_kernel.cpp"))
    if lib is not None:
        assert lib.headq_feedback_args_size() == ctypes.sizeof(_Args), "cpu_kernel.py and .cpp disagree about Args"
    return lib


def launch(
    y: Tensor,
    hessian: Tensor,
    ldl: Tensor,
    step: Tensor,
    bits: int,
    unbiased: bool,
    scale_bits: int = 16,
) -> tuple[Tensor, Tensor] | None:
    """:func:`headq_ao.ops.feedback_codes` in fp32; None for fp64 and where there is no compiler."""
    lib = None if y.dtype == torch.float64 else library()
    if lib is None:
        return None
    batch, heads, tokens, width = y.shape
    y = y.float().contiguous()
    own = hessian.shape[:2]
    index = _matrix_of(own, batch, heads)
    hessian = hessian.float().contiguous()
    ldl = ldl.float().contiguous()
    step = step.float().expand(*own, width).contiguous()
    codes = torch.empty(y.shape, dtype=torch.uint8, device="cpu")
    scale = torch.empty(y.shape[:-1], dtype=torch.float32, device="cpu")
    pointers = zip(_POINTERS.split(), (y, hessian, ldl, step, index, codes, scale), strict=True)
    args = _Args(
        matrices=own.numel(), heads=heads, batch=batch, tokens=tokens, width=width, bits=bits, unbiased=unbiased,
        scale_bits=scale_bits, threads=torch.get_num_threads(),
        **{name: tensor.data_ptr() for name, tensor in pointers},
    )  # fmt: skip
    if lib.headq_feedback_codes(ctypes.byref(args)):
        raise MemoryError(f"feedback_codes had no memory for its working set over {tokens} tokens of {width}")
    return codes, scale.half()


@functools.lru_cache(maxsize=64)
def _matrix_of(own: torch.Size, batch: int, heads: int) -> Tensor:
    """Which matrix each head of each sequence uses."""
    return torch.arange(own.numel(), dtype=torch.int32, device="cpu").view(own).expand(batch, heads).contiguous()
