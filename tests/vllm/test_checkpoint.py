"""A checkpoint that transformers saved with HeadQ on the model is served without any setting but the backend."""

import pytest

from headq_ao import headq_config, quantize_
from tests.vllm import checkpoints
from tests.vllm.engines import PLAIN, clean, generate, greedy, headq_options, ids, start, stop, tokens_of

pytestmark = pytest.mark.skipif(PLAIN, reason="vLLM's own cache knows no such checkpoint")


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    model = checkpoints.llama()
    quantize_(model, headq_config(calibration=tiny[1], k_bits=3, v_bits=3, residual_length=64))
    return checkpoints.save(tmp_path_factory.mktemp("saved") / "model", model)


def outputs(folder, **options):
    llm = start(folder, **options)
    try:
        found = [tokens_of(o) for o in generate(llm, [ids(300, 1), ids(90, 2)], greedy(20))]
        window = {
            spec.sliding_window
            for group in llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
            if (spec := group.kv_cache_spec) and hasattr(spec, "extra_retained_tokens")
        }
        return found, window
    finally:
        stop(llm)


def test_its_calibration_and_config_are_found(saved, tiny):
    with_settings = outputs(tiny[0], **headq_options(tiny[1], k_bits=3, v_bits=3, window=64))
    assert outputs(saved, attention_backend="CUSTOM") == with_settings
    assert with_settings[1] == {64}


def test_quantized_weights_are_refused():
    from headq_ao.integrations.vllm.checkpoint import HeadQCheckpoint

    with pytest.raises(ValueError, match="torchao"):
        HeadQCheckpoint.from_config({"quant_method": "headq", "weights": {"quant_method": "torchao"}})


def test_another_checkpoint_of_the_same_shape_is_refused(tiny, tmp_path):
    other = checkpoints.save(tmp_path / "other", checkpoints.llama(seed=3))
    try:
        with pytest.raises(Exception, match="weights"):
            start(other, **headq_options(tiny[1]))
    finally:
        clean()
