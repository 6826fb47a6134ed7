"""Layers that read the keys and values of another (Gemma 3n): one codec, statistics of all readers, packed after the
last of them."""

import copy

import pytest
import torch
from transformers import DynamicCache, Gemma4ForCausalLM, Gemma4TextConfig

from headq_ao import HeadQCache, calibrate, headq_config, quantize_
from headq_ao.cache.batch import Batch
from headq_ao.cache.layer import PackedLayer
from headq_ao.codecs.layer_codec import LayerCodec
from headq_ao.codecs.source import SourceModule
from headq_ao.evals.models.sweep_checks import (
    ARITHMETIC,
    OPTIONS,
    SHORT,
    arithmetic,
    kernels_on,
    limit,
    noisy_cache,
    relative,
    stream,
)
from headq_ao.evals.models.tiny import classes, tiny_model
from headq_ao.integrations.config_only.shapes import shared_places
from headq_ao.integrations.transformers import calibrate as calibrating
from headq_ao.layer_shape import LayerShape
from tests.cache.streams import schedule_of

pytestmark = pytest.mark.filterwarnings("ignore:HeadQ. the calibration rests on")


def gemma3n():
    return tiny_model(*classes("causal")["gemma3n_text"])


def ids_of(n=115):
    return torch.randint(5, 100, (2, n), generator=torch.Generator().manual_seed(0))


def test_which_layers_read_which():
    model = gemma3n()
    assert shared_places(model.config) == {2: 0, 3: 1}
    quantize_(model, headq_config(**OPTIONS))
    assert model._headq.fallback is None and [shape.readers for shape in model._headq.shapes] == [2, 2]
    held = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.self_attn, "headq")]
    assert held == [0, 1] and all(isinstance(c, SourceModule) for c in model._headq.codecs)
    assert [type(layer).__name__ for layer in HeadQCache(model).layers[2:]] == ["DummyLayer"] * 2


def layer_of(readers, **options):
    """A layer without a calibration, alone in its cache."""
    config = headq_config(warmup_tokens=16, residual_length=16, block_size=16, n_sink=4, **options)
    shape = LayerShape(4, 2, 32, None, readers=readers)
    source = LayerCodec(config, shape, None, torch.device("cpu"))
    batch = Batch(schedule_of(config, [source]), 16)
    batch.layers = [PackedLayer(shape, source, batch)]
    return batch.layers[0]


def states(n=120, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, n, 32, generator=g) for heads in (4, 4, 2, 2)]


@pytest.mark.parametrize("last", [20, 16, 1])
def test_the_order_of_readers_does_not_matter(last):
    """The second reads what the first has read: nothing is packed between them, though the call packs some."""
    (q, other, k, v), packed = states(), [0, 0]
    for n in range(120 - last, 80, -1):  # until the last call packs
        outs = []
        for queries in ((q, other), (other, q)):
            layer = layer_of(2)
            for part in (slice(0, n), slice(n, n + last)):
                layer.update(k[:, :, part], v[:, :, part])
                packed = [packed[1], layer.batch.lengths.packed()[0]]
                found = [layer.attend(x[:, :, part], 0.2, k[:, :, part], v[:, :, part]) for x in queries]
            outs.append(found if queries[0] is q else found[::-1])
        if packed[0] < packed[1]:
            break
    assert 0 < packed[0] < packed[1]
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=2e-3)  # rounding of their statistics


def test_nothing_is_packed_before_the_last_reader():
    q, other, k, v = states()
    layer = layer_of(2)
    layer.update(k, v)
    layer.attend(q, 0.2, k, v)
    assert layer.pending is not None and len(layer.asked) == 1
    layer.attend(other, 0.2, k, v)
    assert layer.pending is None and not layer.asked and all(layer.learned)


def test_a_sequences_own_statistics_are_of_all_readers():
    q, other, k, v = states()
    found = []
    for queries in ((q,), (q, q), (q, other), (other, q)):
        layer = layer_of(len(queries))
        layer.update(k, v)
        for x in queries:
            layer.attend(x, 0.2, k, v)
        found.append(layer.codec.keys.q_factor)
    one, same, both, turned = found
    torch.testing.assert_close(same, one, rtol=2e-2, atol=1e-3)  # stored in half precision
    torch.testing.assert_close(turned, both, rtol=2e-2, atol=1e-3)
    assert (both - one).norm() > 0.05 * one.norm()


def test_calibration_pools_the_queries_of_all_readers(monkeypatch):
    """``Σ q qᵀ`` over both readers of each layer; keys are sampled once."""
    shown = []

    class Watched(calibrating.Recorder):
        def record(self, layer, q, k, v, *args):
            shown.append((layer, q, k))
            super().record(layer, q, k, v, *args)

    monkeypatch.setattr(calibrating, "Recorder", Watched)
    made = calibrate(gemma3n(), [ids_of(300)], progress=False, n_rows=4096)
    assert [layer for layer, *_ in shown] == [0, 1, 2, 3]
    assert [layer.segment_tokens for layer in made.layers] == [256, 256]
    for number, moments in enumerate(made.layers):
        q = torch.cat([q for layer, q, _ in shown if layer in (number, number + 2)], 1)[:, :, 4:]
        whole = q.unflatten(1, (2, 2, 2)).square().sum((0, 1, 3, 4, 5)).sum()
        torch.testing.assert_close(moments.q_outer.diagonal(0, 1, 2).sum(), whole, rtol=1e-4, atol=0)
        assert moments.tokens == 2 * 2 * 296 and len(moments.k_rows) == 2 * 296
    assert (made.layers[1].errors > 0).all()  # the other's window is no longer than what is left out


def test_calibration_on_the_queries_of_the_storing_layer_alone():
    """A control: bases of its own queries; what bits cost is of all readers all the same."""
    ids = [ids_of(300)]
    pooled, own = (calibrate(gemma3n(), ids, progress=False, readers=readers) for readers in ("all", "own"))
    for a, b in zip(pooled.layers, own.layers, strict=True):
        assert (a.tokens, b.tokens) == (2 * 2 * 296, 2 * 296)
        torch.testing.assert_close(a.k_outer, 2 * b.k_outer)
        assert (a.c_q - b.c_q).norm() > 0.05 * b.c_q.norm()
    assert torch.equal(pooled.layers[1].energy, own.layers[1].energy)
    with pytest.raises(ValueError, match="readers must be one of 'all', 'own', got 'some'"):
        calibrate(gemma3n(), ids, progress=False, readers="some")


def test_a_compiled_model():
    model = gemma3n()
    quantize_(model, headq_config(**OPTIONS))
    plain = stream(copy.deepcopy(model), ids_of(), HeadQCache(model), SHORT)
    cache = HeadQCache(model, max_length=200, batch_size=2)
    compiled = torch.compile(model, backend="eager")
    found, at = [], 0
    for i, n in enumerate(SHORT):
        with torch.no_grad():
            found.append((compiled if i > 1 else model)(ids_of()[:, at : at + n], cache=cache).logits)
        at += n
    assert relative(torch.cat(found, 1), plain) < 1e-4


def gemma4():
    """Two of four layers share; heads of 16 and 32, one value that is its key."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma4TextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, layer_types=kinds * 2, sliding_window=64, num_kv_shared_layers=2,
        vocab_size_per_layer_input=128, hidden_size_per_layer_input=8, attention_k_eq_v=True, initializer_range=0.1,
        per_layer_config={i: {"head_dim": 32, "num_key_value_heads": 1} for i in (1, 3)}, attn_implementation="eager",
    )  # fmt: skip
    return Gemma4ForCausalLM(config).eval()


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("kept", [1, 3])
def test_few_logits_of_many_tokens(kept, calibrated):
    """transformers shows the layers that read others' keys no more tokens than it wants logits of."""
    model, dense, ids = gemma4(), gemma4(), ids_of(180)
    calibration = calibrate(model, [ids_of(300)], progress=False) if calibrated else None
    for layer in calibration.layers if calibration else ():
        layer.effective = None
    quantize_(model, headq_config(calibration=calibration, **OPTIONS))

    def run(who, cache, **more):
        with torch.no_grad():  # a prefill, a long and a short chunk, a step
            return [who(x, cache=cache, **more).logits for x in ids.split([100, 70, 9, 1], 1)]

    whole = run(dense, DynamicCache(config=dense.config))
    control = run(dense, noisy_cache(dense, 0))
    got = run(model, HeadQCache(model), logits_to_keep=kept)
    for mine, exact, noisy in zip(got, whole, control, strict=True):
        assert mine.shape[1] == min(kept, exact.shape[1])
        apart = [float((x[:, -kept:] - exact[:, -kept:]).norm() / exact[:, -kept:].norm()) for x in (mine, noisy)]
        assert apart[0] <= limit(apart[1])


def test_generate():
    model, dense, ids = gemma4(), gemma4(), ids_of(100)
    quantize_(model, headq_config(**OPTIONS))
    options = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    logits = [torch.stack(who.generate(ids, **options).logits, 1) for who in (model, dense)]
    assert relative(*(x[:, :1] for x in logits)) < 1e-4  # the prompt's last token is read in full precision


def test_layers_of_different_heads_that_share():
    model, dense = gemma4(), gemma4()
    quantize_(model, headq_config(**OPTIONS))
    assert model._headq.fallback is None
    found = [(shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.readers) for shape in model._headq.shapes]
    assert found == [(4, 2, 16, 2), (4, 1, 32, 2)]
    expected = stream(dense, ids_of(), DynamicCache(config=dense.config), SHORT)
    control = relative(stream(dense, ids_of(), noisy_cache(dense, 0), SHORT), expected)
    assert relative(stream(model, ids_of(), HeadQCache(model), SHORT), expected) <= limit(control)
    for name, most in ARITHMETIC.items():
        with kernels_on(name == "kernel"):
            assert arithmetic(model, dense, ids_of(200)) <= most
