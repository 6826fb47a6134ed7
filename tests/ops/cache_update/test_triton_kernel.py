"""Which calls the Triton kernels of cache_update serve; their results are in ../paged_interpreted.py."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
from headq_ao.ops.cache_update import triton_kernel, triton_step
from headq_ao.ops.cache_update.encoders import flatten
from headq_ao.ops.cache_update.triton_kernel import OwnedPlan, launch, plan, update
from tests.ops.cache_update.streams import LAYOUTS, Stream


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("exact keys", torch.float32), ("exact values", torch.float32), ("one group", torch.float64)],
)
def test_what_is_left_to_the_reference(name, dtype):
    """Nothing is written, and nothing launched."""
    s = Stream(LAYOUTS[name], dtype=dtype)
    before = [x.clone() for x in s.kv.pages]
    k, v = s.tokens(3, 0)
    assert launch(s.kv, k, v, s.packed, 3, *flatten(*s.encoders), False) is False
    assert update(s.kv, k, v, s.packed, 3, None, None) is False
    assert plan(s.kv, s.packed, *s.encoders, False) is None
    for x, y in zip(s.kv.pages, before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_tokens_are_checked_before_anything_is_launched():
    s = Stream(LAYOUTS["one group"])
    k, v = (x.clone() for x in s.tokens(3, 0))
    s.kv.total.fill_(3)
    v[1, 0, 1] = torch.inf
    with pytest.raises(ValueError, match="values must be finite"):
        launch(s.kv, k, v, s.packed, 3, *flatten(*s.encoders), True)


@pytest.mark.parametrize(("most", "few"), [(0, True), (triton_step.MOST, True), (triton_step.MOST + 1, False)])
def test_few_tokens_go_to_a_steps_launches(most, few, monkeypatch):
    s, taken = Stream(LAYOUTS["one group"]), []
    monkeypatch.setattr(triton_step, "step", lambda *args: lambda k, v, n: taken.append(("step", n)))
    monkeypatch.setattr(triton_kernel, "update", lambda *args: taken.append(("update", args[4])) or True)
    k, v = s.tokens(max(most, 1), 0)
    assert launch(s.kv, k, v, s.packed, most, *flatten(*s.encoders), False) is True
    assert taken == [("step" if few else "update", most)]


def test_plans_of_a_cache_and_of_an_engines_pages(monkeypatch):
    """None where tokens are to be checked or an encoder is missing; a codec of sequences has one over an engine's."""
    monkeypatch.setattr(triton_step, "with_ptx", lambda: False)
    s = Stream(LAYOUTS["one group"])
    assert isinstance(plan(s.kv, s.packed, *s.encoders, False), triton_step.Step)
    assert plan(s.kv, s.packed, *s.encoders, True) is None
    assert plan(s.kv, s.packed, [None], s.encoders[1], False) is None
    own = Stream(LAYOUTS["one group"], own=2)
    assert plan(own.kv, own.packed, *own.encoders, False) is None

    owned = dataclasses.replace(own.kv, window_table=torch.zeros(2, 1).int())
    found = plan(owned, own.packed, *own.encoders, False)
    assert isinstance(found, OwnedPlan) and found.step is None and found.dtype == torch.float32
