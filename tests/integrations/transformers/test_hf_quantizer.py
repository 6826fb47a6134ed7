"""``save_pretrained`` and ``from_pretrained`` bring a model back with its cache config and calibration, bit for bit."""

import json
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch
import torchao
import transformers
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, TorchAoConfig

from headq_ao import HeadQCache, HeadQQuantizationConfig, calibrate, headq_config, quantize_, restore_
from headq_ao.evals.harness import inputs
from headq_ao.statistics.moments import TENSORS

FAST = {"epoch_tokens": 64, "residual_length": 32, "block_size": 16}
FAMILIES = ["llama", "qwen3", "mistral", "gemma3", "phi3", "gpt_neox", "gpt2"]
WEIGHTS = {
    "int8": lambda: Int8WeightOnlyConfig(version=2),
    "int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}


@torch.no_grad()
def logits_of(model, ids):
    """Logits of a prompt and of chunks and tokens that read packed tokens."""
    cache = HeadQCache(model)
    logits = torch.cat([model(part, cache=cache).logits for part in ids.split([90, 20] + [1] * 10, 1)], 1)
    assert cache.packed_fraction > 0
    return logits


def calibrated(model, token_ids, **options):
    calibration = calibrate(model, [token_ids(2, 150, seed=9)], progress=False, source="random ids")
    return headq_config(**FAST | options, calibration=calibration)


def assert_same_calibration(a, b):
    assert (a.fingerprint, a.meta, len(a.layers)) == (b.fingerprint, b.meta, len(b.layers))
    for x, y in zip(a.layers, b.layers, strict=True):
        assert all(torch.equal(getattr(x, name), getattr(y, name)) for name in TENSORS)


@pytest.mark.parametrize("with_calibration", [False, True], ids=["uncalibrated", "calibrated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(tiny, token_ids, tmp_path, family, with_calibration):
    model, ids = tiny(family), token_ids(2, 120)
    config = calibrated(model, token_ids) if with_calibration else headq_config(**FAST, k_bits=3)
    quantize_(model, config)
    before = logits_of(model, ids)
    model.save_pretrained(tmp_path / "one")
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(logits_of(one, ids), before)
    if with_calibration:
        assert_same_calibration(one._headq.config.calibration, config.calibration)
    else:
        assert one._headq.config == config
    one.save_pretrained(tmp_path / "two")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "two"), ids), before)


@pytest.mark.parametrize("headq_first", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_over_quantized_weights(tiny, token_ids, tmp_path, family, weights, headq_first):
    model, ids = tiny(family, head_dim=32, heads=4), token_ids(1, 120)
    config = calibrated(model, token_ids)
    for one in [config, WEIGHTS[weights]()][:: 1 if headq_first else -1]:
        quantize_(model, one)
    before = logits_of(model, ids)
    model.save_pretrained(tmp_path / "one")
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert [type(p) for p in one.parameters()] == [type(p) for p in model.parameters()]
    assert torch.equal(logits_of(one, ids), before)
    one.save_pretrained(tmp_path / "two")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "two"), ids), before)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_quantized_by_transformers(tiny, token_ids, tmp_path, weights):
    """The other two routes: TorchAoConfig first, or both in one quantization_config."""
    tiny(head_dim=64).save_pretrained(tmp_path / "plain")
    ids, config, torchao_config = token_ids(1, 120), headq_config(**FAST), TorchAoConfig(WEIGHTS[weights]())
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=torchao_config)
    below = first.hf_quantizer
    quantize_(first, config)
    before = logits_of(first, ids)
    both = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain",
        quantization_config=HeadQQuantizationConfig(config, weights=TorchAoConfig(WEIGHTS[weights]())),
    )
    assert torch.equal(logits_of(both, ids), before)
    for i, model in enumerate((first, both)):
        model.save_pretrained(tmp_path / str(i))
        assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / str(i)), ids), before)
    restore_(first)
    assert first.hf_quantizer is below
    assert first.config.quantization_config is below.quantization_config
    first.save_pretrained(tmp_path / "restored")
    assert not hasattr(AutoModelForCausalLM.from_pretrained(tmp_path / "restored"), "_headq")


def test_tied_embeddings_that_quantization_parted(tiny, token_ids, tmp_path):
    """torchao quantizes lm_head, which was the embedding: it must not be tied again on loading."""
    model, ids = tiny(head_dim=64, tie_word_embeddings=True), token_ids(1, 120)
    quantize_(model, Int8WeightOnlyConfig(version=2))
    quantize_(model, headq_config(**FAST))
    before = logits_of(model, ids)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.lm_head.weight) is type(model.lm_head.weight)
    assert torch.equal(logits_of(loaded, ids), before)


def test_tied_embeddings_stay_tied(tiny, token_ids, tmp_path):
    model, ids = tiny(tie_word_embeddings=True), token_ids(1, 120)
    quantize_(model, headq_config(**FAST))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))


def test_restored_after_loading(tiny, token_ids, tmp_path):
    plain, ids = tiny(), token_ids(1, 120)
    with torch.no_grad():
        dense = plain(ids).logits
    quantize_(plain, headq_config(**FAST))
    plain.save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    restore_(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, dense)
    loaded.save_pretrained(tmp_path / "two")
    assert "quantization_config" not in json.loads((tmp_path / "two" / "config.json").read_text())
    assert not hasattr(AutoModelForCausalLM.from_pretrained(tmp_path / "two"), "_headq")
    assert not getattr(loaded, "is_quantized", False) and not getattr(loaded.config, "_is_quantized", False)


def test_sharded_and_in_another_dtype(tiny, token_ids, tmp_path):
    model, ids = tiny(), token_ids(1, 120)
    quantize_(model, calibrated(model, token_ids))
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same_calibration(half._headq.config.calibration, model._headq.config.calibration)
    assert logits_of(half, ids).dtype == torch.bfloat16


def test_a_calibration_given_as_a_path_is_in_the_checkpoint(tiny, token_ids, tmp_path):
    """The checkpoint does not need the file again."""
    model, ids = tiny(), token_ids(1, 120)
    config = calibrated(model, token_ids)
    config.calibration.save(tmp_path / "c.safetensors")
    quantize_(model, headq_config(**FAST, calibration=str(tmp_path / "c.safetensors")))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "c.safetensors").unlink()
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))


def rewrite(path, drop="none", edit=lambda tensors: None):
    with safetensors.safe_open(path, "pt") as f:
        metadata = f.metadata()
    tensors = {n: t.clone() for n, t in safetensors.torch.load_file(path).items() if drop not in n}
    edit(tensors)
    safetensors.torch.save_file(tensors, path, metadata)


DAMAGE = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-9]), None),
    "changed": (lambda p: rewrite(p, edit=lambda t: t["headq_calibration.0.k_sum"].add_(1)), "changed or damaged"),
    "lost": (lambda p: rewrite(p, drop="headq_calibration"), "changed or damaged"),
    "no header": (
        lambda p: safetensors.torch.save_file(safetensors.torch.load_file(p), p, {"format": "pt"}),
        "no headq",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints(tiny, token_ids, tmp_path, name):
    model = tiny()
    quantize_(model, calibrated(model, token_ids))
    model.save_pretrained(tmp_path)
    damage, message = DAMAGE[name]
    damage(tmp_path / "model.safetensors")
    with pytest.raises((ValueError, safetensors.SafetensorError), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_newer_config_is_refused(tiny, tmp_path):
    model = tiny()
    quantize_(model, headq_config(**FAST))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["quantization_config"]["config"]["_data"]["version"] = 3
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="version must be 1 to 2, which this headq_ao reads, got 3"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_weights_of_unknown_origin_are_refused(tiny, tmp_path):
    model = tiny(head_dim=64)
    torchao.quantization.quantize_(model, Int8WeightOnlyConfig(version=2))
    quantize_(model, headq_config(**FAST))
    with pytest.raises(ValueError, match=r"its config is not known.*quantize the weights with headq_ao.quantize_"):
        model.save_pretrained(tmp_path)


def test_only_headq_configs():
    with pytest.raises(ValueError, match="config must come from headq_config, got a Int8WeightOnlyConfig"):
        HeadQQuantizationConfig(Int8WeightOnlyConfig(version=2))


def test_no_pickle(tiny, token_ids, tmp_path, monkeypatch):
    model, ids = tiny(), token_ids(1, 120)
    quantize_(model, calibrated(model, token_ids))

    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    for name in ("pickle.loads", "pickle.load", "pickle.dump", "pickle.Unpickler", "torch.load", "torch.save"):
        monkeypatch.setattr(name, refuse)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits_of(model, ids))


def test_without_headq_the_plain_model_is_read(tiny, token_ids, tmp_path):
    """A process that has not imported headq_ao gets the model with its dense cache."""
    model = tiny()
    quantize_(model, calibrated(model, token_ids))
    model.save_pretrained(tmp_path)
    code = f"""
import sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
assert "headq_ao" not in sys.modules and model.config._attn_implementation == "sdpa"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.real_model
@pytest.mark.parametrize("weights", [None, "int8"])
def test_smollm2(tmp_path, weights):
    model, tokenizer = inputs.load("smollm2", None, torch.float32)
    ids = inputs.token_rows(tokenizer, inputs.find_text("bundled", "report"), 1, 120)
    calibration = inputs.calibrate_on(model, tokenizer, inputs.find_text("bundled", "calibrate"), 1024, progress=False)
    if weights:
        quantize_(model, WEIGHTS[weights]())
    quantize_(model, headq_config(calibration=calibration, residual_length=32))
    before = logits_of(model, ids)
    model.save_pretrained(tmp_path)
    marks = [getattr(model, name, None) for name in ("is_quantized", "quantization_method")]
    del model
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)  # a warning would be an error
    assert torch.equal(logits_of(loaded, ids), before)
    assert [getattr(loaded, name, None) for name in ("is_quantized", "quantization_method")] == marks
    assert marks == ([True, "torchao"] if weights else [None, None])  # not those of the GGUF file, which was unpacked
