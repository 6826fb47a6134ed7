"""What quantize_ leaves on a model."""

import pytest
import torch
import transformers

from headq_ao import headq_config, quantize_
from headq_ao.integrations.transformers.model_state import HeadQState
from headq_ao.integrations.transformers.serving import Serving
from headq_ao.layer_shape import LayerShape

SHAPE = LayerShape(4, 2, 32, None)


def test_a_layer_computes_where_its_module_does():
    """Natively where the attention module is; of the fallback, which has none, where the codec's buffers lie."""
    native = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta")]
    state = HeadQState(headq_config(), [SHAPE] * 2, Serving([SHAPE] * 2, [0, 1], native))
    assert [state.device(i).type for i in (0, 1)] == ["cpu", "meta"] and state.fallback is None
    source = torch.nn.Module()
    source.register_buffer("x", torch.empty(1, device="meta"))
    state = HeadQState(headq_config(), [SHAPE], Serving([SHAPE], [0], fallback="why"), codecs=[source])
    assert state.device(0).type == "meta" and state.fallback == "why"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_a_quantized_model_has(tiny, family):
    model, config = tiny(family), headq_config()
    quantize_(model, config)
    state = model._headq
    assert state.config is config and state.calibration is None and state.fingerprint["layers"] == 2
    assert [layer.self_attn.headq for layer in model.model.layers] == state.codecs
    assert state.shapes == state.serving.shapes and state.serving.places == [0, 1]
    assert any(c is model.config for c in state.attention_configs) and state.chosen_attention is None
    assert state.depth is None
    with torch.no_grad():
        model(torch.ones(1, 5, dtype=torch.int64))
    assert (state.depth.layers, state.depth.config) == (2, model.config), "of the last call"
    assert isinstance(state.depth.text, transformers.PretrainedConfig)
