"""accelerate's model-parallel placement: hooks on every module, layers offloaded to the CPU or the disk."""

import contextlib

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM

from headq_ao import HeadQCache, calibrate, headq_config, quantize_, restore_

FAST = {"warmup_tokens": 64, "residual_length": 32, "block_size": 16}
FAMILIES = ["llama", "qwen3", "mistral", "gemma3", "phi3", "gpt_neox", "gpt2"]


def forced_hooks(model, folder):
    """One device, but a hook on each module that moves inputs and outputs."""
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


def by_layer(model, folder):
    """A device map that names every child of the decoder."""
    base = model.base_model_prefix
    names = [f"{base}.{n}" for n, _ in getattr(model, base).named_children()]
    names += [n for n, _ in model.named_children() if n != base]
    return dispatch_model(model, dict.fromkeys(names, "cpu"), main_device="cpu", force_hooks=True)


def to_cpu(model, folder):
    cpu_offload(model, execution_device="cpu")
    return model


def to_disk(model, folder):
    disk_offload(model, str(folder), execution_device="cpu")
    return model


def with_buffers(model, folder):
    cpu_offload(model, execution_device="cpu", offload_buffers=True)
    return model


PLACEMENTS = {
    "force_hooks": forced_hooks,
    "device_map": by_layer,
    "cpu_offload": to_cpu,
    "cpu_offload with buffers": with_buffers,
    "disk_offload": to_disk,
}


def results(model, ids):
    """Greedy tokens of a padded batch, and logits of a chunk that reads packed tokens."""
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    cache = HeadQCache(model)
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, cache=cache, pad_token_id=0)
    grown = torch.nn.functional.pad(mask, (0, 11 + 20), value=1)
    with torch.no_grad():
        logits = model(ids[:, :20], attention_mask=grown, cache=cache).logits
    assert cache.packed_fraction > 0
    assert {t.device.type for t in cache.tensors()} == {"cpu"}
    return tokens, logits


CASES = [(family, placement, "placed first") for family in FAMILIES for placement in PLACEMENTS]
CASES += [("llama", placement, "quantized first") for placement in PLACEMENTS]


@pytest.mark.parametrize(("family", "placement", "order"), CASES)
def test_placed_models_give_the_same_tokens(tiny, token_ids, tmp_path, family, placement, order):
    ids, plain, placed = token_ids(2, 150), tiny(family), tiny(family)
    calibration = calibrate(plain, [token_ids(3, 100, seed=9)], progress=False)
    config = headq_config(**FAST, calibration=calibration)
    quantize_(plain, config)
    if order == "placed first":
        placed = PLACEMENTS[placement](placed, tmp_path)
        quantize_(placed, config)
    else:
        quantize_(placed, config)
        placed = PLACEMENTS[placement](placed, tmp_path)
    if "offload" in placement:
        assert next(placed.parameters()).device.type == "meta"
    for a, b in zip(results(placed, ids), results(plain, ids), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_rest_of_the_interface_under_hooks(tiny, token_ids, tmp_path, placement):
    """Without a calibration; calibrate, saved caches, positional arguments and restore_ on a placed model."""
    ids, plain, placed = token_ids(1, 150), tiny(), PLACEMENTS[placement](tiny(), tmp_path)
    told = pytest.warns(UserWarning, match="no gradients of this model .some of its weights are offloaded.;")
    with told if "offload" in placement else contextlib.nullcontext():
        calibrations = [calibrate(model, [token_ids(2, 200, seed=9)], progress=False) for model in (plain, placed)]
    for a, b in zip(calibrations[0].layers, calibrations[1].layers, strict=True):
        assert torch.equal(a.q_outer, b.q_outer) and torch.equal(a.k_rows, b.k_rows)
    with torch.no_grad():
        dense = placed(ids).logits
    for model in (plain, placed):
        quantize_(model, headq_config(**FAST))
    caches = [HeadQCache(model) for model in (plain, placed)]
    with torch.no_grad():
        for model, cache in zip((plain, placed), caches, strict=True):
            model(ids, None, None, cache)
        caches[0].save(tmp_path / "prompt")
        loaded = HeadQCache.load(tmp_path / "prompt", placed)  # saved by the one, read by the other
        logits = [m(ids[:, :1], cache=c).logits for m, c in ((plain, caches[0]), (placed, caches[1]), (placed, loaded))]
        assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
        restore_(placed)
        assert torch.equal(placed(ids).logits, dense)


def test_a_device_map_of_from_pretrained(tiny, token_ids, tmp_path):
    """A saved model with HeadQ, its second layer on the disk."""
    model, ids = tiny(), token_ids(2, 150)
    quantize_(model, headq_config(**FAST, calibration=calibrate(model, [token_ids(3, 100, seed=9)], progress=False)))
    expected = results(model, ids)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    rest = {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places | rest, offload_folder=str(tmp_path / "offload")
    )
    assert loaded.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    for a, b in zip(results(loaded, ids), expected, strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-4)  # weights on the disk are mapped as they lie there


def test_offloaded_models_can_be_saved(tiny, token_ids, tmp_path):
    model, ids = tiny(), token_ids(2, 150)
    quantize_(model, headq_config(**FAST, calibration=calibrate(model, [token_ids(3, 100, seed=9)], progress=False)))
    expected = results(model, ids)
    model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with pytest.warns(UserWarning, match="save a model with offloaded modules"):  # transformers' own
        model.save_pretrained(tmp_path)
    for a, b in zip(results(AutoModelForCausalLM.from_pretrained(tmp_path), ids), expected, strict=True):
        assert torch.equal(a, b)
