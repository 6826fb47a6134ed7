"""What an engine is told: options, calibration and codecs of layers. Read without vLLM."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from headq_ao import headq_config, quantize_
from headq_ao.evals.models.tiny import tiny_config
from headq_ao.integrations.transformers.models import fingerprint
from headq_ao.integrations.vllm import settings as module
from headq_ao.integrations.vllm.settings import UNIT, VARIABLE, _weights, layer_number, settings
from tests.vllm import checkpoints


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    module._settings.cache_clear()
    monkeypatch.delenv(VARIABLE, raising=False)


def engine(folder, **headq):
    """What vLLM hands around, as far as it is read."""
    model = SimpleNamespace(model=str(folder), revision=None, hf_config=AutoConfig.from_pretrained(folder))
    return SimpleNamespace(model_config=model, additional_config={"headq": headq} if headq else None)


@pytest.mark.parametrize(
    ("name", "number"),
    [("model.layers.12.self_attn.attn", 12), ("layers.0.attn", 0), ("language_model.model.layers.7.x.attn", 7)],
)
def test_layers_by_name(name, number):
    assert layer_number(name) == number


@pytest.mark.parametrize("name", ["model.h.3.attn", "model.layers", "mylayers.3.attn"])
def test_names_without_a_number(name):
    with pytest.raises(ValueError, match="cannot tell which layer of the model"):
        layer_number(name)


def test_a_calibration_is_named_or_in_the_environment(tiny, monkeypatch):
    folder, calibration = tiny
    with pytest.raises(ValueError, match="attention backend needs a calibration; name one of this model by"):
        settings(engine(folder))
    given = settings(engine(folder, calibration=calibration))
    assert settings(engine(folder, calibration=calibration)) is given, "read once"
    monkeypatch.setenv(VARIABLE, str(calibration))
    assert settings(engine(folder)).calibration.fingerprint == given.calibration.fingerprint
    with pytest.raises(FileNotFoundError, match=r"no calibration file at .*gone"):
        settings(engine(folder, calibration="gone"))


def test_options_are_those_of_a_config(tiny):
    """And ``window``, as engines call it."""
    folder, calibration = tiny
    plain = settings(engine(folder, calibration=calibration)).config
    assert (plain.k_bits, plain.residual_length) == (headq_config().k_bits, headq_config().residual_length)
    found = settings(engine(folder, calibration=calibration, preset="near_lossless", window=96)).config
    assert found.residual_length == 96 and found.k_bits == headq_config("near_lossless").k_bits
    with pytest.raises((ValueError, TypeError), match="windoww"):
        settings(engine(folder, calibration=calibration, windoww=96))
    wrong = engine(folder)
    wrong.additional_config = {"headq": "quality"}
    with pytest.raises(ValueError, match=r"additional_config\['headq'\] must be an object of options, got 'quality'"):
        settings(wrong)


@pytest.mark.parametrize(
    ("options", "words"), [({"adapt": "prompt"}, "adapt"), ({"k_bits": None}, "k_bits=None or v_bits=None")]
)
def test_codecs_that_engines_do_not_serve(tiny, options, words):
    folder, calibration = tiny
    with pytest.raises(ValueError, match=f"with both sides packed; leave out {words}"):
        settings(engine(folder, calibration=calibration, **options))


def test_chunked_attention_is_refused(tiny):
    folder, calibration = tiny
    asked = engine(folder, calibration=calibration)
    asked.model_config.hf_config = tiny_config("llama4_text")
    with pytest.raises(ValueError, match="llama4_text: vLLM serves no layers of chunked attention"):
        settings(asked)


def test_a_calibration_of_few_tokens_is_refused(tiny, tmp_path):
    with pytest.warns(UserWarning, match="the calibration rests on"):
        few = checkpoints.save_calibration(tmp_path / "few.safetensors", checkpoints.llama(), tokens=256)
    with pytest.raises(ValueError, match="vLLM serves no uncalibrated cache"):
        settings(engine(tiny[0], calibration=few))


def test_a_checkpoint_brings_its_own(tiny, tmp_path):
    """Config and calibration, as save_pretrained wrote them; options that are given make another config."""
    model = checkpoints.llama()
    quantize_(model, headq_config(k_bits=3, residual_length=96, calibration=str(tiny[1])))
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    found = settings(engine(folder))
    assert (found.config.k_bits, found.config.residual_length) == (3, 96)
    module._settings.cache_clear()
    assert settings(engine(folder, k_bits=4)).config.k_bits == 4


def test_ranks_have_equal_shares_of_heads(tiny):
    """Each the codec of its own KV heads, cut from the whole one."""
    found = settings(engine(*tiny[:1], calibration=tiny[1]))
    whole = found.codec(1, 0, 1)
    assert (whole.kv_heads, len(found.shapes)) == (checkpoints.KV_HEADS, checkpoints.LAYERS)
    halves = [found.codec(1, rank, 2) for rank in (0, 1)]
    for i, half in enumerate(halves):
        n = checkpoints.KV_HEADS // 2
        assert half.kv_heads == n
        assert torch.equal(half.keys.mean, whole.keys.mean[:, i * n : (i + 1) * n])
    with pytest.raises(
        ValueError, match=f"cannot divide {checkpoints.KV_HEADS} KV heads among 5 tensor-parallel ranks"
    ):
        found.codec(0, 0, 5)


def test_bytes_of_a_token_are_those_of_pages(tiny):
    found = settings(engine(tiny[0], calibration=tiny[1], mean_bits=2.5))
    pages = sum(
        t.nbytes for i in range(checkpoints.LAYERS)
        for t in found.codec(i, 0, 1).layout(UNIT).allocate(1, torch.float32, torch.device("cpu"))
    )  # fmt: skip
    assert found.bytes_of_token() * UNIT == pytest.approx(pages, rel=0.01)


def test_weights_of_a_folder_are_told_as_a_models_are(tiny, tmp_path):
    model = checkpoints.llama()
    want = fingerprint(model)["weights"]
    assert _weights(Path(tiny[0]))["weights"] == pytest.approx(want, rel=1e-6)
    assert _weights(None) == {} and _weights(tmp_path) == {}
