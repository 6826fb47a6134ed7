"""Adapters that change queries, keys and values: their pages are their own, and the base model's are untouched."""

import pytest

from tests.vllm.checkpoints import save_adapter
from tests.vllm.engines import fresh, generate, greedy, headq_options, ids, start, stop, tokens_of


@pytest.fixture(scope="module")
def llm(tiny):
    made = start(tiny[0], enable_lora=True, max_lora_rank=8, max_loras=2, **headq_options(tiny[1]))
    yield made
    stop(made)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    from vllm.lora.request import LoRARequest

    folder = tmp_path_factory.mktemp("adapters")
    queries = save_adapter(folder / "q", ("q_proj",))
    all_three = save_adapter(folder / "qkv", ("q_proj", "k_proj", "v_proj"), seed=1)
    return [LoRARequest("q", 1, queries), LoRARequest("qkv", 2, all_three)]


def run(llm, adapter=None, seed=0):
    return generate(llm, [ids(300, seed)], greedy(30), lora_request=adapter)[0]


def test_each_adapter_and_the_base_model_read_their_own_pages(llm, adapters):
    expected = []
    for adapter in (None, *adapters):
        fresh(llm)
        expected.append(tokens_of(run(llm, adapter)))
    assert len({tuple(e) for e in expected}) == 3
    fresh(llm)
    found = [run(llm, adapter) for adapter in (None, *adapters)]
    assert [o.num_cached_tokens for o in found] == [0, 0, 0]
    assert [tokens_of(o) for o in found] == expected
    again = [run(llm, adapter) for adapter in (None, *adapters)]
    assert all(o.num_cached_tokens >= 256 for o in again)
    assert [tokens_of(o) for o in again] == expected


def test_adapters_share_a_batch(llm, adapters):
    """Without the base model: vLLM's CPU kernels take index -1, no adapter, for the last one (as of 0.32)."""
    prompt = ids(270, 5)
    expected = []
    for adapter in adapters:
        fresh(llm)
        generate(llm, [prompt], greedy(1), lora_request=adapter)
        expected.append(tokens_of(generate(llm, [prompt], greedy(30), lora_request=adapter)[0]))
    fresh(llm)
    for adapter in adapters:
        generate(llm, [prompt], greedy(1), lora_request=adapter)
    found = llm.generate([{"prompt_token_ids": prompt}] * 2, greedy(30), use_tqdm=False, lora_request=adapters)
    assert [o.num_cached_tokens for o in found] == [256, 256]
    assert [tokens_of(o) for o in found] == expected
