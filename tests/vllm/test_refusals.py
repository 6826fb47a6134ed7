"""What the plug-in cannot serve is refused at start, by name: on the CPU nobody else would."""

import pytest
import transformers

from tests.vllm import checkpoints
from tests.vllm.engines import PLAIN, clean, headq_options, start

pytestmark = pytest.mark.skipif(PLAIN, reason="vLLM's own cache refuses none of these")

SMALL = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": checkpoints.VOCAB}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


def refused(folder, calibration, *words, **options):
    """The engine does not start, and says why."""
    try:
        with pytest.raises(Exception) as raised:
            start(folder, **{"load_format": "dummy"} | headq_options(calibration) | options)
    finally:
        clean()
    messages, error = [], raised.value
    while error is not None:
        messages.append(str(error))
        error = error.__cause__ or error.__context__
    told = " ".join(messages)
    assert all(word.lower() in told.lower() for word in words), told


@pytest.mark.parametrize("dtype", ["fp8", "int8_per_token_head"])
def test_another_kv_cache_dtype(tiny, dtype):
    refused(*tiny, "kv_cache_dtype", kv_cache_dtype=dtype)


def test_no_calibration_at_all(tiny, monkeypatch):
    monkeypatch.delenv("HEADQ_CALIBRATION", raising=False)
    refused(tiny[0], None, "calibration", additional_config={})


def test_a_calibration_that_is_not_there(tiny, tmp_path):
    refused(tiny[0], str(tmp_path / "none.safetensors"), "none.safetensors")


def test_a_calibration_of_another_model(tiny, tmp_path):
    other = checkpoints.save_calibration(tmp_path / "c.safetensors", checkpoints.llama(num_hidden_layers=3), tokens=512)
    refused(tiny[0], other, "calibration", "layers")


def test_a_calibration_of_other_heads(tiny, tmp_path):
    other = checkpoints.llama(num_key_value_heads=1)
    refused(
        tiny[0], checkpoints.save_calibration(tmp_path / "c.safetensors", other, tokens=512), "calibration", "heads"
    )


def test_an_unknown_setting(tiny):
    refused(*tiny, "windoww", **headq_options(tiny[1], windoww=64))


def test_a_block_size_that_is_no_multiple_of_32(tiny):
    refused(*tiny, "block", block_size=48)


def test_soft_capped_logits(tiny, tmp_path):
    config = transformers.Gemma2Config(**SMALL, **GROUPED, attn_logit_softcapping=50.0, query_pre_attn_scalar=64)
    refused(checkpoints.save_config(tmp_path / "gemma2", config, "Gemma2ForCausalLM"), tiny[1], "softcap")


def test_alibi(tiny, tmp_path):
    config = transformers.BloomConfig(hidden_size=128, n_head=2, n_layer=2, vocab_size=checkpoints.VOCAB)
    refused(checkpoints.save_config(tmp_path / "bloom", config, "BloomForCausalLM"), tiny[1], "alibi")


def test_sinks(tiny, tmp_path):
    config = transformers.GptOssConfig(
        **SMALL, **GROUPED, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 2
    )
    refused(checkpoints.save_config(tmp_path / "oss", config, "GptOssForCausalLM"), tiny[1], "sinks")


def test_latent_attention(tiny, tmp_path):
    config = transformers.DeepseekV2Config(
        **SMALL, num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64,
        qk_nope_head_dim=128, v_head_dim=128, first_k_dense_replace=2, n_routed_experts=2, moe_intermediate_size=64,
    )  # fmt: skip
    refused(checkpoints.save_config(tmp_path / "mla", config, "DeepseekV2ForCausalLM"), tiny[1], "MLA")
