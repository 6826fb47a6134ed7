"""A call's own tokens: PyTorch's flash kernel, ranges and padding, and products, against the equations."""

import dataclasses

import pytest
import torch

from headq_ao.ops.paged_attention import reference
from headq_ao.ops.paged_attention.new_tokens import by_products, flash, hiding, masked, with_new_tokens
from headq_ao.ops.types import Visible, visible_positions
from tests.ops.paged_cases import Case, make


def states(s=5, n=5, heads=4, kv_heads=2, d=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, h, t, d, generator=g).to(dtype) for h, t in ((heads, s), (kv_heads, n), (kv_heads, n))]


def by_hand(q, k, v, scaling, seen):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).double() for x in (k, v))
    scores = (scaling * q.double() @ k.mT).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("how", ["causal", "all", "mask"])
def test_flash_gives_its_log_sum_exp(how):
    q, k, v = states()
    seen = torch.ones(5, 5, dtype=torch.bool)
    if how == "causal":
        seen = seen.tril()
    elif how == "mask":
        seen = torch.rand(5, 5, generator=torch.Generator().manual_seed(1)) < 0.6
        seen.fill_diagonal_(True)
    mask = hiding(seen[None]) if how == "mask" else None
    found = flash(q, k, v, mask, 0.3, causal=how == "causal")
    for x, y in zip(found, by_hand(q, k, v, 0.3, seen), strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


def test_flash_reads_mixed_dtypes_in_fp32():
    q, k, v = states()
    mixed = flash(q.bfloat16(), k, v, None, 0.3)
    want = flash(q.bfloat16().float(), k, v, None, 0.3)
    assert all(torch.equal(x, y) for x, y in zip(mixed, want, strict=True))


def test_what_is_hidden_counts_for_nothing():
    seen = torch.tensor([[[True, False]]])
    assert hiding(seen).tolist() == [[[[0.0, float("-inf")]]]]
    assert hiding(seen, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("attend", [masked, by_products])
@pytest.mark.parametrize("given", [False, True], ids=["order", "ranges"])
def test_under_ranges_and_padding(attend, given):
    """Of unequal sequences whose padding is NaN; a query that sees none of the new tokens gives 0 and −inf."""
    kv, _ = make(Case(packed=(30, 0), window=(9, 0), new=(6, 2)))
    q = torch.randn(2, 4, 6, 64, generator=torch.Generator().manual_seed(2))
    shown = visible_positions(kv.total, 6, 0)
    if given:
        ranges = torch.tensor([[[0, 1, 2, 0, 3, 9]], [[1, 3, 2, 6, 4, 12]]])
        shown = Visible(*(kv.held[:, None] + ranges))
    found = attend(q, 0.2, kv, shown)
    grouped = (q * 0.2).unflatten(1, (2, -1))
    want = reference.new_part(grouped, kv, shown)
    seen = torch.isfinite(want[1].flatten(1, 2))
    assert torch.equal(torch.isfinite(found[1]), seen) and bool(seen.any()) and not bool(seen.all())
    torch.testing.assert_close(found[0][seen], want[0].flatten(1, 2)[seen], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1][seen], want[1].flatten(1, 2)[seen], rtol=1e-4, atol=1e-4)


def test_joined_to_what_is_read_of_the_cache():
    """One softmax over both; a cache without new tokens is left as it is, an empty one is left out."""
    kv, readers = make(Case(packed=(70,), window=(9,), new=(4,)))
    q = torch.randn(1, 4, 4, 64, generator=torch.Generator().manual_seed(2))
    want = reference.paged_attention(q, 0.2, kv, readers)
    alone = dataclasses.replace(kv, new_k=None, new_v=None)
    of_cache = reference.paged_attention(q, 0.2, alone, readers, visible_positions(kv.total, 4, 0))
    for x, y in zip(with_new_tokens(of_cache, q, 0.2, kv, None, 0), want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert with_new_tokens(of_cache, q, 0.2, alone, None, 0) is of_cache
    prompt, _ = make(Case(packed=(0,), window=(0,), new=(4,)))
    for x, y in zip(
        with_new_tokens(None, q, 0.2, prompt, None, 0), flash(q, prompt.new_k, prompt.new_v, None, 0.2), strict=True
    ):
        assert torch.equal(x, y)
