"""Attention of one layer: what it refuses, and its codec on the device of the pages."""

import types

import pytest
import torch

pytest.importorskip("vllm", reason="make test-vllm installs it")
from headq_ao.integrations.vllm import attention as module
from headq_ao.integrations.vllm.attention import HeadQAttention, on_device, refuse
from headq_ao.integrations.vllm.metadata import HeadQMetadata, window_name
from tests.cache.streams import CPU, source


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alibi_slopes": [0.1]}, "ALiBi"),
        ({"kv_sharing_target_layer_name": "a"}, "keys and values shared between layers"),
        ({"sinks": torch.ones(4)}, "learned attention sinks"),
        ({"attn_type": "encoder"}, "attention of the kind 'encoder'"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"alibi_slopes": [0.1], "kv_cache_dtype": "fp8"}, "ALiBi, --kv-cache-dtype fp8"),
    ],
)
def test_layers_that_it_cannot_serve(options, words):
    with pytest.raises(ValueError, match=f"HeadQ cannot serve {words} in vLLM; leave out --attention-backend CUSTOM"):
        HeadQAttention(4, 64, 0.125, **options)


def test_layers_that_it_serves():
    made = HeadQAttention(4, 64, 0.125, None, sliding_window=None, kv_cache_dtype="bfloat16", sinks=None)
    assert (made.num_kv_heads, made.sliding_window, made.scale) == (4, 0, 0.125)
    assert HeadQAttention(4, 64, 1, 2, sliding_window=100).num_kv_heads == 2
    refuse({"nothing": False})


def test_a_run_that_measures_memory_attends_nothing():
    out = torch.full((3, 4, 64), torch.nan)
    made = HeadQAttention(4, 64, 0.125, 2)
    assert made.forward(None, None, None, None, torch.empty(0), None, out) is out
    assert not bool(out.any()) and made.pages is None


def test_pages_are_bound_once_for_a_cache(monkeypatch):
    """Again where vLLM has allocated another; only the step's own tokens are passed on, without a graph's padding."""
    made, bound, steps, name = HeadQAttention(4, 64, 0.125, 2), [], [], "layers.0.attn"

    class Pages:
        def __init__(self, raw):
            self.raw = raw

        def step(self, q, k, v, out, scaling, of):
            steps.append((len(q), len(k), len(v), len(out), scaling, of))

    monkeypatch.setattr(made, "_bound", lambda raw, window: bound.append((raw, window)) or Pages(raw))
    numbers = [torch.arange(n) for n in (3, 2, 2, 2)]
    packed, newest = (HeadQMetadata(5, 4, 4, (), torch.zeros(2, n).int(), *numbers, 23) for n in (5, 20))
    window = torch.empty(1)
    context = types.SimpleNamespace(
        no_compile_layers={window_name(name): types.SimpleNamespace(kv_cache=window)},
        attn_metadata={window_name(name): newest},
    )
    monkeypatch.setattr(module, "get_forward_context", lambda: context)
    x, layer = torch.zeros(8, 4, 64), types.SimpleNamespace(layer_name=name)
    raws = [torch.empty(1), torch.empty(1)]
    for raw in (raws[0], raws[0], raws[1]):
        assert made.forward(layer, x, x, x, raw, packed, x) is x
    assert [(raw is raws[i], w is window) for i, (raw, w) in enumerate(bound)] == [(True, True)] * 2
    assert steps == [(5, 5, 5, 5, 0.125, packed.requests(newest))] * 3


@pytest.mark.parametrize("segment", [0, 256])
def test_a_codec_follows_its_pages(segment):
    """As it is on the CPU; elsewhere all tensors, those of the frame too, and all else the same."""
    codec = source((), 1, None, 32, None, segment).start(1, torch.float32)
    assert on_device(codec, CPU) == (codec.readers, codec.encoders())
    readers, encoders = on_device(codec, torch.device("meta"))
    for name in ("query_map", "read", "mean"):
        assert getattr(readers, name).is_meta and getattr(readers, name).shape == getattr(codec.readers, name).shape
    assert (readers.frame is None) == (segment == 0)
    if segment:
        assert readers.frame.table.is_meta and readers.frame.partner.is_meta and readers.frame.tokens == segment
    for side, before in zip(encoders, codec.encoders(), strict=True):
        assert [e.flat[1] for e in side] == [e.flat[1] for e in before]
        assert all(t.is_meta for e in side for t in e.flat[0])
