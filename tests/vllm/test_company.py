"""Requests in company: what shares their steps, comes later or goes, changes no token of theirs, though it cuts their
prompts into other chunks: a step takes 64 tokens of all requests together."""

import pytest

from tests.vllm.engines import (
    Ask,
    assert_same,
    free_pages,
    fresh,
    generate,
    greedy,
    headq_options,
    ids,
    start,
    stop,
    tokens_of,
)  # fmt: skip

OUT = 40
SAMPLING = {"logprobs": 2}


@pytest.fixture(scope="module")
def llm(tiny):
    made = start(tiny[0], **headq_options(tiny[1]))
    yield made
    stop(made)


def alone(llm, length):
    """What a prompt gives by itself, with no page to find."""
    fresh(llm)
    return generate(llm, [ids(length, length)], greedy(OUT, **SAMPLING))[0]


def test_a_request_gets_the_same_tokens_alone_and_in_any_company(llm):
    lengths = [5, 130, 300, 61, 500]
    expected = [alone(llm, n) for n in lengths]
    assert len({tuple(tokens_of(e)) for e in expected}) == len(lengths)
    fresh(llm)
    together = generate(llm, [ids(n, n) for n in lengths], greedy(OUT))
    for found, one in zip(together, expected, strict=True):
        assert_same(found, one)


def test_requests_that_come_while_others_decode_change_nothing(llm):
    expected = {str(n): alone(llm, n) for n in (200, 150, 90)}
    fresh(llm)
    engine, waiting, found, steps = llm.llm_engine, ["150", "90"], {}, 0
    engine.add_request("200", {"prompt_token_ids": ids(200, 200)}, greedy(OUT))
    while engine.has_unfinished_requests():
        for output in engine.step():
            found[output.request_id] = output
        steps += 1
        if waiting and steps % 10 == 0:
            name = waiting.pop(0)
            ask = Ask(name, ids(int(name), int(name)), greedy(OUT))
            engine.add_request(ask.name, {"prompt_token_ids": ask.prompt}, ask.sampling)
    assert found.keys() == expected.keys()
    for name, output in found.items():
        assert_same(output, expected[name])


def test_an_aborted_request_leaves_no_page_and_no_trace(llm):
    expected = alone(llm, 140)
    fresh(llm)
    free, engine = free_pages(llm), llm.llm_engine
    name = engine.add_request("doomed", {"prompt_token_ids": ids(400)}, greedy(200))
    engine.add_request("kept", {"prompt_token_ids": ids(140, 140)}, greedy(OUT))
    for _ in range(12):
        engine.step()
    assert free_pages(llm) < free
    engine.abort_request([name or "doomed"])
    found = {}
    while engine.has_unfinished_requests():
        found |= {o.request_id: o for o in engine.step()}
    assert_same(found["kept"], expected)
    assert free_pages(llm) == free
