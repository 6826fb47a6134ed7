"""Models that compute attention themselves: packed in memory, dequantized at each call."""

import copy

import pytest
import torch
from transformers import DynamicCache

from headq_ao import HeadQCache, calibrate, headq_config, quantize_, restore_
from headq_ao.codecs import registry
from headq_ao.evals.models.sweep_checks import OPTIONS, relative, stream
from headq_ao.evals.models.tiny import classes, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:The attention mask")


def quantized(name, **options):
    model = tiny_model(*classes("causal")[name])
    dense = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="memory is saved, time is not"):
        quantize_(model, headq_config(**OPTIONS | options))
    return model, dense


def ids_of(batch=2, tokens=160):
    return torch.randint(5, 100, (batch, tokens), generator=torch.Generator().manual_seed(0))


def test_said_once_and_in_the_report(recwarn):
    model, _ = quantized("bloom")
    recwarn.clear()
    cache = HeadQCache(model)
    stream(model, ids_of(), cache, [140, *[1] * 20])
    assert not [w for w in recwarn if "HeadQ" in str(w.message)]
    report = cache.bits_report()
    assert "AttentionInterface" in report.fallback
    assert report.layers == {"packed": 2}
    assert report.key_body_bits == 9.0
    assert sum(report.bytes.values()) == cache.get_memory_footprint()


def test_what_fills_up_counts_as_bits():
    """A head of 20 coordinates takes the codes of 32."""
    model = tiny_model("llama", "LlamaForCausalLM")
    config = type(model.config)(**model.config.to_dict() | {"head_dim": 20})
    odd = type(model)(config).eval()
    with pytest.warns(UserWarning, match="multiple of 16"):
        quantize_(odd, headq_config(**OPTIONS))
    cache = HeadQCache(odd)
    stream(odd, ids_of(), cache, [160])
    assert cache.bits_report().key_body_bits == pytest.approx((8 * 32 + 16) / 20)


@pytest.mark.parametrize("name", ["falcon", "bloom"])
def test_beams_and_crops(name):
    model, dense = quantized(name)
    ids = ids_of()
    with torch.no_grad():
        cache, plain = HeadQCache(model), DynamicCache(config=dense.config)
        for who, held in ((model, cache), (dense, plain)):
            stream(who, ids, held, [50, 1])
            held.reorder_cache(torch.tensor([1, 0]))
        cache.crop(-3)
        found = model(input_ids=ids.flip(0)[:, 48:51], cache=cache).logits
        expected = stream(dense, ids.flip(0), DynamicCache(config=dense.config), [48, 3])[:, -3:]
    assert relative(found, expected) < 0.02
    assert model.generate(ids[:, :40], max_new_tokens=3, num_beams=2, do_sample=False).shape == (2, 43)


def test_gradients_are_refused_and_training_goes_dense():
    model, _ = quantized("bloom")
    ids, cache = ids_of(1, 60), None
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).cache
    with pytest.raises(ValueError, match="no gradients"):
        model(input_ids=ids[:, :1], cache=cache)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()


def test_other_codecs_are_refused(monkeypatch):
    monkeypatch.setattr(registry, "_FACTORIES", {})
    model = tiny_model("bloom", "BloomForCausalLM")

    @registry.register("any")
    def any_codec(layer):
        raise AssertionError("never made")

    with pytest.raises(ValueError, match="codec='any' needs attention that reads packed tokens"):
        quantize_(model, headq_config(codec="any", codec_options={}))
    assert not hasattr(model, "_headq")


def test_restored():
    model, dense = quantized("falcon")
    ids = ids_of()
    assert "headq" not in "".join(model.state_dict())
    restore_(model)
    assert not hasattr(model, "headq")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, dense(input_ids=ids).logits)


def test_a_step_that_nobody_takes_is_not_put_together():
    model, _ = quantized("bloom")
    ids = ids_of()
    restore_(model)
    with pytest.warns(UserWarning, match="memory is saved, time is not"):
        quantize_(model, headq_config(calibration=calibrate(model, [ids], progress=False), **OPTIONS))
    cache = HeadQCache(model)
    stream(model, ids, cache, [150, *[1] * 10])
    for layer in (*cache.packed, *copy.deepcopy(cache).packed):
        assert layer.codec.captured and layer.step is None
