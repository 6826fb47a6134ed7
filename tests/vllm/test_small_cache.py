"""A cache that does not hold its requests: preemption, and what a request gets back after it."""

import pytest

from tests.vllm.engines import PLAIN, Ask, Driver, fresh, generate, greedy, headq_options, ids, start, stop, tokens_of

OUT = 300
PAGES = 40  # blocks of both groups; the null page among them
# Nats between the two likeliest tokens below which another may be chosen: what was decoded one by one is computed in
# chunks after a preemption, whose queries read more in full precision.
NEAR = 1e-4 if PLAIN else 1.0


@pytest.fixture(scope="module")
def llm(tiny):
    pages = 10 if PLAIN else PAGES
    options = {"num_gpu_blocks_override": pages, "max_num_batched_tokens": 1280, "max_model_len": 512}
    made = start(tiny[0], **options, **headq_options(tiny[1]))
    yield made
    stop(made)


def first_difference(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def gap(output, i):
    """Nats between the two likeliest tokens at step ``i``."""
    best = sorted((found.logprob for found in output.outputs[0].logprobs[i].values()), reverse=True)
    return best[0] - best[1]


def test_preempted_requests_get_the_tokens_that_they_get_alone(llm):
    sampling = greedy(OUT, logprobs=2)
    alone = {}
    for seed in range(8):
        fresh(llm)
        alone[str(seed)] = generate(llm, [ids(60, seed)], sampling)[0]
    fresh(llm)
    run = Driver(llm).run([Ask(str(seed), ids(60, seed), sampling) for seed in range(8)])
    assert sum(s.preempted for s in run.steps) > 0, "the cache held all requests"
    for output in run.outputs:
        expected = alone[output.request_id]
        at = first_difference(tokens_of(output), tokens_of(expected))
        assert at is None or gap(expected, at) < NEAR, (output.request_id, at, gap(expected, at))


def test_a_request_that_can_never_fit_is_refused(llm):
    with pytest.raises(Exception, match="maximum context length is 512 tokens"):
        generate(llm, [ids(600)], greedy(1))
