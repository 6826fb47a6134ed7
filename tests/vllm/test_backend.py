"""What vLLM is told of pages, and what a step's numbers become; on a GPU: test_cuda_by_construction.py."""

import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="make test-vllm installs it")
from headq_ao.integrations.vllm.backend import (
    PAGE_TOKENS,
    WINDOW_TOKENS,
    HeadQBackend,
    HeadQMetadataBuilder,
    WindowBackend,
)
from headq_ao.integrations.vllm.metadata import FEW

WINDOW = 80


def test_sizes_of_blocks():
    """Whole tiles of 32; a page is read as it was allocated, in both groups."""
    assert [HeadQBackend.supports_block_size(n) for n in (None, 32, 96, 256, 16, 48)] == [True] * 4 + [False] * 2
    spec = SimpleNamespace(block_size=96)
    for backend, usual in ((HeadQBackend, PAGE_TOKENS), (WindowBackend, WINDOW_TOKENS)):
        assert backend.get_supported_kernel_block_sizes() == [usual]
        assert backend.get_supported_kernel_block_sizes(spec) == [96]
    assert WindowBackend.get_impl_cls() is HeadQBackend.get_impl_cls()
    assert HeadQBackend.get_builder_cls() is HeadQMetadataBuilder


def built(before, new, most=4):
    builder = object.__new__(HeadQMetadataBuilder)
    builder.window, builder.lengths = WINDOW, torch.full((4, most), -7, dtype=torch.int64)
    start = torch.tensor([sum(new[:i]) for i in range(len(new) + 1)]).int()
    total = torch.tensor([a + b for a, b in zip(before, new, strict=True)]).int()
    step = SimpleNamespace(
        num_reqs=len(new), num_actual_tokens=sum(new), max_query_len=max(new), query_start_loc=start,
        query_start_loc_cpu=start, seq_lens=total, block_table_tensor=torch.zeros(len(new) + 3, 5).int(),
    )  # fmt: skip
    return builder.build(0, step), builder


@pytest.mark.parametrize("seed", range(6))
def test_numbers_of_a_step(seed):
    """Tokens before it, those that all queries read as codes, those with it; and the requests that are long."""
    rng = random.Random(seed)
    n = rng.randint(1, 7)
    before = [rng.choice([0, 1, WINDOW - 2, WINDOW - 1, WINDOW, 500]) for _ in range(n)]
    new = [rng.choice([1, 1, 2, FEW, FEW + 1, 200]) for _ in range(n)]
    found, builder = built(before, new)
    assert found.start.tolist() == [sum(new[:i]) for i in range(n + 1)]
    assert found.held.tolist() == before and found.total.tolist() == [a + b for a, b in zip(before, new, strict=True)]
    assert found.packed.tolist() == [max(b - (WINDOW - 1), 0) for b in before] and found.recent == WINDOW - 1
    starts = found.start.tolist()
    assert found.long == tuple((r, starts[r], starts[r + 1]) for r in range(n) if new[r] > FEW)
    assert found.few == max([x for x in new if x <= FEW], default=0)
    assert (found.tokens, found.most, len(found.table)) == (sum(new), max(new), n)
    assert builder.lengths.shape[1] == max(4, n + 1), "more room only where it takes more"


def test_a_step_of_short_requests_looks_at_nothing_on_the_host():
    """What the host knows of each request is not read: a captured step has no such list."""
    builder = object.__new__(HeadQMetadataBuilder)
    builder.window, builder.lengths = WINDOW, torch.zeros(4, 4, dtype=torch.int64)
    step = SimpleNamespace(
        num_reqs=2, num_actual_tokens=2, max_query_len=1, query_start_loc=torch.tensor([0, 1, 2]).int(),
        seq_lens=torch.tensor([5, 6]).int(), block_table_tensor=torch.zeros(2, 5).int(),
    )  # fmt: skip
    found = builder.build(0, step)
    assert (found.few, found.long) == (1, ()) and found.held.tolist() == [4, 5]
