"""What the engine does with requests, over packed pages: one engine for all tests of this file, and one after it."""

import re

import pytest

from tests.vllm.engines import (
    PLAIN,
    Ask,
    Driver,
    free_pages,
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

OUT = 40


@pytest.fixture(scope="module")
def llm(tiny):
    made = start(tiny[0], **headq_options(tiny[1]))
    yield made
    stop(made)


@pytest.fixture(scope="module")
def alone(llm):
    """What each prompt gives by itself, with no page to find."""

    def run(length, seed=0, out=OUT, **options):
        fresh(llm)
        return generate(llm, [ids(length, seed)], greedy(out, **options))[0]

    return run


def test_a_request_gets_the_same_tokens_alone_and_in_any_company(llm, alone):
    lengths = [5, 130, 300, 61, 500]
    expected = [tokens_of(alone(n, seed=n)) for n in lengths]
    assert len({tuple(e) for e in expected}) == len(lengths)
    fresh(llm)
    together = generate(llm, [ids(n, n) for n in lengths], greedy(OUT))
    assert [tokens_of(o) for o in together] == expected


def test_requests_that_come_while_others_decode_change_nothing(llm, alone):
    expected = {str(n): tokens_of(alone(n, seed=n)) for n in (200, 150, 90)}
    fresh(llm)
    waiting = [Ask("150", ids(150, 150), greedy(OUT)), Ask("90", ids(90, 90), greedy(OUT))]
    engine = llm.llm_engine
    engine.add_request("200", {"prompt_token_ids": ids(200, 200)}, greedy(OUT))
    found, steps = {}, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            found[output.request_id] = tokens_of(output)
        steps += 1
        if waiting and steps % 10 == 0:
            ask = waiting.pop(0)
            engine.add_request(ask.name, {"prompt_token_ids": ask.prompt}, ask.sampling)
    assert found == expected


def test_long_prompts_come_in_chunks(llm):
    fresh(llm)
    run = Driver(llm).run([Ask("long", ids(500), greedy(3))])
    chunks = [s.prompt_tokens for s in run.steps if s.prompt_tokens]
    assert chunks == [64] * 7 + [52]


def test_a_prefix_is_found_again_with_the_same_tokens(llm, alone):
    first = alone(300)
    again = generate(llm, [ids(300)], greedy(OUT))[0]
    assert first.num_cached_tokens == 0 and again.num_cached_tokens >= 256
    assert tokens_of(again) == tokens_of(first)


def test_a_prefix_is_shared_by_different_continuations(llm, alone):
    prompts = [ids(256) + ids(50, seed) for seed in (1, 2)]
    expected = []
    for prompt in prompts:
        fresh(llm)
        expected.append(tokens_of(generate(llm, [prompt], greedy(OUT))[0]))
    fresh(llm)
    generate(llm, [ids(256)], greedy(1))
    found = generate(llm, prompts, greedy(OUT))
    assert all(o.num_cached_tokens >= 128 for o in found)
    assert [tokens_of(o) for o in found] == expected


def test_pages_are_the_same_after_a_prefix_hit(llm):
    fresh(llm)
    first = page_bytes(llm, ids(300), greedy(100))
    again = page_bytes(llm, ids(300), greedy(100))
    assert first[0] == again[0]
    for a, b in zip(first[1], again[1], strict=True):
        assert len(a) == 3 and a.any() and (a == b).all()


def test_pages_are_the_same_token_by_token_and_in_chunks(llm):
    """Layer 0, whose keys and values depend on no attention; the output tokens of one run are the prompt of another."""
    fresh(llm)
    out, one_by_one = page_bytes(llm, ids(30), greedy(230))
    fresh(llm)
    _, chunks = page_bytes(llm, ids(30) + out[:-1], greedy(1))
    assert len(one_by_one[0]) == len(chunks[0]) == 2
    differ = (one_by_one[0] != chunks[0]).float().mean()
    assert differ < (1.0 if PLAIN else 1e-3)  # fp32 sums of one row and of 64 may round differently


def test_an_aborted_request_leaves_no_page_and_no_trace(llm, alone):
    expected = tokens_of(alone(140, seed=3))
    fresh(llm)
    free, engine = free_pages(llm), llm.llm_engine
    name = engine.add_request("doomed", {"prompt_token_ids": ids(400)}, greedy(200))
    engine.add_request("kept", {"prompt_token_ids": ids(140, 3)}, greedy(OUT))
    for _ in range(12):
        engine.step()
    assert free_pages(llm) < free
    engine.abort_request([name or "doomed"])
    found = {}
    while engine.has_unfinished_requests():
        found |= {o.request_id: tokens_of(o) for o in engine.step()}
    assert found["kept"] == expected and free_pages(llm) == free


def test_several_samples_of_one_prompt(llm, alone):
    one = tokens_of(alone(200))
    # without a seed: with one, vLLM's CPU engine fails on a prompt that comes in chunks
    sampled = generate(llm, [ids(200)], greedy(OUT, temperature=1.0, n=3))[0]
    assert len({tuple(tokens_of(sampled, i)) for i in range(3)}) == 3
    assert tokens_of(generate(llm, [ids(200)], greedy(OUT, n=1))[0]) == one


def test_logprobs_of_sampled_tokens_and_of_the_prompt(llm):
    fresh(llm)
    output = generate(llm, [ids(150)], greedy(5, logprobs=3, prompt_logprobs=0))[0]
    for token, found in zip(tokens_of(output), output.outputs[0].logprobs, strict=True):
        best = max(found, key=lambda t: found[t].logprob)
        assert best == token and found[token].rank == 1 and len(found) == 3
    prompt = output.prompt_logprobs
    assert len(prompt) == 150 and prompt[0] is None
    assert all(-60 < found[t].logprob < 0 for found, t in zip(prompt[1:], ids(150)[1:], strict=True))


def test_prompt_logprobs_agree_with_those_of_decoding(llm):
    """A token's log-probability given all before it: sampled there, and read as a part of a prompt."""
    fresh(llm)
    output = generate(llm, [ids(200)], greedy(30, logprobs=0))[0]
    out = tokens_of(output)
    sampled = [found[t].logprob for t, found in zip(out, output.outputs[0].logprobs, strict=True)]
    fresh(llm)
    whole = generate(llm, [ids(200) + out], greedy(1, prompt_logprobs=0))[0].prompt_logprobs[200:]
    read = [found[t].logprob for t, found in zip(out, whole, strict=True)]
    tolerance = 1e-3 if PLAIN else 0.15
    assert max(abs(a - b) for a, b in zip(sampled, read, strict=True)) < tolerance


def test_a_stop_string_ends_the_text(llm, alone):
    text = alone(100).outputs[0].text
    stop_at = text[10:12]
    output = alone(100, stop=[stop_at]).outputs[0]
    assert output.finish_reason == "stop" and output.stop_reason == stop_at
    assert output.text == text[: text.index(stop_at)]


def test_structured_output_follows_its_grammar(llm):
    from vllm.sampling_params import StructuredOutputsParams

    sampling = greedy(20, ignore_eos=False, structured_outputs=StructuredOutputsParams(regex="(ab|cd){2}[0-9]{3}"))
    fresh(llm)
    texts = [o.outputs[0].text for o in generate(llm, [ids(180, s) for s in range(3)], sampling)]

    assert all(re.fullmatch("(ab|cd){2}[0-9]{3}", text) for text in texts)


def test_a_restarted_engine_gives_the_same(llm, alone, tiny):
    """Last: it ends the engine of this file."""
    expected = [tokens_of(alone(n, seed=n)) for n in (20, 300)]
    stop(llm)
    second = start(tiny[0], **headq_options(tiny[1]))
    try:
        assert [tokens_of(generate(second, [ids(n, n)], greedy(OUT))[0]) for n in (20, 300)] == expected
    finally:
        stop(second)
