"""Which configs and filters quantize_ takes, and what it hands to torchao."""

import pytest
import torch
import torchao
from torchao.quantization import Int8WeightOnlyConfig

from headq_ao import headq_config, quantize_
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
