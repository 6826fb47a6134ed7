"""The operator cache_update: tokens of any form, tracing, and what is refused."""

import functools

import pytest
import torch

from headq_ao.ops.cache_update import cpu_kernel
from headq_ao.ops.cache_update import op as update_op
from headq_ao.ops.cache_update.encoders import flatten
from headq_ao.ops.cache_update.op import cache_update, plan_update
from tests.ops.cache_update.streams import (
    LAYOUTS,
    MIXED,
    Stream,
    assert_equal,
    fill,
    with_kernel,
    with_plan,
    with_quantize,
    with_reference,
)

pytestmark = pytest.mark.skipif(cpu_kernel.library() is None, reason="no compiler")


@pytest.mark.parametrize("run", [with_kernel, with_plan, with_quantize])
def test_tokens_of_another_form(run):
    """Strided, or of another dtype than the window's: as their contiguous copies in its dtype."""
    streams = [Stream(MIXED, dtype=torch.bfloat16) for _ in range(2)]
    for i, n in enumerate((60, 1, 1, 4)):
        k, v = streams[0].tokens(n, i, torch.float32)
        streams[0].call(run, k.to(torch.bfloat16), v.to(torch.bfloat16))
        streams[1].call(run, k.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([v, v], -1)[..., 0])
    assert_equal(*streams)


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_that_are_not_finite(kernel, dtype):
    """Named by sequence, and nothing is written; padding may hold anything."""

    def checked(s, k, v, most):
        if kernel:
            cache_update(s.kv, k, v, s.packed, most, *s.encoders, check_finite=True)
        else:
            update_op.by_quantize(s.kv, k, v, s.packed, most, *s.encoders, True)

    s = fill(Stream(MIXED, dtype=dtype), checked, (40,), padded=False)
    s.call(checked, *(x.clone() for x in s.tokens(4, 1)), real=[4, 2])
    kept = [x.clone() for x in (*s.kv.pages, s.kv.window_k, s.kv.window_v, s.kv.total, s.packed)]
    for name, bad in (("keys", float("inf")), ("values", float("nan"))):
        k, v = (x.clone() for x in s.tokens(3, 2))
        (k if name == "keys" else v)[1, 2, 2, 5] = bad
        message = f"{name} must be finite to be packed, got inf or nan in sequence 1 from slot 42 on"
        with pytest.raises(ValueError, match=message):
            s.call(checked, k, v)
        s.kv.total.copy_(kept[-2])
        s.packed.copy_(kept[-1])
    for x, y in zip((*s.kv.pages, s.kv.window_k, s.kv.window_v), kept[:-2], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["mixed bits", "all sorts"])
def test_opcheck(name):
    s = fill(Stream(LAYOUTS[name]), with_kernel, (40, 1), padded=False)
    kv, (k, v) = s.kv, s.tokens(2, 9)
    kv.held.copy_(kv.total)
    kv.total.add_(2)
    kv.packed.copy_(s.packed)
    s.packed.add_(2)
    for t in (*kv.pages, kv.window_k, kv.window_v):
        t.nan_to_num_(0.0) if t.is_floating_point() else None
    arguments = (
        kv.pages, kv.layout, kv.table, kv.packed, kv.held, kv.total, kv.window_k, kv.window_v, kv.n_sink, k, v,
        kv.new_start, s.packed, 2, *flatten(*s.encoders), False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.headq.cache_update.default, arguments)


def test_where_calls_are_traced():
    """Compiled in one graph: the same pages, and lengths are read at each call."""
    streams = [Stream(MIXED) for _ in range(2)]

    @functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    def step(k, v):
        cache_update(streams[1].kv, k, v, streams[1].packed, 3, *streams[1].encoders)

    for i, n in enumerate((40, 1, 1, 1)):
        k, v = streams[0].tokens(n, i)
        streams[0].call(with_kernel, k.clone(), v.clone())
        streams[1].call(with_kernel if n > 1 else lambda s, k, v, most: step(k, v), k.clone(), v.clone())
    assert_equal(*streams)


def test_tokens_with_gradients():
    streams = [Stream(MIXED) for _ in range(2)]
    k, v = streams[0].tokens(40, 0)
    streams[0].call(with_kernel, k.clone(), v.clone())
    streams[1].call(lambda s, k, v, most: with_kernel(s, k.requires_grad_(), v.requires_grad_(), most), k, v)
    assert_equal(*streams)
    assert not streams[1].kv.window_k.requires_grad


def test_float64_goes_to_the_reference():
    s, want = Stream(MIXED, dtype=torch.float64), Stream(MIXED, dtype=torch.float64)
    assert plan_update(s.kv, s.packed, *s.encoders) is None
    assert_equal(fill(s, with_kernel, (40, 1, 1)), fill(want, with_reference, (40, 1, 1)))
