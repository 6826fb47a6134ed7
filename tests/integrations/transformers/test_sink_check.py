"""A prompt's first tokens, computed again: held against the sinks, and no trace left."""

import pytest
import torch

from headq_ao import HeadQCache, headq_config, quantize_
from headq_ao.calibration.observers import RECORDER
from headq_ao.integrations.transformers import sink_check
from headq_ao.integrations.transformers.sink_check import first_ids, relative_error, sink_error, tolerance, undisturbed
from tests.conftest import build_tiny

FAST = {"epoch_tokens": 64, "residual_length": 32, "block_size": 16}
IDS = (torch.arange(200) * 7 % 101 + 3)[None]


@torch.no_grad()
def filled(model, ids=IDS, **arguments):
    cache = HeadQCache(model)
    model(ids, cache=cache, **arguments)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sinks_come_out_again(dtype):
    model = build_tiny().to(dtype)
    quantize_(model, headq_config(**FAST))
    mask = torch.ones(3, 200, dtype=torch.long)
    mask[0, :9] = 0
    cache = filled(model, IDS.repeat(3, 1), attention_mask=mask)
    error = sink_error(cache, model)
    assert error <= (1e-5 if dtype == torch.float32 else 0.02)
    cache.batch_select_indices(torch.tensor([0]))
    assert sink_error(cache, model) is None  # it begins with padding


@pytest.mark.parametrize("side", ["k", "v"])
def test_sinks_of_other_weights_are_told(quantized, side):
    """The error is that of keys and values over all layers: one side of one of two layers, doubled, is half of it."""
    model = quantized(options={"check_finite": False})
    cache = filled(model)
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn, f"{side}_proj").weight *= 2
    assert sink_error(cache, model) == pytest.approx(0.5, rel=1e-3)


def test_sequences_that_begin_alike_are_computed_once(model):
    ids = torch.cat([IDS, IDS.flip(1), IDS])
    cache = filled(model, ids)
    n = cache.config.n_sink
    assert first_ids(cache) == {tuple(ids[0, :n].tolist()): 0, tuple(ids[1, :n].tolist()): 1}
    with torch.no_grad():
        short = filled(model, ids[:, :2])
    assert first_ids(short) == {tuple(ids[0, :2].tolist()): 0, tuple(ids[1, :2].tolist()): 1}
    embedded = HeadQCache(model)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(IDS), cache=embedded)
    assert first_ids(embedded) == {} and sink_error(embedded, model) is None


def test_weights_that_are_elsewhere_are_not_asked(model):
    cache = filled(model)
    model.lm_head.to("meta")
    assert sink_error(cache, model) is None


def test_relative_error():
    x = torch.tensor([3.0, 4.0]).half()
    assert float(relative_error(x, torch.tensor([3.0, 4.5]))) == pytest.approx(0.1)
    assert float(relative_error(x * 0, torch.zeros(2))) == 0.0


def test_tolerance_follows_the_dtype_and_the_products(model, monkeypatch):
    cache = filled(model)
    assert tolerance(cache) == sink_check.ROUNDING
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert tolerance(cache) == torch.finfo(torch.float16).eps ** 0.5
    half = filled(model.bfloat16())
    assert tolerance(half) == torch.finfo(torch.bfloat16).eps ** 0.5


def test_a_model_called_in_between_is_as_it_was():
    """Modes, attributes that were changed, added or taken away, buffers, and the recorder; also after an error."""
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm1d(4))
    model.train()
    model[1].eval()
    model[0].kept, mean = 1, model[1].running_mean
    recorder = object()
    token = RECORDER.set(recorder)

    def disturb():
        with undisturbed(model):
            assert not model[0].training and RECORDER.get() is None and not torch.is_grad_enabled()
            model[0].kept, model[0].more = 2, 3
            model[1].running_mean = torch.ones(4)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        disturb()
    assert RECORDER.get() is recorder and torch.is_grad_enabled()
    RECORDER.reset(token)
    assert model[0].training and not model[1].training
    assert model[0].kept == 1 and not hasattr(model[0], "more") and model[1].running_mean is mean
