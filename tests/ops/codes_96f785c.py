"""How commit 96f785c coded tokens with error feedback: its kernel, and the few lines of PyTorch before and after it."""

import ctypes
import functools
from pathlib import Path

import pytest
import torch

from headq_ao.ops import cpu_build

_INTS = "matrices heads batch rows width bits spreads passes unbiased threads"
_POINTERS = "y metric feedback step matrix spread codes scale"


class _Args(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in _INTS.split()), *((name, ctypes.c_void_p) for name in _POINTERS.split())
    )  # fmt: skip


@functools.cache
def library():
    return cpu_build.load(Path(__file__).with_suffix(".cpp"))


def feedback_codes(y, metric, factor, step, bits, unbiased):
    """Codes and σ of ``y [B, H, T, M]``."""
    batch, heads, rows, width = y.shape
    own = metric.shape[:2]
    index = torch.arange(own.numel(), dtype=torch.int32).view(own).expand(batch, heads).contiguous()
    y, metric, factor, step = (
        x.float().contiguous() for x in (y, metric, factor, step.expand(*own, width))
    )  # fmt: skip
    spread = torch.tensor((0.7, 0.85, 1.0, 1.15, 1.3))
    codes, scale = torch.empty(y.shape, dtype=torch.uint8), torch.empty(y.shape[:-1])
    pointers = zip(_POINTERS.split(), (y, metric, factor, step, index, spread, codes, scale), strict=True)
    args = _Args(
        matrices=own.numel(), heads=heads, batch=batch, rows=rows, width=width, bits=bits, spreads=5, passes=2,
        unbiased=unbiased, threads=1, **{name: x.data_ptr() for name, x in pointers},
    )  # fmt: skip
    assert library().headq_feedback_codes(ctypes.byref(args)) == 0
    return codes, scale.half()


def quantize(x, encoder):
    """Codes and stored scale of tokens ``x [B, h, T, D]``, T at least 2, as encode_keys and encode_values gave them."""
    assert x.shape[2] > 1
    x = x if encoder.unit is None else x / encoder.unit.unsqueeze(-1)
    y = (x.float() - encoder.mean.unsqueeze(-2)) @ encoder.encode
    number = isinstance(encoder.step, float)
    step = torch.full((1, 1, y.shape[-1]), encoder.step) if number else encoder.step
    codes, scale = feedback_codes(y, encoder.hessian, encoder.factor, step, encoder.bits[0], encoder.unbiased)
    return codes, (scale.float() * encoder.step).clamp(2.0**-24, 65504).half() if number else scale


@functools.cache
def products_in_order():
    """Whether PyTorch's matrix products sum as the kernels do on this CPU: in order, by fused multiply-adds."""
    for tokens in (2, 32, 300):
        for dim in (64, 256):
            g = torch.Generator().manual_seed(dim + tokens)
            x, w = torch.randn(tokens, dim, generator=g), torch.randn(dim, dim, generator=g)
            total = torch.zeros(tokens, dim)
            for i in range(dim):
                total = (total.double() + x[:, i, None].double() * w[i].double()).float()
            if (total != x @ w).float().mean() > 1e-3:  # double rounding may show now and then
                return False
    return True


def skip_unless_in_order():
    """Skip a test that compares bit for bit with codes behind PyTorch's matrix products."""
    if not products_in_order():
        pytest.skip("PyTorch's matrix products sum in another order on this CPU: codes agree but for ties")
