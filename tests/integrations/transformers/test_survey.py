"""Every class of causal LM in transformers, tiny: refused by name and unchanged, or near dense through its cache."""

import inspect
import warnings

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from headq_ao import HeadQCache, calibrate, headq_config, quantize_, restore_

TEXT = dict(
    vocab_size=128, hidden_size=64, n_embd=64, d_model=64, dim=64, dim_model=64, embedding_size=64,
    intermediate_size=64, n_inner=64, ffn_dim=64, d_ff=64, dim_ff=64, moe_intermediate_size=32,
    shared_expert_intermediate_size=32, decoder_ffn_dim=64, encoder_ffn_dim=32, projection_dim=32,
    num_hidden_layers=2, n_layer=2, n_layers=2, num_layers=2, decoder_layers=2, encoder_layers=1,
    num_attention_heads=4, n_head=4, n_heads=4, num_heads=4, decoder_attention_heads=4, encoder_attention_heads=2,
    num_key_value_heads=2, head_dim=16, dim_head=16, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=16,
    qk_nope_head_dim=16, v_head_dim=16, mamba_d_state=8, num_experts=4, num_local_experts=4, n_routed_experts=4,
    moe_num_experts=4, num_experts_per_tok=2, moe_topk=2, moe_k=2, n_group=1, topk_group=1, n_shared_experts=1,
    sliding_window=64, max_position_embeddings=1024, n_positions=1024, n_ctx=1024,
    initializer_range=0.1, init_std=0.1, attention_dropout=0.0, is_decoder=True,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
VISION = dict(
    hidden_size=32, embed_dim=32, d_model=32, dim=32, intermediate_size=32, ffn_dim=32, encoder_ffn_dim=32,
    num_hidden_layers=1, depth=1, encoder_layers=1, num_attention_heads=2, num_heads=2, encoder_attention_heads=2,
    num_key_value_heads=2, head_dim=16, image_size=32, patch_size=16, out_hidden_size=64,
)  # fmt: skip
LOCAL_GLOBAL = ["sliding_attention", "full_attention"]
OWN = {  # what a class needs beside
    "codegen": dict(rotary_dim=16),
    "dots3_note_text": dict(num_key_value_heads=4),
    "gemma3n_text": dict(
        num_hidden_layers=4, layer_types=LOCAL_GLOBAL * 2, num_kv_shared_layers=2, vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8, laurel_rank=8, activation_sparsity_pattern=[0.0] * 4, intermediate_size=[64] * 4,
    ),
    "gemma4_text": dict(
        vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, layer_types=LOCAL_GLOBAL, num_kv_shared_layers=0,
        global_head_dim=32,
    ),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=64),
    "gptj": dict(rotary_dim=16),
    "laguna": dict(num_attention_heads_per_layer=[2, 4], layer_types=["full_attention", "sliding_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "mamba2": dict(num_heads=4, head_dim=32, n_groups=1, state_size=8),
    "mllama_text_model": dict(num_hidden_layers=3, cross_attention_layers=[1]),
    "moshi": dict(sliding_window=1024),  # its cache slides, its mask does not: cached and uncached calls differ
    "reformer": dict(attn_layers=["local", "lsh"], is_decoder=True, axial_pos_embds=False),
    "roc_bert": dict(
        pronunciation_vocab_size=16, shape_vocab_size=16, pronunciation_embed_dim=8, shape_embed_dim=8,
    ),
    "xmod": dict(default_language="en_XX"),
    "zamba2": dict(layer_types=["mamba", "hybrid"]),
    "zaya": dict(num_experts_per_tok=1),
    "cohere_compass_text": dict(
        rope_parameters={kind: {"rope_type": "default", "rope_theta": 1e4} for kind in LOCAL_GLOBAL}
    ),
}  # fmt: skip
TEXT_PART = {  # classes of causal LMs that take the text part of a larger config
    "dots3_note": "dots3_note_text",
    "emu3": "emu3_text_model",
    "llama4": "llama4_text",
    "mllama": "mllama_text_model",
    "musicgen": "musicgen_decoder",
    "musicgen_melody": "musicgen_melody_decoder",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen4_exp": "qwen4_exp_text",
}
NOT_BUILT = {  # as small as this, or without packages of their own
    "blt", "dbrx", "fuyu", "gemma3n", "gemma4", "gemma4_assistant", "gemma4_unified_assistant", "inkling2_loop_text",
    "inkling2_text", "phi4_multimodal", "zamba",
}  # fmt: skip
CAUSAL = {
    name: kind if isinstance(kind, str) else kind[0]
    for name, kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    if name not in NOT_BUILT
}
WITH_IMAGES = {
    name: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name] for name in ("llava_onevision", "llava", "mllama")
}
QUICK = [  # one of each kind of answer
    "bart", "bert", "dory", "doge", "falcon_mamba", "gemma4_unified_text", "git", "gpt2", "jetmoe", "laguna", "llama",
    "mamba", "mixtral", "mllama", "musicgen_melody", "openai-gpt", "qwen3_5", "rwkv", "whisper", "xlstm", "diffllama",
]  # fmt: skip
SIZES = [60, 1, 1, 1, 17, 16]
ACCEPTED = 90  # classes that run, at least


def fields(config_class):
    names = set(inspect.signature(config_class).parameters) | set(getattr(config_class, "__dataclass_fields__", {}))
    return names | set(config_class.attribute_map)


def tiny_config(model_type):
    """A config with few and small layers, and so are the configs of its parts."""
    config_class = CONFIG_MAPPING[model_type]
    options = {name: value for name, value in (TEXT | OWN.get(model_type, {})).items() if name in fields(config_class)}
    parts = getattr(config_class, "sub_configs", {})
    whole = config_class() if parts else None
    for name in parts:
        part = getattr(whole, name, None)
        if part is not None:
            text = any(word in name for word in ("text", "llm", "language"))
            small = (TEXT if text else VISION) | OWN.get(part.model_type, {})
            of_part = {k: v for k, v in small.items() if k in fields(type(part))}
            options[name] = {"model_type": part.model_type} | of_part
    return config_class(**options)


def tiny_model(model_type, kind):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, kind)(tiny_config(model_type)).eval()
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def trace(model):
    """Everything of a model that a probe or ``quantize_`` could touch."""
    return (
        {name: (type(m), m.training, sorted(vars(m))) for name, m in model.named_modules()},
        {name: (t.data_ptr(), t.dtype, t._version) for name, t in model.state_dict(keep_vars=True).items()},
        {name: (t.data_ptr(), t._version) for name, t in model.named_buffers()},
        [[list(getattr(m, hooks)) for hooks in vars(m) if hooks.endswith("_hooks")] for m in model.modules()],
        model.config.to_dict(),
        [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        torch.get_rng_state().tolist(),
    )


def through_cache(model, ids, cache):
    with torch.no_grad():
        return torch.cat([model(input_ids=part, cache=cache).logits for part in ids.split(SIZES, 1)], 1)


def answer(model_type, kind):
    """What became of one class: the reason of a refusal, or its relative error at 8 bits."""
    model = tiny_model(model_type, kind)
    ids = torch.randint(5, 100, (2, sum(SIZES)), generator=torch.Generator().manual_seed(0))
    before = trace(model)
    try:
        quantize_(model, headq_config(k_bits=8, v_bits=8, rank=0, epoch_tokens=32, residual_length=32, block_size=16))
    except ValueError as error:
        assert trace(model) == before, f"{model_type}: refused, but changed"
        return str(error)
    cache = HeadQCache(model)
    logits = through_cache(model, ids, cache)
    assert cache.packed_fraction > 0.03
    model.generate(ids[:, :70], max_new_tokens=4, do_sample=False)
    restore_(model)
    dense = through_cache(model, ids, DynamicCache(config=model.config))
    return ((logits - dense).norm() / (dense - dense.mean((0, 1))).norm()).item()


def check(model_type, kind):
    """Whether a class runs."""
    found = answer(TEXT_PART.get(model_type, model_type), kind)
    if isinstance(found, str):
        assert "not supported" in found
        return False
    assert found < 0.1, f"{model_type}: error {found}"
    return True


@pytest.mark.parametrize("model_type", QUICK)
def test_classes(model_type):
    check(model_type, CAUSAL[model_type])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers' own, about configs and padding
def test_every_class():
    failures, accepted = {}, []
    for model_type, kind in CAUSAL.items():
        try:
            if check(model_type, kind):
                accepted.append(model_type)
        except Exception as error:
            failures[model_type] = repr(error)
    assert failures == {}
    assert len(accepted) >= ACCEPTED, accepted


REASONS = {
    "bart": "cross-attention", "bigbird_pegasus": "cross-attention", "marian": "cross-attention",
    "musicgen": "cross-attention", "mllama": "cross-attention", "whisper": "cross-attention",
    "diffllama": "AttentionInterface", "doge": "AttentionInterface", "git": "AttentionInterface",
    "jetmoe": "AttentionInterface", "bloom": "AttentionInterface",
    "dory": "2 times caches keys",
    "gemma4_unified_text": "no one number of attention heads",
    "musicgen_melody": "input embedding is a ModuleList",
    "dots3_note_text": "latent attention",
    "mamba": "no KV cache", "falcon_mamba": "no KV cache", "rwkv": "no KV cache", "xlstm": "no KV cache",
    "recurrent_gemma": "no KV cache", "openai-gpt": "no KV cache",
}  # fmt: skip


@pytest.mark.parametrize("model_type", REASONS)
def test_reasons(model_type):
    model = tiny_model(TEXT_PART.get(model_type, model_type), CAUSAL[model_type])
    before = trace(model)
    with pytest.raises(ValueError, match="not supported") as error:
        quantize_(model, headq_config())
    assert REASONS[model_type] in str(error.value)
    with pytest.raises(ValueError, match="not supported") as of_calibrate:
        calibrate(model, [torch.arange(5, 60)], progress=False)
    assert str(of_calibrate.value) == str(error.value)
    assert trace(model) == before


def test_values_that_differ_by_layer_in_the_config():
    """A config read as a whole where its layers differ raises transformers' own error."""
    from headq_ao.integrations.transformers.models import layer_shapes

    with pytest.raises(ValueError, match="latent attention"):
        layer_shapes(CONFIG_MAPPING["dots3_note_text"]())
    with pytest.raises(ValueError, match="latent attention"):
        layer_shapes(CONFIG_MAPPING["dots3_note"]())


@pytest.mark.parametrize("model_type", WITH_IMAGES)
@pytest.mark.filterwarnings("ignore")
def test_models_with_images_are_probed_with_text(model_type):
    found = answer(model_type, WITH_IMAGES[model_type])
    if model_type == "mllama":
        assert "cross-attention" in found
    else:
        assert found < 0.1
