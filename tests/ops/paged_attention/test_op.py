"""The operator of paged attention: which way a call takes. What it computes is in test_paged_operator.py."""

import dataclasses

import pytest
import torch

from headq_ao.ops.paged_attention import op, tiled
from headq_ao.ops.paged_attention.op import paged_attention, plan_attention
from tests.ops.paged_cases import Case, make


def test_without_a_kernel_tiles_serve(monkeypatch):
    """Where the device has none, and where the one it has declines; what it gives is handed on."""
    kv, readers = make(Case())
    q = torch.randn(1, 6, 1, 64)
    want = tiled.paged_attention(q, 0.1, kv, readers, None, 0, None)

    class Kernel:
        answer = None

        @classmethod
        def launch(cls, *args):
            return cls.answer

    for module in (None, Kernel):
        monkeypatch.setattr(op, "kernels", lambda operator, device, module=module: module)
        for x, y in zip(paged_attention(q, 0.1, kv, readers), want, strict=True):
            assert torch.equal(x, y)
        assert plan_attention(kv, readers, 6) is None, "it has no plan"
    Kernel.answer = object()
    assert paged_attention(q, 0.1, kv, readers) is Kernel.answer


@pytest.mark.parametrize("how", ["gradients", "compiled"])
def test_an_engines_cache_is_not_traced(how):
    kv, readers = make(Case())
    owned = dataclasses.replace(kv, window_table=torch.zeros(1, 1).int())
    q = torch.randn(1, 6, 1, 64, requires_grad=how == "gradients")
    call = paged_attention if how == "gradients" else torch.compile(paged_attention, backend="eager")
    with pytest.raises((NotImplementedError, RuntimeError), match="window_table in its schema"):
        call(q, 0.1, owned, readers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_shapes_and_dtypes_of_a_traced_call(dtype):
    """Those of a real one: the values' dimension, fp32 or fp64."""
    kv, readers = make(Case(keys=((2,) * 48,), key_dim=48, value_dim=32))
    q = torch.randn(1, 6, 3, 48).to(dtype)
    real = paged_attention(q, 0.1, kv, readers)
    fake = op._fake(q.to("meta"), 0.1, kv.pages, kv.layout)
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]
    assert real[0].shape == (1, 6, 3, 32)


def test_a_plan_is_of_a_cache_without_new_tokens():
    kv, readers = make(Case(new=(2,)))
    with pytest.raises(ValueError, match="without new_k and new_v"):
        plan_attention(kv, readers, 6)
    with pytest.raises(ValueError, match="query heads must be a multiple"):
        plan_attention(kv, readers, 5)
