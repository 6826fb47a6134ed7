"""Every causal LM and image-text-to-text model of transformers, tiny: few and small layers, seeded weights."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

TEXT: dict[str, Any] = dict(
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
VISION: dict[str, Any] = dict(
    hidden_size=32, embed_dim=32, d_model=32, dim=32, intermediate_size=32, ffn_dim=32, encoder_ffn_dim=32,
    num_hidden_layers=1, depth=1, encoder_layers=1, num_attention_heads=2, num_heads=2, encoder_attention_heads=2,
    num_key_value_heads=2, head_dim=16, image_size=32, patch_size=16, out_hidden_size=64,
)  # fmt: skip
LOCAL_GLOBAL = ["sliding_attention", "full_attention"]
GEMMA: dict[str, Any] = dict(
    model_type="gemma", hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, vocab_size=128,
)  # fmt: skip
OWN: dict[str, dict[str, Any]] = {  # what a class needs beside
    "apertus1p5": dict(
        vision_config=dict(codebook_size=8, base_channels=32), audio_config=dict(codebook_dim=32, codebook_size=8),
        image_token_offset=100, audio_token_offset=108,
    ),
    "bamba": dict(attn_layer_indices=[1]),
    "chameleon": dict(vocabulary_map={"<image>": 120, "IMGIMGAZ": 121}, vq_config=dict(base_channels=32)),
    "codegen": dict(rotary_dim=16),
    "deepseek_ocr2": dict(
        vision_config=dict(
            encoder_config=dict(
                hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
            ),
            sam_config=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, global_attn_indexes=[0]),
        ),
    ),
    "deepseek_ocr2_text": dict(mlp_layer_types=["dense", "sparse"]),
    "diffusion_gemma_text": dict(top_k_experts=2),
    "dory": dict(num_hidden_layers=3, n_input_layers=1, n_recurrent_layers=1, n_output_layers=1),
    "dots3_note": dict(
        vision_config=dict(per_layer_config={}, adapter_in_dim=32, adapter_out_dim=64),
        audio_config=dict(adapter_input_size=32, adapter_out_dim=64),
    ),
    "emu3": dict(
        vocabulary_map={"<image>": 120, "<|extra_200|>": 121, "<|visual token 000000|>": 122},
        vq_config=dict(base_channels=32, codebook_size=8),
    ),
    "ernie4_5_vl_moe_text": dict(
        moe_intermediate_size=[32, 32],
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[3, 3, 2]),
    ),
    "dots3_note_text": dict(num_key_value_heads=4),
    "gemma3n_text": dict(
        num_hidden_layers=4, layer_types=LOCAL_GLOBAL * 2, num_kv_shared_layers=2, vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8, laurel_rank=8, activation_sparsity_pattern=[0.0] * 4, intermediate_size=[64] * 4,
    ),
    "gemma4_text": dict(
        vocab_size_per_layer_input=128, hidden_size_per_layer_input=8, layer_types=LOCAL_GLOBAL, num_kv_shared_layers=0,
        global_head_dim=32,
    ),
    "glm5_next_text": dict(
        qk_rope_head_dim=0, head_dim=0, index_topk=1024, index_kpool=4, index_head_dim=16, index_n_heads=2,
    ),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=64),
    "granite4_vision": dict(
        vision_config=dict(hidden_size=64), deepstack_layer_map=[[0, 0]], spatial_target_layers=[0],
        downsample_rate="1/2",
    ),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "falcon_h1": dict(
        mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=16,
    ),
    "kimi_linear": dict(linear_head_dim=16, linear_num_heads=2),
    "zamba": dict(layer_types=["linear_attention", "hybrid"] * 2, num_hidden_layers=4),
    "gptj": dict(rotary_dim=16),
    "laguna": dict(num_attention_heads_per_layer=[2, 4], layer_types=["full_attention", "sliding_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "llama4_text": dict(
        attention_chunk_size=48, layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0],
        intermediate_size_mlp=64,
    ),
    "mamba2": dict(num_heads=4, head_dim=32, n_groups=1, state_size=8),
    "mllama_text_model": dict(num_hidden_layers=3, cross_attention_layers=[1]),
    "molmo2_vision": dict(image_size=[32, 32]),
    "molmo2_adapter": dict(text_hidden_size=64, vision_feature_layer=[0]),
    "moshi": dict(sliding_window=1024),  # its cache slides, its mask does not: cached and uncached calls differ
    "muse_spark_audio": dict(patch_sizes=[16], hidden_sizes=[32], depths=[1]),
    "nemotron_h_omni": dict(vision_config=dict(video_temporal_patch_size=2)),
    "inkling2": dict(vision_config=dict(text_hidden_size=64)),
    "inkling2_loop": dict(vision_config=dict(text_hidden_size=64)),
    "paligemma": dict(projection_dim=64),
    "pi0": dict(
        vlm_config=dict(
            model_type="paligemma", text_config=GEMMA, projection_dim=64, image_token_id=120,
            vision_config=dict(
                model_type="siglip_vision_model", hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, image_size=32, patch_size=16, vision_use_head=False,
            ),
        ),
        dit_config=GEMMA,
    ),
    "qwen3_omni_moe_text": dict(sliding_window=1024),  # so it is here
    "reformer": dict(attn_layers=["local", "lsh"], is_decoder=True, axial_pos_embds=False),
    "roc_bert": dict(
        pronunciation_vocab_size=16, shape_vocab_size=16, pronunciation_embed_dim=8, shape_embed_dim=8,
    ),
    "xmod": dict(default_language="en_XX"),
    "inkling2_loop_text": dict(unpadded_vocab_size=128),
    "inkling2_text": dict(unpadded_vocab_size=128),
    "qwen4_exp_text": dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=1024, indexer_compress_ratio=4,
    ),
    "mimo_v2_flash": dict(head_dim=32, v_head_dim=16),
    "zamba2": dict(
        layers_block_type=["hybrid", "linear_attention", "hybrid"], num_hidden_layers=3, num_mem_blocks=1,
        mamba_headdim=16, n_mamba_heads=8, chunk_size=16,
    ),
    "zaya": dict(num_experts_per_tok=1),
    "cohere_compass_text": dict(
        rope_parameters={kind: {"rope_type": "default", "rope_theta": 1e4} for kind in LOCAL_GLOBAL}
    ),
}  # fmt: skip
BESIDE = {  # what no field of a config holds, and its model's code reads
    "qwen2_5_omni_thinker": {"vision_start_token_id": 120},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 120},
}
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
MAPPINGS = {
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "images": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}


def classes(mapping: str) -> dict[str, tuple[str, str]]:
    """Of a mapping of transformers: each entry's model type to build and class."""
    found = {}
    for name, kind in MAPPINGS[mapping].items():
        part = TEXT_PART.get(name, name) if mapping == "causal" else name
        found[name] = part, kind if isinstance(kind, str) else kind[0]
    return found


def fields(config_class: Any) -> set[str]:
    """Names that a config class takes."""
    names = set(inspect.signature(config_class).parameters) | set(getattr(config_class, "__dataclass_fields__", {}))
    return names | set(config_class.attribute_map)


def three_dimensional(config_class: Any) -> bool:
    """Whether a model's code turns parts of its keys by time, height and width, as many as a config says."""
    name = Path(inspect.getfile(config_class))
    code = name.with_name(name.name.replace("configuration_", "modeling_"))
    return code.exists() and "mrope_section" in code.read_text(encoding="utf-8")


def text_options(config_class: Any, model_type: str) -> dict[str, Any]:
    """A decoder's options: of a hybrid one layer of each kind, of MLA as many key-value heads as query heads."""
    names = fields(config_class)
    own: dict[str, Any] = {**TEXT, **OWN.get(model_type, {})}
    options = {name: value for name, value in own.items() if name in names}
    if "kv_lora_rank" in names and options.get("kv_lora_rank"):
        options["num_key_value_heads"] = options["num_attention_heads"]
    try:
        default = config_class()
    except Exception:  # a config without defaults
        default = None
    rope = getattr(default, "rope_parameters", None) or {}
    # of the coordinates that turn with time, height and width
    turns = "hidden_size" in options and "rope_parameters" not in options
    if turns and ("mrope_section" in rope or three_dimensional(config_class)):
        rope = {"rope_type": "default", "rope_theta": 1e4} | rope
        head_dim = options.get("head_dim", options["hidden_size"] // options["num_attention_heads"])
        turned = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
        part = turned * 3 // 8
        options["rope_parameters"] = rope | {"mrope_section": [turned - 2 * part, part, part]}
    if not {"layer_types", config_class.attribute_map.get("layer_types")} & {*options}:
        kinds = dict.fromkeys(getattr(default, "layer_types", None) or ())
        settable = not isinstance(
            getattr(config_class, config_class.attribute_map.get("layer_types", "layer_types"), 0), property
        )
        if settable and not {*kinds} <= {"full_attention", "sliding_attention", "chunked_attention"}:
            options |= {"layer_types": [*kinds], "num_hidden_layers": len(kinds)}
    return options


def tiny_config(model_type: str, own: dict[str, Any] | None = None) -> Any:
    """A config with few and small layers, and so are the configs of its parts; ``own``: what it is to have beside."""
    config_class = CONFIG_MAPPING[model_type]
    options = text_options(config_class, model_type)
    parts = getattr(config_class, "sub_configs", {})
    whole = config_class() if parts else None
    for name in parts:
        part = getattr(whole, name, None)
        if part is not None:
            text = any(word in name for word in ("text", "llm", "language"))
            small: dict[str, Any] = {**VISION, **OWN.get(part.model_type, {})}
            of_part = {k: v for k, v in small.items() if k in fields(type(part))}
            of_part = text_options(type(part), part.model_type) if text else of_part
            options[name] = {"model_type": part.model_type} | of_part
    for name, value in (OWN.get(model_type, {}) | (own or {})).items():
        options[name] = options.get(name, {}) | value if name in parts else value
    config = config_class(**options)
    for name, value in BESIDE.get(model_type, {}).items():
        setattr(config, name, value)
    return config


def tiny_model(model_type: str, kind: str, own: dict[str, Any] | None = None) -> PreTrainedModel:
    """A seeded model in eval mode; ``own``: of its config, beside what makes it tiny."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, kind)(tiny_config(model_type, own)).eval()
    for name, parameter in model.named_parameters():
        # a projection of images, which only training makes other
        if parameter.ndim > 1 and "bias" not in name and not parameter.any():
            nn.init.normal_(parameter, std=TEXT["initializer_range"])
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model
