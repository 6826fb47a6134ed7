"""Rotary embeddings at other positions: what the model itself makes of the same tokens further on."""

import copy
import sys

import pytest
import torch

from headq_ao import HeadQCache, calibrate, headq_config, quantize_
from headq_ao.calibration.observers import RECORDER, AttentionObserver
from headq_ao.calibration.rope import rope_shift, rotation_of
from headq_ao.integrations.config_only.shapes import layer_shapes
from headq_ao.integrations.transformers.attention import NAME
from headq_ao.integrations.transformers.models import attention_modules, rotary_embedding
from headq_ao.statistics.moments import SEGMENT_TOKENS

SHIFTS = (0, 16, 128, 1024)
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


class Heard(AttentionObserver):
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
    shift = rope_shift(rotary_embedding(model), attention_modules(model, 2)[0], shape, SHIFTS)
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
        rotation_of(rotary_embedding(model), m, s)
        for m, s in zip(attention_modules(model, 2), layer_shapes(model.config), strict=True)
    )  # fmt: skip
    assert not torch.allclose(sliding.angle, full.angle, atol=1e-2)


def test_none_where_it_cannot_be_told(tiny, monkeypatch):
    """No rotary embedding, one that a layer leaves out, or one that is not a rotation of pairs."""
    gpt2, llama = tiny("gpt2"), tiny("llama")
    assert rotation_of(rotary_embedding(gpt2), attention_modules(gpt2, 2)[0], layer_shapes(gpt2.config)[0]) is None
    module, shape = attention_modules(llama, 2)[0], layer_shapes(llama.config)[0]

    class Sometimes(type(module)):
        def forward(self, hidden_states, **kwargs):
            if self.layer_idx:
                hidden_states = apply_rotary_pos_emb(hidden_states)  # noqa: F821
            return hidden_states

    Sometimes.__module__ = type(module).__module__
    other = copy.deepcopy(module)
    other.__class__ = Sometimes
    assert rotation_of(rotary_embedding(llama), module, shape) is not None
    assert rotation_of(rotary_embedding(llama), other, shape) is None
    other.use_rope = True
    assert rotation_of(rotary_embedding(llama), other, shape) is not None

    modeling = sys.modules[type(module).__module__]
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * cos, k * cos))
    assert rotation_of(rotary_embedding(llama), module, shape) is None


def test_the_model_is_left_as_it_was(tiny):
    """A dynamic embedding changes when it is called; the probe calls a copy."""
    model = tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                 max_position_embeddings=512)  # fmt: skip
    before = model.model.rotary_emb.inv_freq.clone()
    rotation_of(rotary_embedding(model), attention_modules(model, 2)[0], layer_shapes(model.config)[0])
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


def test_frames_serve_sequences_without_a_calibration(tiny, token_ids):
    """They reach the layers, change what is stored, and follow the model."""
    model, ids = tiny("llama", 64), token_ids(1, 600)
    quantize_(model, headq_config(residual_length=16))
    means = []
    for segment_tokens in (SEGMENT_TOKENS, 32, 0):
        for module in attention_modules(model, 2):
            assert module.headq.rotation is not None
            module.headq.segment_tokens = segment_tokens
        cache = HeadQCache(model)
        with torch.no_grad():
            model(ids, cache=cache)
        assert (cache.layers[0].codec.frame is None) == (segment_tokens == 0)
        means.append(cache.layers[0].codec.keys.mean)
    assert not torch.allclose(means[0], means[1], atol=1e-2)
    assert torch.allclose(means[0], means[2], atol=1e-3)  # 256 first tokens are one segment


@pytest.mark.parametrize("options", [{"k_bits": None}, {"preset": "headq_paper"}, {"preset": "headq_paper", "on": 200}])
def test_no_frame_where_nothing_asks_for_it(tiny, token_ids, options):
    """Exact keys, and affine ones, with statistics as the model has them."""
    model = tiny("llama", 64)
    given = {name: x for name, x in options.items() if name != "on"}
    if "on" in options:
        given["calibration"] = calibrate(model, [token_ids(3, options["on"])], progress=False)
        assert given["calibration"].layers[0].segment_tokens == SEGMENT_TOKENS
    quantize_(model, headq_config(**given))
    assert all(m.headq.segment_frame is None for m in attention_modules(model, 2))
