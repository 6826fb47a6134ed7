"""What paged attention may lose: fp32 sums by the reference, parts that are merged, and tokens of any size."""

import dataclasses

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from headq_ao.ops import paged_attention
from headq_ao.ops.page_layout import PageLayout
from headq_ao.ops.paged_attention import reference
from tests.ops.paged_cases import Case, make
from tests.ops.test_paged_attention import queries


def dequantized(kv, readers):
    """Keys and values ``[1, Hkv, T, D]`` of a cache of one sequence, fp64: ``k̂ = (σ c, σ, m, 1) mapᵀ``."""
    (group,) = PageLayout.parse(kv.layout).split(kv.pages)
    table, n = kv.table.long(), int(kv.packed)
    codes = reference.gathered(group.keys, table, torch.float64, keys=True)[:, :, :n]
    sigma, zero = (
        reference.numbers(x, table, torch.float64)[:, :, :n, None] for x in (group.keys.scale, group.keys.zero)
    )
    k_hat = torch.cat([sigma * codes, sigma, zero, torch.ones_like(sigma)], -1) @ readers.query_map[0].double().mT
    y_hat = reference.gathered(group.values, table, torch.float64, keys=False)[:, :, :n]
    v_hat = y_hat @ readers.read.double().mT + readers.mean.double()[:, :, None]
    _, here = reference.window_positions(kv)
    exact = [x[:, :, here[0]].double() for x in (kv.window_k, kv.window_v)]
    return torch.cat([k_hat, exact[0]], 2), torch.cat([v_hat, exact[1]], 2)


@pytest.mark.parametrize(("dim", "tokens"), [(64, 512), (128, 128), (80, 2048)])
def test_fp32_error_is_that_of_fp32_attention(dim, tokens):
    """Of the reference, at most twice the error of PyTorch's fp32 attention over the same tokens, dequantized."""
    case = Case(packed=(tokens,), keys=((2,) * dim,), key_dim=dim, value_dim=dim, key_zero=True)
    kv, readers = make(case)
    q, (k, v) = queries(kv, 3, 1), dequantized(kv, readers)
    exact = scaled_dot_product_attention(q.double(), k, v, scale=0.125, enable_gqa=True)
    found, _ = reference.paged_attention(q.double(), 0.125, kv, readers)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    plain = scaled_dot_product_attention(q, k.float(), v.float(), scale=0.125, enable_gqa=True)
    ours, _ = reference.paged_attention(q, 0.125, kv, readers)
    rms = lambda x: float((x.double() - exact).square().mean().sqrt())  # noqa: E731
    assert rms(ours) <= 2 * rms(plain) + 1e-9


@pytest.mark.parametrize("by", [2.0**-20, 2.0**23])
def test_tokens_of_any_size(by):
    """Keys and values so many times as large, queries as much smaller: as large an output, bit for bit."""
    kv, readers = make(Case(packed=(600,), new=(2,)))
    q, (k, v) = queries(kv, 3, 2), (kv.window_k, kv.window_v)
    larger = dataclasses.replace(kv, window_k=k * by, window_v=v * by, new_k=kv.new_k * by, new_v=kv.new_v * by)
    maps = dataclasses.replace(
        readers, query_map=readers.query_map * by, read=readers.read * by, mean=readers.mean * by
    )
    out, lse = paged_attention(q, 0.125, kv, readers)
    scaled, same = paged_attention(q / by, 0.125, larger, maps)
    assert torch.equal(scaled, out * by) and torch.equal(same, lse)


def test_merged_parts_are_one_softmax():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 16, dtype=torch.float64, generator=g) for n in (3, 40, 40))

    def part(first, last):
        a, lse = reference.softmax(q @ k[:, :, first:last].mT)
        return a @ v[:, :, first:last], lse

    parts = [part(*cut) for cut in ((0, 4), (4, 4), (4, 17), (17, 40))]
    whole = part(0, 40)
    for found in (reference.merge(parts), reference.merge(parts[::-1])):
        torch.testing.assert_close(found, whole)
    torch.testing.assert_close(whole[0], scaled_dot_product_attention(q, k, v, scale=1.0))
    empty = parts[1]
    out, lse = reference.merge([empty, empty])
    assert not out.any() and bool((lse == float("-inf")).all())
    torch.testing.assert_close(reference.merge([empty, whole]), whole)


def test_merged_parts_far_apart():
    parts = [(torch.ones(1, 2), torch.tensor([1000.0])), (torch.zeros(1, 2), torch.tensor([-1000.0]))]
    out, lse = reference.merge(parts)
    assert out.tolist() == [[1.0, 1.0]] and lse.tolist() == [1000.0]
