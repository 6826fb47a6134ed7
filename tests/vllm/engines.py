"""Engines in the test's own process, and what can be seen in them."""

import gc
import os
import random

import torch

from headq_ao.evals.vllm.engine import Ask, Driver

PLAIN = os.environ.get("HEADQ_VLLM_PLAIN") == "1"  # vLLM's own cache: shows that a test asks nothing unusual
BLOCK = 128


def headq_options(calibration, **settings):
    """What turns the plug-in on."""
    if PLAIN:
        return {}
    return {"attention_backend": "CUSTOM", "additional_config": {"headq": {"calibration": calibration, **settings}}}


def start(model, **options):
    """An engine of 64 tokens a step in pages of 128, eager, fp32."""
    from vllm import LLM

    usual = {
        "dtype": "float32", "max_model_len": 1024, "max_num_batched_tokens": 64, "max_num_seqs": 8, "seed": 0,
        "block_size": BLOCK, "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "enable_prefix_caching": True,
        "enable_chunked_prefill": True, "disable_log_stats": False,
    }  # fmt: skip
    return LLM(model=model, **usual | options)


def stop(llm):
    """Let an engine of this process go, so that the next one can start."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    clean()
    cleanup_dist_env_and_memory()


def clean():
    """What an engine that did not start leaves behind."""
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

    destroy_model_parallel()
    destroy_distributed_environment()
    gc.collect()


def ids(length, seed=0):
    """A prompt of random printable ASCII."""
    rng = random.Random(seed)
    return [rng.randrange(3, 97) for _ in range(length)]


def greedy(tokens, **options):
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0, "max_tokens": tokens, "ignore_eos": True} | options)


def generate(llm, prompts, sampling, **options):
    """Finished outputs, in the order of the prompts."""
    return llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False, **options)


def tokens_of(output, i=0):
    return list(output.outputs[i].token_ids)


# Nats between the two likeliest tokens below which another may be chosen: matrix products of other shapes differ in
# their last bits, and a code may be rounded to its other neighbour.
NEAR = 1e-4 if PLAIN else 0.1


def assert_same(output, expected):
    """The same tokens, up to where two were nearly as likely; ``expected`` with ``logprobs=2``."""
    pairs = zip(tokens_of(output), tokens_of(expected), strict=True)
    at = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
    if at is not None:
        best = sorted((found.logprob for found in expected.outputs[0].logprobs[at].values()), reverse=True)
        assert best[0] - best[1] < NEAR, (output.request_id, at, best)


def core(llm):
    """The engine's core: scheduler and worker."""
    return llm.llm_engine.engine_core.engine_core


def fresh(llm):
    """Forget the pages of finished requests."""
    assert llm.reset_prefix_cache()


def free_pages(llm):
    return core(llm).scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def page_bytes(llm, prompt, sampling):
    """Tokens of a request, and the bytes of its full pages as they stand at its last step.

    Returns:
        token ids out, and for each layer uint8 ``[pages, bytes]``.
    """
    engine, scheduler = llm.llm_engine, core(llm).scheduler
    engine.add_request("watched", {"prompt_token_ids": prompt}, sampling)
    blocks, done, held = [], None, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            done = output if output.finished else done
        for name, request in scheduler.requests.items():
            if name.startswith("watched"):
                blocks, held = scheduler.kv_cache_manager.get_block_ids(name)[0], request.num_computed_tokens
    full = torch.tensor(blocks[: held // BLOCK])
    layers = core(llm).vllm_config.compilation_config.static_forward_context
    attention = [layer for name, layer in sorted(layers.items()) if name.endswith("self_attn.attn")]
    return tokens_of(done), [coded(layer, layer.kv_cache[full]) for layer in attention]


def coded(layer, pages):
    """Bytes of pages; of packed ones the codes, without the room for sinks, which only a request's first page uses."""
    held = pages.flatten(1).contiguous().view(torch.uint8)
    return held if PLAIN else held[:, : layer.impl.codec.layout(BLOCK).bytes_of_page(0, torch.float32)]


__all__ = [
    "BLOCK", "PLAIN", "Ask", "Driver", "assert_same", "clean", "core", "free_pages", "fresh", "generate", "greedy",
    "headq_options", "ids", "page_bytes", "start", "stop", "tokens_of",
]  # fmt: skip
