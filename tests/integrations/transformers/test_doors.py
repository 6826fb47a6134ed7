"""One model, two doors: what ``quantize_`` makes and what ``from_pretrained`` loads is the same to transformers."""

import copy

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, PreTrainedConfig, TorchAoConfig, Trainer, TrainingArguments
from transformers.trainer_utils import validate_quantization_for_training

from headq_ao import HeadQCache, HeadQQuantizationConfig, calibrate, headq_config, quantize_, restore_
from headq_ao.integrations.transformers import attention
from headq_ao.integrations.transformers.hf_quantizer import MARKS, HeadQQuantizer

FAST = {"epoch_tokens": 64, "residual_length": 32, "block_size": 16}
WEIGHTS = {"plain": None, "int8": lambda: Int8WeightOnlyConfig(version=2)}
KINDS = (  # what transformers asks a quantizer
    "is_trainable", "is_qat_trainable", "is_compileable", "requires_calibration", "pre_quantized",
    "quantized_element_size", "serialized_names",
)  # fmt: skip


@pytest.fixture
def doors(tiny, token_ids, tmp_path):
    """``doors(weights)``: models of one dense checkpoint, by every way to put HeadQ on it, by name."""

    def make(weights):
        tiny(head_dim=64).save_pretrained(tmp_path / "dense")
        kind = WEIGHTS[weights]
        made = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        calibration = calibrate(made, [token_ids(3, 200, seed=9)], progress=False)
        config = headq_config(**FAST, calibration=calibration)
        for one in ([] if kind is None else [kind()]) + [config]:
            quantize_(made, one)
        made.save_pretrained(tmp_path / "headq")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "headq")
        loaded.save_pretrained(tmp_path / "again")
        models = {"made": made, "loaded": loaded, "again": AutoModelForCausalLM.from_pretrained(tmp_path / "again")}
        models["copied"] = copy.deepcopy(loaded)
        if kind is None:
            given = HeadQQuantizationConfig(config)
            models["put on"] = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=given)
        else:
            models["first"] = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
            for one in (config, kind()):
                quantize_(models["first"], one)
        return models

    return make


def seen_by_transformers(model):
    """All that it reads of a model, its quantizer and its configs."""
    quantizer, kind = model.hf_quantizer, type(model)
    assert model.config.quantization_config is quantizer.quantization_config
    state, metadata = quantizer.get_state_dict_and_metadata(model)
    configs = [(type(m), c) for m in model.modules() if isinstance(c := vars(m).get("config"), PreTrainedConfig)]
    return {
        "attributes": sorted(vars(model).keys() - {"_weight_conversions"}),  # of any model that was loaded
        "marks": [getattr(model, name, "none") for name in MARKS[1:]],
        "lists": {n: getattr(model, n) for n in dir(kind) if n.startswith(("_keys", "_no_", "_keep"))},
        "quantizer": {name: getattr(quantizer, name, None) for name in KINDS}
        | {"serializable": quantizer.is_serializable()},
        "quantizer's attributes": sorted(vars(quantizer)),
        "weights": type(quantizer.inner),
        "config": {n: x for n, x in model.config.to_dict().items() if n not in ("_name_or_path", "architectures")},
        "configs": [
            (holder, c is model.config, c._attn_implementation, getattr(c, "_is_quantized", "none"))
            for holder, c in configs
        ],
        "metadata": metadata,
        "names": sorted((state or {}).keys()),
    }


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_door_shows_transformers_the_same(doors, weights):
    models = doors(weights)
    expected = seen_by_transformers(models["made"])
    for name, model in models.items():
        found = seen_by_transformers(model)
        assert {k: v for k, v in found.items() if v != expected[k]} == {}, name
    quantized = weights != "plain"
    assert expected["marks"] == ([True, "torchao"] if quantized else ["none", "none"])
    assert expected["quantizer"]["is_trainable"] and expected["quantizer"]["is_qat_trainable"] is not quantized
    assert expected["configs"][0][3] == (True if quantized else "none")


ACTS = {
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "to": lambda m: m.to("cpu", dtype=torch.float16),
    "trainer": validate_quantization_for_training,
    "dequantize": lambda m: m.dequantize(),
}


def outcome(act, model):
    """What comes of it: the error's kind and text, or the parameters' types."""
    try:
        act(model)
    except (ValueError, NotImplementedError) as error:
        return type(error), str(error)
    return [(type(p), p.dtype) for p in model.parameters()]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_door_allows_the_same(doors, weights):
    models = doors(weights)
    for name, act in ACTS.items():
        outcomes = {door: outcome(act, copy.deepcopy(model)) for door, model in models.items()}
        assert all(x == outcomes["made"] for x in outcomes.values()), (name, outcomes)
        refused = isinstance(outcomes["made"], tuple)
        assert refused == (name == "dequantize" or (weights != "plain" and name in ("half", "float", "trainer"))), name


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_door_leads_out(doors, token_ids, tmp_path, weights):
    """``restore_`` leaves the model with its weights alone, whichever way HeadQ came."""
    models, ids = doors(weights), token_ids(1, 60)
    quantized = weights != "plain"
    with torch.no_grad():
        for name, model in models.items():
            restore_(model)
            expected = model(ids).logits
            assert not isinstance(getattr(model, "hf_quantizer", None), HeadQQuantizer)
            assert getattr(model, "is_quantized", False) is hasattr(model, "hf_quantizer") is quantized
            assert hasattr(model.config, "quantization_config") is hasattr(model.config, "_is_quantized") is quantized
            assert model.config._attn_implementation == "sdpa" and model.config is model.model.config
            model.save_pretrained(tmp_path / name)
            back = AutoModelForCausalLM.from_pretrained(tmp_path / name)
            assert not hasattr(back, "_headq") and type(back.lm_head.weight) is type(model.lm_head.weight)
            assert torch.equal(back(ids).logits, expected)
            quantize_(model, headq_config(**FAST))
            assert isinstance(model(ids).past_key_values, HeadQCache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_loaded_in_a_dtype(doors, tmp_path, token_ids, dtype):
    """As the dense checkpoint in that type, with HeadQ put on."""
    config, ids = doors("plain")["made"]._headq.config, token_ids(1, 90)
    loaded, dense = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=dtype) for name in ("headq", "dense"))
    quantize_(dense, config)
    assert [p.dtype for p in loaded.parameters()] == [p.dtype for p in dense.parameters()]
    assert loaded.config.dtype == dense.config.dtype
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, dense(ids).logits)


def test_full_fine_tuning(doors, tmp_path):
    """Through Trainer, and the same step by both doors."""
    row = {"input_ids": torch.arange(3, 40), "labels": torch.arange(3, 40)}
    arguments = TrainingArguments(
        output_dir=tmp_path / "run", max_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    models, trained = doors("plain"), {}
    for name in ("made", "loaded", "put on"):
        with pytest.warns(UserWarning, match="the model is in train mode"):
            Trainer(model=models[name], args=arguments, train_dataset=[row]).train()
        trained[name] = models[name].state_dict()
        attention._warned.clear()
    before = doors("plain")["loaded"].state_dict()
    for name, state in trained.items():
        assert all(torch.equal(x, trained["made"][key]) for key, x in state.items()), name
        assert any(not torch.equal(x, before[key]) for key, x in state.items()), name


def test_the_weights_config_answers_for_itself(doors):
    """Those who look for attributes of the weights' config find them: PEFT for torchao, FSDP for bitsandbytes."""
    for model in doors("int8").values():
        config = model.hf_quantizer.quantization_config
        assert config.quant_method == "headq" and isinstance(config.weights, TorchAoConfig)
        assert isinstance(config.quant_type, Int8WeightOnlyConfig) and callable(config.get_apply_tensor_subclass)
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = config.no_such_name
    with pytest.raises(AttributeError, match="'HeadQQuantizationConfig' object has no attribute 'quant_type'"):
        _ = HeadQQuantizationConfig(headq_config()).quant_type


def test_what_is_given_to_from_pretrained_is_not_changed(doors, tmp_path):
    doors("plain")
    for weights in (None, TorchAoConfig(Int8WeightOnlyConfig(version=2))):
        config = headq_config(**FAST)
        given = HeadQQuantizationConfig(config, weights=weights)
        before = vars(given).copy()
        one, two = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=given) for _ in range(2)
        )
        assert vars(given) == before and given.config is config and given.weights is weights
        assert one.config.quantization_config is not two.config.quantization_config is not given


def test_marks_that_a_user_has_set(tiny, token_ids):
    """As of a model whose GGUF file was unpacked: they come back."""
    model = tiny()
    model.is_quantized, model.hf_quantizer = False, None
    quantize_(model, headq_config(**FAST))
    assert "is_quantized" not in vars(model) and isinstance(model.hf_quantizer, HeadQQuantizer)
    restore_(model)
    assert (model.is_quantized, model.hf_quantizer) == (False, None) and "quantization_method" not in vars(model)
