"""Which configs and filters quantize_ takes, and what it hands to torchao."""

import pytest
import torch
import torchao
from torchao.quantization import Int8WeightOnlyConfig, transform_module
from transformers import AttentionInterface
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from headq_ao import Calibration, headq_config, quantize_
from headq_ao.config import HeadQConfig
from headq_ao.integrations.transformers import hooks
from headq_ao.integrations.transformers.calls import headq_attention
from headq_ao.integrations.transformers.loading import HeadQLoader
from tests.integrations.transformers.traces import trace


def test_torchao_default_filter_is_answered_with_the_fix(tiny):
    model = tiny()
    before = trace(model)
    with pytest.raises(ValueError, match=r"got a Linear; call headq_ao.quantize_\(model, config\)"):
        torchao.quantization.quantize_(model, headq_config())
    assert trace(model) == before


def test_filter_fn_is_refused(tiny):
    model = tiny()
    with pytest.raises(ValueError, match="without filter_fn"):
        quantize_(model, headq_config(), filter_fn=lambda module, name: True)
    assert not hasattr(model, "_headq")
    quantize_(model, headq_config(), filter_fn=None)  # torchao's word for its default


def test_other_configs_pass_through(tiny, token_ids):
    ids = token_ids(1, 40)

    def only_keys(module, name):
        return name.endswith("k_proj")

    for arguments in ({}, {"filter_fn": only_keys}, {"filter_fn": None}, {"device": "cpu"}):
        ours, theirs = tiny(), tiny()
        torchao.quantization.quantize_(theirs, Int8WeightOnlyConfig(version=2), **arguments)
        quantize_(ours, Int8WeightOnlyConfig(version=2), **arguments)
        kinds = [[type(m.weight) for m in x.modules() if isinstance(m, torch.nn.Linear)] for x in (ours, theirs)]
        assert kinds[0] == kinds[1]
        assert len(set(kinds[0])) == (2 if arguments.get("filter_fn") else 1)
        with torch.no_grad():
            assert torch.equal(ours(ids).logits, theirs(ids).logits)
        assert not hasattr(ours, "_headq")


@pytest.mark.parametrize(
    "given", [None, "int8", HeadQConfig, torch.nn.Linear(2, 2)], ids=["none", "text", "class", "model"]
)
def test_what_is_no_config_is_named(tiny, given):
    model = tiny()
    before = trace(model)
    with pytest.raises(ValueError, match=r"takes a config such as headq_config\(\) or torchao's, got .* as config"):
        quantize_(model, given)
    assert trace(model) == before


def test_a_device_is_moved_to_first(tiny):
    """Also where the config is then refused, as torchao does it."""
    model = tiny(layers=1)
    with pytest.raises(ValueError, match="made on another model"):
        quantize_(model, headq_config(calibration=Calibration([], {"model_type": "gpt2"})), device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"} and not hasattr(model, "_headq")


def test_the_names_of_what_is_registered():
    """Importing quantize_ makes the attention function, the quantizer and the config's handler known."""
    assert AttentionInterface()["headq"] is headq_attention
    assert AUTO_QUANTIZER_MAPPING["headq"] is HeadQLoader
    assert transform_module._QUANTIZE_CONFIG_HANDLER[HeadQConfig] is hooks.attach
