"""Which of a request's newest tokens are given pages: all that a later step reads, and few others."""

import random

import pytest
import torch

pytest.importorskip("vllm", reason="make test-vllm installs it")

WINDOW, SIZE, SCHEDULED = 80, 32, 256


@pytest.fixture
def manager():
    from vllm.v1.core.block_pool import BlockPool

    from headq_ao.integrations.vllm.window import NewestTokensSpec, WindowManager

    spec = NewestTokensSpec(
        block_size=SIZE, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sliding_window=WINDOW, every=SCHEDULED
    )  # fmt: skip
    pool = BlockPool(4000, enable_caching=True, hash_block_size=SIZE)
    made = WindowManager(
        spec, block_pool=pool, enable_caching=True, kv_cache_group_id=0, scheduler_block_size=SCHEDULED
    )
    made.num_cached_block["a"] = 0
    return made


def step(manager, held, new):
    """One scheduled chunk, as the scheduler asks for it."""
    manager.remove_skipped_blocks("a", held)
    free = manager.block_pool.get_num_free_blocks()
    asked = manager.get_num_blocks_to_allocate("a", held + new, [], held, held, held + new)
    given = manager.allocate_new_blocks("a", held + new, held + new)
    assert free - manager.block_pool.get_num_free_blocks() == asked == sum(not b.is_null for b in given)
    return manager.req_to_blocks["a"]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_read_has_pages_and_the_rest_is_let_go(manager, seed):
    from headq_ao.integrations.vllm.backend import FEW

    rng, held, at_start = random.Random(seed), 0, manager.block_pool.get_num_free_blocks()
    most = rng.choice([64, 512, 2048])  # tokens in flight
    for _ in range(40):
        new = min(rng.choice([1, 1, 1, 2, 5, FEW, FEW + 1, 64, 200, 512, 2048]), most)
        blocks = step(manager, held, new)
        begin = max(held - WINDOW + 1, 0)
        read = range(begin, held + new if new <= FEW else held)
        assert not any(blocks[t // SIZE].is_null for t in read)
        real = sum(not b.is_null for b in blocks)
        assert real <= manager.kv_cache_spec.max_admission_blocks_per_request(most, 1 << 20)
        held += new
        if rng.random() < 0.3 and new > 1:  # a rejected draft
            held -= rng.randrange(min(new, FEW))
    manager.free("a")
    assert manager.block_pool.get_num_free_blocks() == at_start
    assert not manager.looked_at


@pytest.mark.parametrize("interval", [0, 1024, None])
def test_another_request_can_go_on_where_vllm_expects_it(manager, interval):
    """Whatever vLLM is told to keep has pages when the chunk that brings it is computed."""
    blocks = step(manager, 0, 5000)
    mask = manager.reachable_block_mask(
        0, 5000 // SIZE, SCHEDULED, manager.kv_cache_spec, False, retention_interval=interval,
        reachable_boundaries=[4999, 2304],
    )  # fmt: skip
    assert sum(mask) >= 2 * -(-(WINDOW - 1) // SIZE)
    assert all(not blocks[i].is_null for i, keep in enumerate(mask) if keep)
    assert sum(not b.is_null for b in blocks) < len(blocks) / 2


def test_vllm_knows_its_own_pages_still():
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry as Registry

    from headq_ao.integrations.vllm.window import NewestTokensSpec, WindowManager

    sizes = {"block_size": 32, "num_kv_heads": 1, "head_size": 64, "dtype": torch.bfloat16}
    newest = NewestTokensSpec(**sizes, sliding_window=8, every=256)
    assert Registry.get_manager_class(newest) is WindowManager
    assert Registry.get_manager_class(FullAttentionSpec(**sizes)).__name__ == "FullAttentionManager"
    assert Registry.get_manager_class(SlidingWindowSpec(**sizes, sliding_window=8)).__name__ == "SlidingWindowManager"
