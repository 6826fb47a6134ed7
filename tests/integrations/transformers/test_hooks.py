"""What is put on a model and taken off it; what fails leaves it as it was."""

import pytest
import torch

from headq_ao import Calibration, HeadQCache, calibrate, headq_config, quantize_, restore_
from headq_ao.integrations.transformers import hooks
from headq_ao.layer_shape import LayerShape
from tests.integrations.transformers.traces import dense_logits, trace


def test_not_a_transformers_model():
    with pytest.raises(ValueError, match="whole transformers model, got a Sequential"):
        quantize_(torch.nn.Sequential(torch.nn.Linear(16, 16)), headq_config())


def test_heads_that_a_device_has_no_kernels_for_are_named():
    shapes = [LayerShape(4, 2, dim, None) for dim in (64, 512)]
    with pytest.warns(UserWarning, match="heads of 512 coordinates .* products on cuda, whose kernels take up to 256"):
        hooks.warn_wide(shapes, torch.device("cuda"))
    hooks.warn_wide(shapes, torch.device("cpu"))  # warnings are errors
    hooks.warn_wide(shapes[:1], torch.device("cuda"))


def test_twice_and_restore_without(tiny):
    model = tiny()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no HeadQ"):
        restore_(model)
    quantize_(model, headq_config())
    quantized = trace(model)
    with pytest.raises(ValueError, match="already has a HeadQ cache"):
        quantize_(model, headq_config(k_bits=4))
    assert trace(model) == quantized
    restore_(model)
    with pytest.raises(ValueError, match="has no HeadQ config"):
        HeadQCache(model)


def test_calibration_with_too_few_layers_leaves_no_trace(tiny, token_ids):
    model = tiny()
    whole = calibrate(model, [token_ids(2, 200)], progress=False)
    before = trace(model)
    with pytest.raises((ValueError, IndexError)):
        quantize_(model, headq_config(calibration=Calibration(whole.layers[:1], whole.fingerprint)))
    assert trace(model) == before


def test_failure_midway_leaves_the_model_unchanged(tiny, token_ids, monkeypatch):
    model, built = tiny(), []
    before, dense = trace(model), dense_logits(model, token_ids(1, 20))

    class Failing(hooks.LayerCodec):
        def __init__(self, *args):
            if built:
                raise MemoryError("layer 1")
            built.append(self)
            super().__init__(*args)

    with monkeypatch.context() as patch:
        patch.setattr(hooks, "LayerCodec", Failing)
        with pytest.raises(MemoryError):
            quantize_(model, headq_config())
    assert len(built) == 1
    assert trace(model) == before
    assert torch.equal(dense_logits(model, token_ids(1, 20)), dense)
    quantize_(model, headq_config())
