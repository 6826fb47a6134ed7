"""Attention whose scores are capped: ``softcap · tanh(s / softcap)`` before anything is hidden."""

import copy
import dataclasses

import pytest
import torch
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from headq_ao import HeadQCache, calibrate, headq_config, quantize_
from headq_ao.evals.models.sweep_checks import (
    ARITHMETIC,
    OPTIONS,
    arithmetic,
    kernels_on,
    limit,
    noisy_cache,
    relative,
    stream,
)
from headq_ao.integrations.transformers.probe import supported_layers

pytestmark = pytest.mark.filterwarnings("ignore:HeadQ. the calibration rests on")
CAP = 1.5  # of scores with a standard deviation near 2
SIZES = [96, 17, *[1] * 6]  # 119 tokens
TINY = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 96,
}  # fmt: skip


def gemma2(softcap=CAP):
    torch.manual_seed(0)
    config = Gemma2Config(
        **TINY, attn_logit_softcapping=softcap, query_pre_attn_scalar=16, initializer_range=0.2,
        attn_implementation="eager",
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def ids_of(n=119):
    return torch.randint(3, 60, (2, n), generator=torch.Generator().manual_seed(0))


def dense_stream(model, cache=None):
    return stream(model, ids_of(), DynamicCache(config=model.config) if cache is None else cache, SIZES)


def packed_stream(model, **options):
    quantize_(model, headq_config(**OPTIONS | options))
    return stream(model, ids_of(), HeadQCache(model), SIZES)


def test_through_the_cache_as_in_eager_attention():
    """Within the noise that 8 bits leave; without the cap the model is quite another."""
    model, dense = gemma2(), gemma2()
    expected = dense_stream(dense)
    control = relative(dense_stream(dense, noisy_cache(dense, 0)), expected)
    assert relative(dense_stream(gemma2(None)), expected) > 10 * limit(control)
    assert relative(packed_stream(model), expected) <= limit(control)
    assert not model._headq.fallback and {layer.shape.softcap for layer in HeadQCache(model).layers} == {CAP}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name):
    """A dense cache of the rows that the packed one stands for gives the same logits."""
    model, dense = gemma2(), gemma2()
    quantize_(model, headq_config(**OPTIONS))
    with kernels_on(name == "kernel"):
        assert arithmetic(model, dense, ids_of()) <= ARITHMETIC[name]


def test_first_calls_and_calls_without_a_cache_are_exact():
    model, dense = gemma2(), gemma2()
    quantize_(model, headq_config(**OPTIONS))
    mask = torch.ones_like(ids_of(80))
    mask[0, :9] = 0
    with torch.no_grad():
        expected, told = dense(ids_of(80)).logits, dense(ids_of(80), attention_mask=mask).logits
        torch.testing.assert_close(model(ids_of(80)).logits, expected, atol=1e-4, rtol=1e-4)
        with pytest.warns(UserWarning, match="dense keys"):
            plain = model(ids_of(80), use_cache=False).logits
        padded = model(ids_of(80), attention_mask=mask).logits
    torch.testing.assert_close(plain, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(padded[mask != 0], told[mask != 0], atol=1e-4, rtol=1e-4)


def test_attention_weights():
    model, dense = gemma2(), gemma2()
    quantize_(model, headq_config(**OPTIONS))
    cache = HeadQCache(model)
    with torch.no_grad():
        expected = dense(ids_of(60), output_attentions=True).attentions
        found = model(ids_of(60)[:, :59], cache=cache, output_attentions=True).attentions
        last = model(ids_of(60)[:, 59:], cache=cache, output_attentions=True).attentions
    for first, step, whole in zip(found, last, expected, strict=True):
        torch.testing.assert_close(first, whole[:, :, :59, :59], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(step[:, :, 0], whole[:, :, 59], atol=3e-3, rtol=0.1)


def test_a_compiled_model():
    model, dense = gemma2(), gemma2()
    expected = dense_stream(dense)
    calibration = calibrated(gemma2())
    plain = packed_stream(copy.deepcopy(model), calibration=calibration)
    quantize_(model, headq_config(calibration=calibration, **OPTIONS))
    cache, found, at = HeadQCache(model, max_length=200, batch_size=2), [], 0
    compiled = torch.compile(model, backend="eager")
    for i, n in enumerate(SIZES):
        with torch.no_grad():
            found.append((compiled if i else model)(ids_of()[:, at : at + n], cache=cache).logits)
        at += n
    logits = torch.cat(found, 1)
    assert relative(logits, plain) < 1e-3 and relative(logits, expected) < 0.1


def calibrated(model):
    made = calibrate(model, [ids_of(300)], progress=False)
    layers = [dataclasses.replace(layer, effective=None) for layer in made.layers]
    return dataclasses.replace(made, layers=layers)


def test_calibration_sees_capped_attention():
    """Weights are those of the capped softmax, and capped scores answer less to errors of keys."""
    found, without = (calibrate(gemma2(cap), [ids_of(300)], progress=False) for cap in (CAP, None))
    for capped, plain in zip(found.layers, without.layers, strict=True):
        assert (capped.k_seen < 0.5 * plain.k_seen).all()  # Σ a (1 − a) (1 − tanh²)²
        assert capped.errors is not None and plain.errors is not None
        assert (capped.errors[:, 0].sum() / capped.energy.sum()) < (plain.errors[:, 0].sum() / plain.energy.sum())


def test_another_softcap_than_the_layers_is_refused():
    model = gemma2()
    quantize_(model, headq_config(**OPTIONS))
    cache = HeadQCache(model)
    with torch.no_grad():
        model(ids_of(40), cache=cache)
        model.model.layers[1].self_attn.attn_logit_softcapping = 30.0
        with pytest.raises(ValueError, match=r"passes softcap=30.0, and this layer had softcap=1.5"):
            model(ids_of(1), cache=cache)
    assert cache.get_seq_length() == 40


def test_what_a_config_names_and_a_model_leaves_out_is_no_softcap():
    """Gemma 3 has the field and does not pass it on."""
    config = Gemma3TextConfig(**TINY, attn_logit_softcapping=30.0)
    shapes, _ = supported_layers(Gemma3ForCausalLM(config).eval())
    assert {shape.softcap for shape in shapes} == {None}
    assert {shape.softcap for shape in supported_layers(gemma2(None))[0]} == {None}
