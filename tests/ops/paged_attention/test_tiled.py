"""How many tokens queries see, against sets of positions. What tiles read is in test_paged_attention.py."""

import dataclasses
import random

import pytest
import torch

from headq_ao.ops.page_layout import PageLayout
from headq_ao.ops.paged_attention import reference
from headq_ao.ops.paged_attention.tiled import count, overlap, overlap_in_full, paged_attention
from headq_ao.ops.types import Visible
from tests.ops.cache_update.streams import LAYOUTS, Stream
from tests.ops.paged_cases import Case, make


@pytest.mark.parametrize("seed", range(5))
def test_overlaps_of_ranges(seed):
    rng = random.Random(seed)
    pairs = [[(low := rng.randint(0, 20), low + rng.randint(-3, 12)) for _ in range(4)] for _ in range(2)]
    shown = Visible(*(torch.tensor([[p[i] for p in row] for row in pairs]) for i in (0, 1)))
    first, stop = [rng.randint(0, 15) for _ in range(2)], [rng.randint(0, 25) for _ in range(2)]
    want = sum(len(set(range(*pair)) & set(range(first[b], stop[b]))) for b, row in enumerate(pairs) for pair in row)
    assert int(overlap(shown, torch.tensor(first), torch.tensor(stop))) == want


def test_own_tokens_that_are_read_in_full():
    """All of them; under ``recent`` the last ones before each query, and the sinks among them."""
    kv, _ = make(Case(packed=(0,), window=(0,), new=(12,), sinks=2))
    shown = reference.visible_positions(kv.total, 12, 0)
    assert int(overlap_in_full(shown, kv)) == 12 * 13 // 2
    s = Stream(LAYOUTS["one group"], batch=1)
    for field, x in (("held", 0), ("total", 12), ("packed", 0)):
        getattr(s.kv, field).fill_(x)
    recent = dataclasses.replace(
        s.kv, n_sink=2, recent=3, window_table=torch.zeros(1, 1).int(), new_k=torch.zeros(1, 3, 12, 32)
    )
    want = sum(len({j for j in range(i + 1) if j < 2 or j >= i - 3}) for i in range(12))
    assert int(overlap_in_full(shown, recent)) == want


def test_counts_are_added_and_only_where_they_are_asked_for():
    kv, readers = make(Case(packed=(300, 40), window=(20, 10), new=(3, 2)))
    q, reads = torch.randn(2, 4, 3, 64), torch.tensor([100, 1000])
    shown = reference.visible_positions(kv.total, 3, 0)
    paged_attention(q, 0.1, kv, readers, None, 0, reads)
    again = torch.tensor([100, 1000])
    count(kv, shown, PageLayout.parse(kv.layout), again)
    assert torch.equal(reads, again)
    packed = 3 * 300 + 3 * 40  # each of three queries, the first of the second sequence is padding but has a range
    assert int(reads[0]) - 100 == packed
