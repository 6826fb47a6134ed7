"""Tiles of queries and of tokens, and which of them anyone sees."""

import pytest
import torch

from headq_ao.ops.paged_attention import tiles as module
from headq_ao.ops.paged_attention.tiles import query_tiles, tiles, worth
from headq_ao.ops.types import Visible


@pytest.mark.parametrize(("length", "size"), [(0, 4), (3, 4), (4, 4), (9, 4), (8, 4), (5, 1)])
def test_tiles_follow_each_other(length, size):
    found = list(tiles(length, size))
    assert [i for t in found for i in range(t.start, t.stop)] == list(range(length))
    assert all(0 < t.stop - t.start <= size for t in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_queries_by_tile(dtype, monkeypatch):
    """Scaled, by KV head, in fp32 or fp64; each with what it sees."""
    monkeypatch.setattr(module, "QUERY_TILE", 3)
    q = torch.randn(2, 6, 7, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    position = torch.arange(14).view(2, 7)
    found = list(query_tiles(q, 0.25, 2, Visible(position, position + 1)))
    assert [x.shape for x, _ in found] == [(2, 2, 3, 3, 8), (2, 2, 3, 3, 8), (2, 2, 3, 1, 8)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(torch.cat([x for x, _ in found], 3).flatten(1, 2), q.to(wide) * 0.25)
    assert torch.equal(torch.cat([shown.low for _, shown in found], 1), position)


@pytest.mark.parametrize(
    ("position", "low", "high", "seen"),
    [
        ([4, 5, 6], 0, 5, True),
        ([4, 5, 6], 0, 4, False),
        ([4, 5, 6], 6, 9, True),
        ([4, 5, 6], 7, 9, False),
        ([4, 5, 6], 5, 5, False),
        ([-3, -2, -1], 0, 5, False),
        ([-1, 0, 1], 0, 1, True),
    ],
)
def test_what_no_query_sees_is_left_out(position, low, high, seen):
    shown = Visible(torch.tensor([[low, 99]]), torch.tensor([[high, 99]]))  # another query that sees nothing
    assert worth(torch.tensor([position]), shown) is seen
    both = Visible(*(torch.cat([x, torch.zeros(1, 2, dtype=torch.int64)]) for x in (shown.low, shown.high)))
    assert worth(torch.tensor([position, position]), both) is seen, "of two sequences, one sees nothing"


def test_knowing_must_not_wait_for_a_device():
    empty = torch.zeros(1, 1, dtype=torch.int64, device="meta")
    assert worth(empty, Visible(empty, empty)) is True
