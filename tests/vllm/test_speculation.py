"""Drafts: rejected tokens leave no trace in tokens or pages."""

import pytest

from tests.vllm.engines import (
    BLOCK,
    PLAIN,
    fresh,
    generate,
    greedy,
    headq_options,
    ids,
    page_bytes,
    start,
    stop,
    tokens_of,
)

DRAFTS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
OUT = 90


@pytest.fixture(scope="module")
def expected(tiny):
    """Tokens and pages of an engine without drafts."""
    plain = start(tiny[0], **headq_options(tiny[1]))
    out = []
    for prompt in prompts():
        fresh(plain)
        out.append(page_bytes(plain, prompt, greedy(OUT)))
    stop(plain)
    return out


@pytest.fixture(scope="module")
def llm(tiny, expected):
    made = start(tiny[0], speculative_config=DRAFTS, **headq_options(tiny[1]))
    yield made
    stop(made)


def prompts():
    """Few different bytes, so that drafts are found, and one that repeats itself, so that some are taken."""
    return [[3 + i % 5 for i in ids(180, seed)] for seed in range(2)] + [ids(30) * 6]


def drafted(llm):
    """Draft tokens so far, and how many of them were taken."""
    found = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    return found["vllm:spec_decode_num_draft_tokens"], found["vllm:spec_decode_num_accepted_tokens"]


def test_drafts_change_neither_tokens_nor_pages(llm, expected):
    for prompt, (tokens, pages) in zip(prompts(), expected, strict=True):
        fresh(llm)
        found, held = page_bytes(llm, prompt, greedy(OUT))
        # layer 0, whose keys and values depend on no attention; page 1 holds the first output tokens
        same = next((i for i, pair in enumerate(zip(found, tokens, strict=True)) if pair[0] != pair[1]), OUT)
        if len(prompt) + same >= 2 * BLOCK:
            assert (pages[0][:2] == held[0][:2]).all()
        else:
            assert not PLAIN and (pages[0][:1] == held[0][:1]).all()
    made, taken = drafted(llm)
    assert made > taken >= 0


def test_a_prefix_written_with_drafts_is_found_again(llm):
    fresh(llm)
    first = generate(llm, [prompts()[0]], greedy(OUT))[0]
    more = prompts()[0] + tokens_of(first)
    again = generate(llm, [more], greedy(20))[0]
    fresh(llm)
    assert again.num_cached_tokens >= 128
    assert tokens_of(generate(llm, [more], greedy(20))[0]) == tokens_of(again)
