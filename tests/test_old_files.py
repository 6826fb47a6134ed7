"""What commit 96f785c wrote: calibrations and checkpoints load and give the same codecs, stored prompts are refused.

``tests/fixtures/make_v0.py`` wrote ``tests/fixtures/v0`` under that commit and defines the models and the streams. On
the machine that it ran on, codecs and codes must be equal bit for bit. Elsewhere the last bits of eigenvectors and of
matrix products are others: codecs must then be close. Codes are searched for in another way since: they leave less
error.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from headq_ao import Calibration, HeadQCache, headq_config, quantize_, restore_
from headq_ao.integrations.transformers.models import with_cache
from tests.pages import held

FIXTURES = Path(__file__).parent / "fixtures"
OLD = FIXTURES / "v0"
ABOUT = json.loads((OLD / "about.json").read_text(encoding="utf-8"))


def load_maker():
    spec = importlib.util.spec_from_file_location("make_v0", FIXTURES / "make_v0.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_v0 = load_maker()
SAME_MACHINE = make_v0.machine() == ABOUT["machine"]


@pytest.fixture(autouse=True)
def one_thread():
    """The fixtures were made with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quantized(key):
    """The model of a shape and config: with the old calibration file, or as it comes from the old checkpoint."""
    shape, name = key.split(".")
    if shape == "tiny":
        return AutoModelForCausalLM.from_pretrained(OLD / "checkpoint").eval()
    model = make_v0.model_of(shape)
    calibration = Calibration.load(OLD / "calibration.safetensors")
    quantize_(model, headq_config(**make_v0.CONFIGS[name], scale_bits=16, calibration=calibration))
    return model


def assert_same_codec(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        found = make_v0.digest(tensor)
        assert found["shape"] == expected[name]["shape"] and found["norm"] == pytest.approx(
            expected[name]["norm"], rel=1e-4
        ), name
        if SAME_MACHINE:
            assert found == expected[name], name


def arrays_of(key):
    with np.load(OLD / "codes.npz") as arrays:
        return {n.removeprefix(f"{key}."): torch.from_numpy(arrays[n]) for n in arrays if n.startswith(f"{key}.")}


def codes_of(cache):
    """Codes ``[Hkv, T, D]`` uint8 and scales ``[Hkv, T]`` of the first packed tokens, by layer and side."""
    for i, layer in enumerate(cache.layers):
        begin, parts = held(layer)
        assert begin == 0 and len(parts) == 4 * len(layer.pool.layout.groups)
        for at, name in enumerate(("k_codes", "k_scale", "v_codes", "v_scale")):
            found = torch.cat([t[:, : make_v0.PACKED] for t in parts[at::4]])
            yield f"{i}.{name}", found.to(torch.uint8) if "codes" in name else found.flatten(1)


@torch.no_grad()
def errors_of_first_layer(model, key):
    """By side, what our codes of the stream's packed tokens leave in the first layer over what those of the fixture do,
    by KV head; its keys and values do not depend on how others are coded."""
    expected = arrays_of(key)
    ids = expected.pop("ids").long()
    found = dict(codes_of(make_v0.filled(model, ids, make_v0.CALLS[key.split(".")[1]])))
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert (x.shape, x.dtype) == (expected[name].shape, expected[name].dtype), name
    codec, first = model._headq.codecs[0], model._headq.config.n_sink
    restore_(model)
    exact = DynamicCache(config=model.config)
    model(ids, **with_cache(exact))
    sides = ("k", codec.calibrated, exact.layers[0].keys), ("v", codec.values, exact.layers[0].values)
    errors = {}
    for side, coded, x in sides:
        y = (x[0, :, first : first + make_v0.PACKED].float() - coded.mean[0].unsqueeze(-2)) @ coded.encode[0]
        top = torch.tensor([2.0**b - 1 for b in ABOUT["bits"][key][0][side]])[:, None, None]
        step = coded.step[0].unsqueeze(-2) if side == "k" else 1.0  # what a value stores is σ · step

        def error(codes, scale, y=y, top=top, step=step, hessian=coded.hessian[0]):
            e = y - scale.float()[..., None] * step * (codes.float() - top / 2)
            return ((e @ hessian) * e).sum((-1, -2))

        ours, theirs = (error(c[f"0.{side}_codes"], c[f"0.{side}_scale"]) for c in (found, expected))
        errors[side] = ours / theirs
    return errors


@pytest.mark.parametrize("key", ABOUT["bits"])
def test_codecs_are_the_old_ones_and_codes_are_better(key):
    """Heads of one and of different bits, in one call and token by token, in fp32 and bf16."""
    model = quantized(key)
    codecs = model._headq.codecs
    assert [{"k": [*c.bits.k], "v": [*c.bits.v]} for c in codecs] == ABOUT["bits"][key]
    for codec, expected in zip(codecs, ABOUT["codecs"][key], strict=True):
        assert_same_codec(make_v0.codec_tensors(codec), expected)
    errors = torch.cat([*errors_of_first_layer(model, key).values()])
    assert float(errors.max()) < 1.1 and float(errors.mean()) < 1.03, errors


def test_the_checkpoint_brings_config_calibration_and_a_cache_that_decodes():
    model = quantized("tiny.mixed")
    config = model._headq.config
    assert (config.mean_bits, config.n_sink) == (2.25, 4)
    assert config.calibration.layers[0].tokens == 4 * (512 - 4)
    cache = HeadQCache(model)
    out = model.generate(arrays_of("tiny.mixed")["ids"][:, :200].long(), max_new_tokens=8, do_sample=False, cache=cache)
    assert out.shape == (1, 208) and cache.packed_fraction > 0


def test_a_stored_prompt_is_refused_with_what_to_do(tmp_path):
    model = quantized("tiny.mixed")
    message = r"prompt cache: version 2 is older than \d+, which this headq_ao reads; fill a HeadQCache with the prompt"
    with pytest.raises(ValueError, match=message):
        HeadQCache.load(OLD / "prompt.safetensors", model)
