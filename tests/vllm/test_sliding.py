"""Models with sliding-window layers: packed too, in groups of their own, and right at 8 bits."""

import pytest
import torch
import transformers

from tests.vllm import checkpoints
from tests.vllm.engines import PLAIN, generate, headq_options, ids, start, stop, tokens_of

MODELS = {
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**checkpoints.COMMON, sliding_window=200)
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **checkpoints.COMMON | {"num_hidden_layers": 6, "sliding_window": 128, "query_pre_attn_scalar": 64}
        )
    ),
}


def logprobs(folder, **options):
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=0, logprobs=2)
    llm = start(folder, **options)
    try:
        found = []
        for n in (100, 333, 700):
            out = generate(llm, [ids(n, n)], sampling)[0]
            told = zip(out.prompt_logprobs[1:], out.prompt_token_ids[1:], strict=True)
            best = [sorted(x.logprob for x in step.values())[-2:] for step in out.outputs[0].logprobs]
            found.append(([x[t].logprob for x, t in told], tokens_of(out), [high - low for low, high in best]))
        groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
        return found, {type(g.kv_cache_spec).__name__ for g in groups}
    finally:
        stop(llm)


@pytest.mark.skipif(PLAIN, reason="compares with vLLM's own cache")
@pytest.mark.parametrize("name", MODELS)
def test_eight_bits_change_little(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    calibration = checkpoints.save_calibration(tmp_path / "c.safetensors", model, tokens=4096)
    folder = checkpoints.save(tmp_path / "model", model)
    exact, _ = logprobs(folder)
    packed, kinds = logprobs(folder, **headq_options(calibration, k_bits=8, v_bits=8))
    assert "SlidingWindowSpec" in kinds and "NewestTokensSpec" in kinds
    for (ours, ours_out, _), (theirs, theirs_out, gaps) in zip(packed, exact, strict=True):
        moved = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        assert moved < 0.1
        other = next((i for i, (a, b) in enumerate(zip(ours_out, theirs_out, strict=True)) if a != b), None)
        assert other is None or gaps[other] < 2 * moved, "the first other token was nearly the best"
