"""Attention with sink logits in the softmax's denominator."""

import copy

import pytest
import torch

from headq_ao import HeadQCache, calibrate, headq_config, quantize_, restore_
from headq_ao.evals.models.sweep_checks import OPTIONS
from headq_ao.evals.models.tiny import classes, tiny_model
from headq_ao.statistics.importance import attention


@pytest.fixture
def models():
    model = tiny_model(*classes("causal")["gpt_oss"])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.copy_(torch.tensor([3.0, 1.0, -1.0, 2.0]))
    return model, copy.deepcopy(model)


def ids_of():
    return torch.randint(5, 100, (2, 80), generator=torch.Generator().manual_seed(0))


def test_first_calls_and_calls_without_a_cache_are_exact(models):
    model, dense = models
    with torch.no_grad():
        expected = dense(input_ids=ids_of()).logits
        dense.model.layers[0].self_attn.sinks -= 30  # so that they count for something
        other = dense(input_ids=ids_of()).logits
    assert (other - expected).abs().max() > 0.1
    quantize_(model, headq_config(**OPTIONS))
    mask = torch.ones_like(ids_of())
    mask[0, :9] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids_of()).logits, expected, atol=1e-4, rtol=1e-4)
        with pytest.warns(UserWarning, match="dense keys"):
            plain = model(input_ids=ids_of(), use_cache=False).logits
        padded = model(input_ids=ids_of(), attention_mask=mask).logits
    torch.testing.assert_close(plain, expected, atol=1e-4, rtol=1e-4)
    restore_(model)
    with torch.no_grad():
        told = model(input_ids=ids_of(), attention_mask=mask).logits
    torch.testing.assert_close(padded[mask != 0], told[mask != 0], atol=1e-4, rtol=1e-4)


def test_weights_leave_room_for_the_sinks(models):
    model, dense = models
    dense.set_attn_implementation("eager")
    quantize_(model, headq_config(**OPTIONS))
    cache = HeadQCache(model)
    with torch.no_grad():
        expected = dense(input_ids=ids_of(), output_attentions=True).attentions
        found = model(input_ids=ids_of()[:, :79], cache=cache, output_attentions=True).attentions
        last = model(input_ids=ids_of()[:, 79:], cache=cache, output_attentions=True).attentions
    for first, step, whole in zip(found, last, expected, strict=True):
        torch.testing.assert_close(first, whole[:, :, :79, :79], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(step[:, :, 0], whole[:, :, 79], atol=3e-3, rtol=0.05)
        assert (step.sum(-1) < 0.99).any()


def test_statistics_know_sinks():
    s, sinks = torch.randn(1, 2, 2, 3, 5), torch.randn(4)
    wide = torch.cat([s, sinks.view(1, 2, 2, 1, 1).expand(*s.shape[:-1], 1)], -1)
    torch.testing.assert_close(attention(s, sinks), wide.softmax(-1)[..., :-1])


@pytest.mark.filterwarnings("ignore:HeadQ. the calibration rests on")
def test_calibration_counts_less_of_what_sinks_take(models):
    model, other = models
    with torch.no_grad():
        for layer in other.model.layers:
            layer.self_attn.sinks.fill_(-30.0)
    found, without = (calibrate(m, [ids_of()], progress=False).layers[0] for m in (model, other))
    assert (found.v_seen < without.v_seen).all()
