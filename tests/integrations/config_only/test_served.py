"""What a config alone tells of a cache, against the cache of a model that was built from it and run."""

import dataclasses

import pytest
import torch
import transformers

from headq_ao import HeadQCache, calibrate, estimate_memory, headq_config, quantize_
from headq_ao.evals.models.tiny import classes, tiny_model
from headq_ao.integrations.config_only.served import served
from headq_ao.integrations.transformers.models import with_cache
from headq_ao.integrations.transformers.serving import serving_of
from tests.integrations.transformers.calling import OPTIONS, forward

TOKENS = 300
MECHANISMS = {  # a model type of each; what only its code tells
    "qwen3": "grouped queries",
    "gemma3_text": "sliding windows",
    "gpt_oss": "sinks",
    "gemma2": "a softcap",
    "gemma3n_text": "shared keys and values",
    "qwen3_next": "linear attention",
    "falcon_h1": "a state and attention in one layer",
    "deepseek_v2": "latents",
    "deepseek_v3": "latents",
    "kimi_linear": "latents among linear attention",
    "gemma4_text": "sizes that differ between layers",
    "mimo_v2_flash": "values of another size",
    "falcon": "one KV head, by the fallback",
    "bloom": "ALiBi, by the fallback",
    "deepseek_v32": "an indexer, by the fallback",
}
BY_CONFIG = [*MECHANISMS][:10]

pytestmark = pytest.mark.filterwarnings("ignore:HeadQ. ", "ignore:.*effective tokens", "ignore:The attention mask")


def built(name):
    return tiny_model(*classes("causal")[name])


def comparable(report, **more):
    """Without what no estimate tells: how many layers are of which kind, and states of those that are not packed."""
    kinds = {kind: n for kind, n in report.bytes.items() if kind != "states"}
    return repr(dataclasses.replace(report, bytes=kinds, layers={}, fallback=None, **more))


@torch.no_grad()
def report_of(model, config):
    quantize_(model, config)
    cache = HeadQCache(model)
    forward(model, torch.randint(5, 100, (2, TOKENS), generator=torch.Generator().manual_seed(0)), cache=cache)
    return cache.bits_report()


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("options", [OPTIONS, {"preset": "headq_paper", **OPTIONS}], ids=["whitened", "affine"])
def test_an_estimate_of_a_config_is_what_the_cache_takes(name, options, monkeypatch):
    """Byte for byte and bit for bit; what a config tells is not asked of the model's code."""
    model = built(name)
    if name in BY_CONFIG:
        monkeypatch.setattr("headq_ao.integrations.transformers.models.meta_model", None)
    config = headq_config(**options)
    found = estimate_memory(model.config, config, TOKENS, 2, torch.float32)
    assert comparable(found) == comparable(report_of(model, config))
    assert found.packed_rows > 50


@pytest.mark.parametrize("name", ["qwen3", "gemma3n_text", "deepseek_v3"])
def test_with_a_calibration(name):
    model = built(name)
    ids = torch.randint(5, 100, (4, TOKENS), generator=torch.Generator().manual_seed(1))
    config = headq_config(calibration=calibrate(model, ids, progress=False), residual_length=16)
    found = estimate_memory(model.config, config, TOKENS, 2, torch.float32)
    assert comparable(found) == comparable(report_of(model, config))


@torch.no_grad()
@pytest.mark.parametrize("name", MECHANISMS)
def test_the_exact_cache(name):
    """Numbers of a token in transformers' own cache, by layer."""
    model = built(name)
    cache = transformers.DynamicCache(config=model.config)
    model(torch.randint(5, 100, (1, 7)), **with_cache(cache))
    held = [x.keys.numel() + x.values.numel() for x in cache.layers if getattr(x, "keys", None) is not None]
    assert [7 * n for n in served(model.config, headq_config()).exact] == held


def test_a_row_of_deepseek_v3():
    """The latent and the rotary key, 512 + 64 numbers, in 2 bits and a scale of 8."""
    config = transformers.DeepseekV3Config()
    found = served(config, headq_config())
    assert {(s.head_dim, s.latent, s.n_kv_heads) for s in found.shapes} == {(576, 512, 1)} and len(found.shapes) == 61
    assert estimate_memory(config, headq_config(), 4096).key_body_bits == pytest.approx(2 + 8 / 576)


def test_what_is_not_supported_is_told_by_the_config():
    for config, why in ((transformers.T5Config(), "encoder-decoder"), (transformers.MambaConfig(), "no KV cache")):
        with pytest.raises(ValueError, match=why):
            served(config, headq_config())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({part: name for name, (part, _) in classes("causal").items()}.values()))
def test_every_class(name):
    """Of all that transformers has, where HeadQ serves it: but for query heads, which the fallback does not see."""
    try:
        model = built(name)
        real = serving_of(model)
    except Exception as error:
        pytest.skip(f"not served: {error!r:.80}")
    told = served(model.config if model.config.model_type != "qwen4_exp_text" else model, headq_config()).shapes
    assert [dataclasses.replace(s, n_heads=1) for s in told] == [dataclasses.replace(s, n_heads=1) for s in real.shapes]
