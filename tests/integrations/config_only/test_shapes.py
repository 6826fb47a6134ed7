"""What a config alone tells of the layers of a cache."""

from types import SimpleNamespace

import pytest
import transformers

from headq_ao.integrations.config_only.shapes import (
    kv_heads_and_size,
    layer_shapes,
    query_heads,
    text_config,
    told_by_masks,
)
from headq_ao.layer_shape import LayerShape


def llama(**options):
    return transformers.LlamaConfig(**{"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 512} | options)


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        (llama(num_key_value_heads=2), [LayerShape(8, 2, 64, None)] * 2),
        (llama(head_dim=96), [LayerShape(8, 8, 96, None)] * 2),
        (transformers.GPT2Config(n_layer=1, n_head=4, n_embd=128), [LayerShape(4, 4, 32, None)]),
        (
            transformers.Gemma3TextConfig(
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=64, sliding_window=100,
                layer_types=["sliding_attention", "full_attention"],
            ),
            [LayerShape(4, 1, 64, 100), LayerShape(4, 1, 64, None)],
        ),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)  # fmt: skip
def test_shapes_of_layers(config, shapes):
    assert layer_shapes(config) == shapes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.T5Config(), "t5: encoder-decoder models are not supported"),
        (transformers.DeepseekV3Config(), "multi-head latent attention .* caches a latent"),
        (
            llama(num_kv_shared_layers=2),
            r"KV shared between layers .* config does not tell \(config.num_kv_shared_layers=2",
        ),
        (llama(use_bidirectional_attention=True), "its attention is not causal"),
        (llama(attention_chunk_size=64), "attention_chunk_size without layer_types"),
        (transformers.MambaConfig(num_hidden_layers=1), "no KV cache"),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)
def test_kinds_of_models_that_cannot_be_stored(config, message):
    with pytest.raises(ValueError, match=message):
        layer_shapes(config)


def test_decoders_whose_masks_tell_what_is_not_causal():
    """A word of its config is not enough: a plain decoder that says so is an encoder."""
    assert told_by_masks(transformers.Gemma4TextConfig(num_hidden_layers=1, use_bidirectional_attention="vision"))
    assert not told_by_masks(transformers.Gemma4TextConfig(num_hidden_layers=1, use_bidirectional_attention="all"))
    assert not told_by_masks(transformers.GemmaConfig(use_bidirectional_attention=True))
    assert not told_by_masks(llama())


def test_heads_and_their_size():
    assert kv_heads_and_size(llama(num_key_value_heads=None)) == (8, 64)
    assert kv_heads_and_size(llama(head_dim=None, num_key_value_heads=4)) == (4, 64)
    broken = SimpleNamespace(model_type="made", num_attention_heads=8, num_key_value_heads=[2, 4], head_dim=64)
    broken.get_text_config = lambda decoder: broken
    with pytest.raises(ValueError, match="its head counts differ between layers"):
        kv_heads_and_size(broken)
    broken.num_attention_heads = None
    with pytest.raises(ValueError, match="its config names no attention heads"):
        kv_heads_and_size(broken)


def test_query_heads_of_each_layer():
    config = llama()
    assert query_heads(config, 2) == [8, 8]
    config.num_attention_heads_per_layer = [4, 2]
    assert query_heads(config, 2) == [4, 2] and query_heads(config, 3) == [4, 4, 4]


def test_the_decoders_part_of_a_config():
    config = transformers.Gemma3Config(text_config={"num_hidden_layers": 1})
    assert text_config(config) is config.text_config and text_config(config.text_config) is config.text_config
