"""Rotary embeddings at other positions: what the model itself makes of the same tokens further on."""

import copy
import sys

import pytest
import torch

from headq_ao import HeadQCache, calibrate, headq_config, quantize_
from headq_ao.calibration.observers import RECORDER
from headq_ao.calibration.rope import SHIFTS, rope_shift
from headq_ao.codecs.layer_codec import LayerCodec
from headq_ao.integrations.transformers.attention import NAME
from headq_ao.integrations.transformers.models import attention_modules, layer_shapes, rotary_embedding
from headq_ao.layer_shape import LayerShape
from headq_ao.statistics.rope_shift import RopeShift

ROTARY = [
    ("llama", 64, {}),
    ("llama", 80, {}),
    ("qwen3", 64, {}),
    ("mistral", 64, {}),
    ("gemma3", 128, {}),
    ("phi3", 64, {}),
    ("gpt_neox", 64, {}),
    ("llama", 64, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                       "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}}),
    ("llama", 64, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                       "original_max_position_embeddings": 1024}}),
]  # fmt: skip


class Heard:
    """Queries and keys of the first layer."""

    def record(self, layer, q, k, v, scaling, window):
        if layer == 0:
            self.q, self.k = q, k


def states_at(model, ids, start):
    heard = Heard()
    token = RECORDER.set(heard)
    try:
        with torch.no_grad():
            positions = torch.arange(start, start + ids.shape[1])[None]
            model(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        RECORDER.reset(token)
    return heard.q, heard.k


@pytest.mark.parametrize(("family", "head_dim", "options"), ROTARY)
def test_turns_are_what_the_model_does_at_later_positions(tiny, token_ids, family, head_dim, options):
    """States of the first layer depend on the token and its position alone."""
    model = tiny(family, head_dim, **options)
    shape = layer_shapes(model.config)[0]
    shift = rope_shift(rotary_embedding(model), attention_modules(model, 2)[0], shape)
    assert shift is not None
    assert shift.cos.shape == shift.sin.shape == (len(SHIFTS), head_dim)
    model.set_attn_implementation(NAME)
    ids = token_ids(1, 20)
    first = states_at(model, ids, 0)
    for i, positions in enumerate(SHIFTS):
        later = states_at(model, ids, positions)
        for x, y in zip(first, later, strict=True):
            torch.testing.assert_close(shift.shifted(x)[i], y, rtol=1e-3, atol=1e-3)


def test_kinds_of_layers_rotate_on_their_own(tiny):
    """Gemma 3 has one frequency for sliding layers and another for the rest."""
    model = tiny("gemma3", 128)
    sliding, full = (
        rope_shift(rotary_embedding(model), m, s)
        for m, s in zip(attention_modules(model, 2), layer_shapes(model.config), strict=True)
    )  # fmt: skip
    assert not torch.allclose(sliding.cos, full.cos, atol=1e-2)


def test_none_where_it_cannot_be_told(tiny, monkeypatch):
    """No rotary embedding, one that a layer leaves out, or one that is not a rotation of pairs."""
    gpt2, llama = tiny("gpt2"), tiny("llama")
    assert rope_shift(rotary_embedding(gpt2), attention_modules(gpt2, 2)[0], layer_shapes(gpt2.config)[0]) is None
    module, shape = attention_modules(llama, 2)[0], layer_shapes(llama.config)[0]

    class Sometimes(type(module)):
        def forward(self, hidden_states, **kwargs):
            if self.layer_idx:
                hidden_states = apply_rotary_pos_emb(hidden_states)  # noqa: F821
            return hidden_states

    Sometimes.__module__ = type(module).__module__
    other = copy.deepcopy(module)
    other.__class__ = Sometimes
    assert rope_shift(rotary_embedding(llama), module, shape) is not None
    assert rope_shift(rotary_embedding(llama), other, shape) is None
    other.use_rope = True
    assert rope_shift(rotary_embedding(llama), other, shape) is not None

    modeling = sys.modules[type(module).__module__]
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * cos, k * cos))
    assert rope_shift(rotary_embedding(llama), module, shape) is None


def test_the_model_is_left_as_it_was(tiny):
    """A dynamic embedding changes when it is called; the probe calls a copy."""
    model = tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                 max_position_embeddings=512)  # fmt: skip
    before = model.model.rotary_emb.inv_freq.clone()
    rope_shift(rotary_embedding(model), attention_modules(model, 2)[0], layer_shapes(model.config)[0])
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


def test_own_statistics_are_means_over_the_positions():
    """Mean and variances of the keys, against all rotated keys laid out one after the other."""
    torch.manual_seed(0)
    angles = torch.rand(3, 8)
    partner = torch.arange(16).roll(8)
    cos, sin = angles.cos().repeat(1, 2), torch.cat([angles.sin(), -angles.sin()], 1)
    shift = RopeShift(cos, sin, partner)
    shape = LayerShape(4, 2, 16, None)
    codec = LayerCodec(headq_config(), shape, None, torch.device("cpu"), shift=shift)
    q, k, of_q, of_k = torch.randn(1, 2, 40, 16), torch.randn(1, 2, 20, 16), torch.rand(1, 2, 40), torch.rand(1, 2, 20)
    of_k = of_k / of_k.mean(-1, keepdim=True)
    c_q, mean, variance = codec._spread_moments(q, of_q, k, of_k)
    every_q, every_k = torch.cat(shift.shifted(q), 2), torch.cat(shift.shifted(k), 2)
    weights = of_k.repeat(1, 1, 3)[..., None]
    torch.testing.assert_close(mean, (weights * every_k).mean(2))
    torch.testing.assert_close(variance, (weights * (every_k - mean.unsqueeze(2)).square()).mean(2))
    torch.testing.assert_close(c_q, every_q.mT @ (of_q.repeat(1, 1, 3)[..., None] * every_q) / 120)


def test_shifts_serve_sequences_without_a_calibration(tiny, token_ids):
    """They reach the layers of a model without a calibration, change what is stored, and follow the model."""
    model, ids = tiny("llama", 64), token_ids(1, 200)
    config = headq_config(warmup_tokens=64, residual_length=16)
    quantize_(model, config)
    means = []
    for shifting in (True, False):
        for module in attention_modules(model, 2):
            assert module.headq.shift_cos.shape == (len(SHIFTS), 64)
            module.headq.shifting = shifting
        cache = HeadQCache(model)
        with torch.no_grad():
            model(ids, cache=cache)
        means.append(cache.layers[0].codec.keys.mean)
    assert not torch.allclose(means[0], means[1], atol=1e-2)
    model.half()
    assert attention_modules(model, 2)[0].headq.shift_cos.dtype == torch.float32


@pytest.mark.parametrize("options", [{"k_bits": None}, {"preset": "headq_paper"}, {"calibration": True}])
def test_no_shift_where_nothing_asks_for_them(tiny, token_ids, options):
    """Exact keys, affine ones, and a calibration, which spreads its sequences itself."""
    model = tiny("llama", 64)
    if "calibration" in options:
        options = {"calibration": calibrate(model, [token_ids(3, 200)], progress=False)}
    quantize_(model, headq_config(**options))
    assert not any(m.headq.shifting for m in attention_modules(model, 2))
