"""A cache that does not hold its requests: preemption, and what a request gets back after it."""

import pytest

from tests.vllm.engines import PLAIN, Ask, Driver, assert_same, fresh, generate, greedy, headq_options, ids, start, stop

OUT = 300
PAGES = 40  # blocks of both groups; the null page among them


@pytest.fixture(scope="module")
def llm(tiny):
    pages = 10 if PLAIN else PAGES
    options = {"num_gpu_blocks_override": pages, "max_num_batched_tokens": 1280, "max_model_len": 512}
    made = start(tiny[0], **options, **headq_options(tiny[1]))
    yield made
    stop(made)


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
        assert_same(output, alone[output.request_id])


def test_a_request_that_can_never_fit_is_refused(llm):
    with pytest.raises(Exception, match="maximum context length is 512 tokens"):
        generate(llm, [ids(600)], greedy(1))
