"""Nothing outside the model: another model of the same config object stays as it was, bit for bit."""

import copy
import json

import pytest
import torch
import transformers
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from headq_ao import HeadQCache, HeadQConfig, calibrate, headq_config, quantize_, restore_
from headq_ao.evals.harness import replay

FAST = {"epoch_tokens": 64, "residual_length": 32, "block_size": 16}
FAMILIES = ["llama", "gemma3", "gpt2"]


@pytest.fixture
def two(tiny):
    """``two(family)``: a model and another of the same config object, with other weights."""

    def make(family):
        one = tiny(family)
        return one, type(one)(one.config).eval()

    return make


def everything(model):
    """Of a model and its classes, all that could be written to."""
    configs = [x for m in model.modules() for x in vars(m).values() if isinstance(x, PreTrainedConfig)]
    classes = {c for m in model.modules() for c in type(m).__mro__ if issubclass(c, PreTrainedModel)}
    return {
        "identity": [id(x) for x in configs],
        "configs": [copy.deepcopy(vars(x)) for x in configs],
        "generation": model.generation_config.to_dict(),
        "attributes": {k: v for k, v in vars(model).items() if not k.startswith("_")},
        "classes": {c: {k: v for k, v in vars(c).items() if not callable(v) and "cached" not in k} for c in classes},
        "hooks": [list(m._forward_pre_hooks) + list(m._forward_hooks) for m in model.modules()],
        "modules": [(name, id(module)) for name, module in model.named_modules()],
    }


def quantized(model, ids):
    quantize_(model, headq_config(**FAST))


def weights_and_cache(model, ids):
    quantize_(model, Int8WeightOnlyConfig(version=2))
    quantize_(model, headq_config(**FAST))


def cache_and_weights(model, ids):
    quantize_(model, headq_config(**FAST))
    quantize_(model, Int8WeightOnlyConfig(version=2))
    restore_(model)


def saved(model, ids, folder):
    weights_and_cache(model, ids)
    model.save_pretrained(folder / "headq")
    restore_(model)
    model.save_pretrained(folder / "weights")


TEXT = torch.randint(3, 64, (4, 300), generator=torch.Generator().manual_seed(1))  # enough to calibrate on
ACTS = {
    "quantize": quantized,
    "generate": lambda m, ids: (quantized(m, ids), m.generate(ids, max_new_tokens=40, do_sample=False)),
    "calibrate": lambda m, ids: calibrate(m, [TEXT], progress=False),
    "calibrated": lambda m, ids: quantize_(m, headq_config(calibration=calibrate(m, [TEXT], progress=False))),
    "restore": lambda m, ids: (quantized(m, ids), restore_(m)),
    "changed": lambda m, ids: (quantized(m, ids), setattr(m.config, "use_cache", False), restore_(m)),
    "weights": lambda m, ids: quantize_(m, Int8WeightOnlyConfig(version=2)),
    "weights and cache": weights_and_cache,
    "cache and weights": cache_and_weights,
    "saved": saved,
    "replay": lambda m, ids: replay.each_layer(m, ids, lambda *_: None),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_another_model_of_the_same_config(two, token_ids, tmp_path, family, act):
    model, other = two(family)
    ids = token_ids(1, 120)
    with torch.no_grad():
        before, logits = everything(other), other(ids).logits
        ACTS[act](model, ids, *([tmp_path] if act == "saved" else []))
        assert {k: v for k, v in everything(other).items() if v != before[k]} == {}
        assert torch.equal(other(ids).logits, logits)
        other.save_pretrained(tmp_path / "other")
        written = json.loads((tmp_path / "other" / "config.json").read_text())
        assert "quantization_config" not in written
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
        assert not hasattr(loaded, "_headq") and torch.equal(loaded(ids).logits, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_original_config_comes_back(tiny, tmp_path, family):
    """The object that it was, in every module, also after the model was saved and generated."""
    model, before = (m := tiny(family)), everything(m)
    holder = model.config
    for _ in range(2):
        quantize_(model, headq_config(**FAST))
        assert model.config is not holder and model.config._attn_implementation == "headq"
        assert holder._attn_implementation == "sdpa" and not hasattr(holder, "quantization_config")
        held = {id(x) for m in model.modules() for x in vars(m).values() if isinstance(x, PreTrainedConfig)}
        assert held == {id(model.config)}
        model.save_pretrained(tmp_path)
        restore_(model)
        assert model.config is holder
        assert {k: v for k, v in everything(model).items() if v != before[k]} == {}


def test_what_a_user_changes_stays_the_model_s(two):
    """Set on the model, it holds after restore_, and for that model alone."""
    model, other = two("llama")
    holder = model.config
    quantize_(model, headq_config(**FAST))
    model.config.use_cache = False
    model.resize_token_embeddings(200)
    restore_(model)
    assert (model.config.use_cache, model.config.vocab_size) == (False, 200)
    assert (holder.use_cache, holder.vocab_size) == (True, 128) and other.config is holder
    assert model.config is model.model.config is model.model.layers[0].self_attn.config
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config, "quantization_config")


def test_a_config_that_a_user_puts_in_its_place(tiny, tmp_path):
    model = tiny()
    quantize_(model, headq_config(**FAST))
    mine = model.config = copy.deepcopy(model.config)
    restore_(model)
    assert model.config is mine and mine._attn_implementation == "sdpa" and not hasattr(mine, "quantization_config")
    assert model.model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    assert not hasattr(AutoModelForCausalLM.from_pretrained(tmp_path), "_headq")


def test_a_copied_model_is_apart(tiny, token_ids):
    model, ids = tiny(), token_ids(1, 120)
    holder = model.config
    quantize_(model, headq_config(**FAST))
    copied = copy.deepcopy(model)
    restore_(copied)
    assert copied.config is copied.model.config
    assert copied.config is not holder and copied.config is not model.config
    assert copied.config._attn_implementation == "sdpa" and not hasattr(copied.config, "quantization_config")
    assert model.config._attn_implementation == "headq"
    with torch.no_grad():
        assert isinstance(model(ids).past_key_values, HeadQCache)
    restore_(model)
    assert model.config is holder


def vision_model():
    text = transformers.Gemma3TextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    config._attn_implementation = {"text_config": "sdpa", "vision_config": "eager"}
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize("act", ["quantize", "calibrate", "changed"])
def test_a_composite_model(act):
    """Each part's own attention comes back, and sub-configs are those of the root."""
    model = vision_model()
    before = everything(model)
    kinds = [
        (type(m).__name__, m.config._attn_implementation) for m in model.modules() if isinstance(m, PreTrainedModel)
    ]
    assert {kind for _, kind in kinds} == {"sdpa", "eager"}
    if act == "calibrate":
        calibrate(model, [TEXT], progress=False)
    else:
        quantize_(model, headq_config(**FAST))
        assert model.config.text_config is model.model.language_model.config
        assert model.config.vision_config is model.model.vision_tower.config
        assert model.model.language_model.layers[0].self_attn.config is model.config.text_config
        if act == "changed":
            model.config.text_config.use_cache = False
        restore_(model)
    if act != "changed":
        assert {k: v for k, v in everything(model).items() if v != before[k]} == {}
    assert kinds == [
        (type(m).__name__, m.config._attn_implementation) for m in model.modules() if isinstance(m, PreTrainedModel)
    ]
    assert model.config.text_config is model.model.language_model.config


def test_a_failed_calibration_leaves_all_as_it_was(two, token_ids, monkeypatch):
    model, other = two("llama")
    before = [everything(m) for m in (model, other)]

    def fail(*args, **kwargs):
        assert other.config._attn_implementation == "sdpa"  # during the run too
        raise RuntimeError("planted")

    with monkeypatch.context() as patched:
        patched.setattr(model.model.layers[1].mlp, "forward", fail)
        with pytest.raises(RuntimeError, match="planted"):
            calibrate(model, [token_ids(1, 60)], progress=False)
    assert [everything(m) for m in (model, other)] == before


def test_a_refused_attention_leaves_all_as_it_was(two, monkeypatch):
    model, other = two("llama")
    before = [everything(m) for m in (model, other)]

    accept = type(model).set_attn_implementation

    def refuse(self, *args, **kwargs):
        if self is model:  # and not a copy that is probed
            raise ValueError("planted")
        return accept(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(type(model), "set_attn_implementation", refuse)
        with pytest.raises(ValueError, match="planted"):
            quantize_(model, headq_config(**FAST))
    assert [everything(m) for m in (model, other)] == before


def test_a_dense_model_around_the_same_modules(tiny, token_ids):
    """A teacher that shares the decoder keeps its own config, which is what it is saved with."""
    model, ids = tiny(), token_ids(1, 60)
    other = type(model)(model.config).eval()
    other.model, other.lm_head = model.model, model.lm_head
    holder = model.config
    with torch.no_grad():
        logits = other(ids).logits
        quantize_(model, headq_config(**FAST))
        assert other.config is holder and holder._attn_implementation == "sdpa"
        with pytest.warns(UserWarning, match="did not go through the model that quantize_ was given"):
            assert torch.equal(other(ids).logits, logits)
        restore_(model)
        assert other.model.config is holder and torch.equal(other(ids).logits, logits)


def test_the_given_config_is_not_changed(tiny, token_ids):
    model, config = tiny(), headq_config(**FAST)
    before = vars(config).copy()
    quantize_(model, config)
    model.generate(token_ids(1, 60), max_new_tokens=4, do_sample=False)
    assert vars(config) == before and model._headq.config == config == HeadQConfig(**before)


def test_parted_embeddings_are_noted_in_the_model_s_own_config(tiny, token_ids, tmp_path):
    """Weights alone too: torchao quantizes lm_head, which was the embedding, and it must not be tied on loading."""
    model, ids = tiny(head_dim=64, tie_word_embeddings=True), token_ids(1, 60)
    holder = model.config
    quantize_(model, Int8WeightOnlyConfig(version=2))
    assert holder.tie_word_embeddings and not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
