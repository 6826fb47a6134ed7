"""A new codec is one file and one line: written to a folder here, imported, and used as any other."""

import contextlib
import importlib.util
import subprocess
import sys

import pytest
import torch
from transformers import GenerationConfig

from headq_ao import HeadQCache, estimate_memory, headq_config, quantize_, restore_
from headq_ao.codecs import registry
from headq_ao.codecs.registry import LayerContext
from headq_ao.codecs.tokenwise import TokenCodec
from headq_ao.evals.harness.scoring import exact_logprobs
from headq_ao.evals.harness.subjects import Subject
from headq_ao.evals.perplexity import evaluate
from headq_ao.layer_shape import LayerShape

FILE = '''
import torch
from headq_ao.codecs.registry import register
from headq_ao.codecs.tokenwise import Form, TokenCodec


class Rounded(TokenCodec):
    """Each coordinate in a byte, the token's largest in fp16; keys as they were before the rotary embedding."""

    def __init__(self, rotation, levels):
        self.rotation, self.levels = rotation, levels

    def forms(self):
        d = self.shape.head_dim
        return {
            f"{side}.{name}": Form(side, *form)
            for side in ("key", "value")
            for name, form in {"codes": ((d,), torch.uint8), "scale": ((), torch.float16)}.items()
        }

    def encode(self, k, v, position):
        k = k.float() if self.rotation is None else self.rotation.at(k.float(), -position)
        found = {}
        for side, x in (("key", k), ("value", v.float())):
            scale = x.abs().amax(-1).half()
            y = x / scale.float().clamp(min=1e-8)[..., None]
            found[f"{side}.codes"] = ((y + 1) / 2 * self.levels).round().clamp(0, self.levels)
            found[f"{side}.scale"] = scale
        return found

    def _decoded(self, held, side):
        return (held[f"{side}.codes"].float() / self.levels * 2 - 1) * held[f"{side}.scale"].float()[..., None]

    def decode_keys(self, held):
        k = self._decoded(held, "key")
        return k if self.rotation is None else self.rotation.at(k, held.position)

    def decode_values(self, held):
        return self._decoded(held, "value")


@register("rounded")
def rounded(layer, *, levels=255):
    return Rounded(layer.rotation, levels)
'''


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No gradients, and no name that a test has registered is left."""
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))
    with torch.no_grad():
        yield


@pytest.fixture
def rounded(tmp_path, monkeypatch):
    """The codec of :data:`FILE`, imported from a folder."""
    path = tmp_path / "rounded.py"
    path.write_text(FILE)
    spec = importlib.util.spec_from_file_location("rounded", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "rounded", module)
    spec.loader.exec_module(module)
    return path


def config(**options):
    return headq_config(codec="rounded", codec_options=options, residual_length=16)


def test_generates_saves_loads_and_reports(rounded, tiny, token_ids, tmp_path):
    model, ids = tiny(), token_ids(2, 120)
    expected = model.generate(ids, max_new_tokens=24, do_sample=False)
    exact = model(ids).logits
    quantize_(model, config())
    cache = HeadQCache(model)
    out = model.generate(ids, max_new_tokens=24, do_sample=False, cache=cache)
    assert out.shape == expected.shape and (out == expected).float().mean() > 0.9 and cache.packed_fraction > 0.2
    cache = HeadQCache(model)
    model(ids[:, :60], cache=cache)
    steps = [model(ids[:, i : i + 1], cache=cache).logits for i in range(60, 120)]
    torch.testing.assert_close(torch.cat(steps, 1), exact[:, 60:], atol=0.2, rtol=0.05)
    report = cache.bits_report()
    assert report.key_body_bits == report.value_body_bits == 8 + 16 / 32
    assert sum(report.bytes.values()) == cache.get_memory_footprint()
    assert estimate_memory(model, config(), 1000).packed_bits_per_element == 8.5
    path = tmp_path / "prompt.safetensors"
    cache.save(path)
    again = HeadQCache.load(path, model)
    assert torch.equal(model(ids[:, :1], cache=again).logits, model(ids[:, :1], cache=cache).logits)
    restore_(model)
    assert torch.equal(model(ids).logits, exact)


def test_is_scored(rounded, tiny, token_ids):
    model, rows = tiny(), token_ids(2, 160)
    fine, coarse = (
        evaluate(model, rows, exact_logprobs(model, rows, 64, False), subject, prefill=64, chunk=32, progress=False)
        for subject in (Subject("rounded", {"residual_length": 16}), Subject("rounded", {"levels": 2}))
    )
    assert fine["bits"]["key"] == 8.5 and fine["method"] == {
        "kind": "baseline", "name": "rounded", "options": {"residual_length": 16},
    }  # fmt: skip
    assert 0 < fine["score"]["mean_kl"] < 0.02 * coarse["score"]["mean_kl"]


def test_a_file_names_its_codec(rounded, tiny, token_ids, tmp_path, monkeypatch):
    model, path = tiny(), tmp_path / "prompt.safetensors"
    quantize_(model, config(levels=100))
    cache = HeadQCache(model)
    model(token_ids(1, 80), cache=cache)
    cache.save(path)
    restore_(model)
    quantize_(model, config(levels=50))
    with pytest.raises(ValueError, match=r"codec_options is \{'levels': 50\} here and \{'levels': 100\} there"):
        HeadQCache.load(path, model)
    restore_(model)
    quantize_(model, headq_config(residual_length=16))
    with pytest.raises(ValueError, match="codec is None here and 'rounded' there"):
        HeadQCache.load(path, model)
    monkeypatch.delitem(registry._FACTORIES, "rounded")
    with pytest.raises(ValueError, match="no codec 'rounded' is registered; there are headq, "):
        HeadQCache.load(path, model)


def test_an_unknown_name_changes_nothing(tiny):
    model = tiny()
    with pytest.raises(ValueError, match=r"no codec 'rounded' is registered.*Import the file that registers it first"):
        quantize_(model, config())
    assert not hasattr(model, "_headq") and model.config._attn_implementation != "headq"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "rounded", "codec_options": {"bits": 2}}, "rounded has no option bits; its options are levels"),
        ({"codec": "rounded", "k_bits": 3}, "k_bits, mean_bits shape HeadQ's own codec, and codec='rounded' takes"),
        ({"codec_options": {"levels": 2}}, "codec_options are those of a registered codec, and codec is None"),
        ({"codec": 3}, "codec must be the name of a registered codec, or None, got 3"),
        ({"codec": "rounded", "codec_options": [2]}, "codec_options must be a dict"),
    ],
)
def test_options_are_checked(rounded, tiny, options, message):
    with pytest.raises(ValueError, match=message):
        quantize_(tiny(), headq_config(**options))


def test_names_are_taken_once(rounded):
    def other(layer):
        return None

    with pytest.raises(ValueError, match=r"'rounded' is registered already, as rounded\.rounded"):
        registry.register("rounded")(other)
    with pytest.raises(ValueError, match="a codec's name must be a text other than 'headq', got 'headq'"):
        registry.register("headq")
    layer = LayerContext(LayerShape(4, 2, 32, None), 4, torch.device("cpu"))
    registry.register("nothing")(other)
    with pytest.raises(ValueError, match="'nothing' must give a TokenCodec or a SourceModule, got <class 'NoneType'>"):
        registry.build("nothing", {}, layer)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "phi3"])
def test_keys_are_written_as_they_were_before_their_rotation(rounded, tiny, token_ids, family):
    model, ids = tiny(family, layers=1), token_ids(1, 90)
    quantize_(model, config())
    seen = {}

    def keep(module, args, out):
        seen.setdefault("k", out)

    attention = next(m for m in model.modules() if hasattr(m, "headq"))
    name = {"llama": "k_proj", "qwen3": "k_norm"}.get(family)
    cache = HeadQCache(model)
    if name is not None:
        getattr(attention, name).register_forward_hook(keep)
    model(ids, cache=cache)
    layer = cache.layers[0]
    assert layer.codec.rotation is not None
    n = cache.batch.lengths.packed()[0]
    held = layer.codec._gathered(
        layer._before(), layer.block_table.long(), torch.arange(layer.table.columns * 32)[None]
    )
    raw, turned = layer.codec._decoded(held, "key")[:, :, :n], layer.codec.decode_keys(held)[:, :, :n]
    if name is not None:
        before = seen["k"].reshape(1, 90, 2, 32)[:, 4 : 4 + n].transpose(1, 2)
        torch.testing.assert_close(raw, before, atol=0.02 * before.abs().max().item(), rtol=0)
    assert (raw - turned).abs().max() > 0.1 * raw.abs().max()


class Thinned(TokenCodec):
    prompt = drops = True

    def forms(self):
        return {}


def test_an_engine_refuses_by_capability(rounded, tiny, token_ids):
    registry.register("thinned")(lambda layer: Thinned())
    model, ids = tiny(), token_ids(1, 40)
    quantize_(model, headq_config(codec="thinned"))
    with pytest.raises(ValueError, match="thinned leaves tokens of the prompt out, and a cache of fixed capacity"):
        HeadQCache(model, max_length=256)
    with pytest.raises(ValueError, match="thinned leaves tokens of the prompt out, and a cache of fixed capacity"):
        model.generate(ids, generation_config=GenerationConfig(max_new_tokens=4, cache_implementation="static"))
    with pytest.raises(ValueError, match="how many tokens 'thinned' leaves out depends on the text"):
        estimate_memory(model, headq_config(codec="thinned"), 100)
    window = tiny("mistral")
    quantize_(window, headq_config(codec="thinned"))
    with pytest.raises(ValueError, match="thinned leaves tokens of the prompt out, and a sliding-window layer"):
        HeadQCache(window)


def test_static_capacity(rounded, tiny, token_ids):
    model, ids = tiny(), token_ids(2, 60)
    quantize_(model, config())
    cache, fixed = HeadQCache(model), HeadQCache(model, max_length=120)
    for part in (ids[:, :50], *ids[:, 50:].split(1, 1)):
        found, expected = (model(part, cache=c).logits for c in (fixed, cache))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert fixed.batch.lengths.packed() == cache.batch.lengths.packed() == [40, 40]


def test_a_compiled_call_refuses_what_decides_on_the_host(rounded, tiny, token_ids):
    import headq_ao.evals.baselines.methods  # noqa: F401

    for name, options, refused in (
        ("rounded", {}, None),
        ("kivi", {"k_bits": 2, "v_bits": 2}, "a compiled call of several tokens cannot be packed by kivi"),
    ):
        model = tiny()
        quantize_(model, headq_config(codec=name, codec_options=options, residual_length=16))
        cache = HeadQCache(model)
        model(token_ids(1, 80), cache=cache)
        call = torch.compile(model, fullgraph=True, backend="eager")
        call(token_ids(1, 1), cache=cache)
        expected = contextlib.nullcontext() if refused is None else pytest.raises(ValueError, match=refused)
        with expected:
            call(token_ids(1, 20), cache=cache)


def test_attention_is_one_graph(rounded, tiny, token_ids):
    model = tiny()
    quantize_(model, config())
    cache = HeadQCache(model)
    model(token_ids(2, 80), cache=cache)
    layer = cache.layers[0]
    kv, q = layer._reading(), torch.randn(2, 4, 1, 32)

    @torch.compile(backend="eager", fullgraph=True)
    def attend(q):
        return layer.codec.attend(q, 0.2, kv, None, 0, None)[0]

    torch.testing.assert_close(attend(q), layer.codec.attend(q, 0.2, kv, None, 0, None)[0])


def test_importing_needs_no_transformers():
    code = "import sys, headq_ao.codecs.registry; print(bool({'transformers', 'torchao'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
