"""A checkpoint that vLLM serves holds the same weights; a calibration never lies among them."""

import argparse

import pytest
import torch
from transformers import AutoModelForCausalLM

from headq_ao.evals.vllm import convert


def parse(*words):
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def test_a_plain_copy_computes_the_same_and_is_written(tiny, tmp_path):
    model = tiny()
    copy = convert.plain_copy(model)
    copy.to(torch.bfloat16).save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read.dtype == torch.bfloat16
    for name, weight in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], weight.to(torch.bfloat16))


def test_a_copy_that_computes_otherwise_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(convert, "logits", lambda model, ids: torch.rand(1))
    with pytest.raises(RuntimeError, match="other logits"):
        convert.plain_copy(tiny())


def test_a_calibration_among_the_weights_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "load", lambda *_: (tiny(), None))
    with pytest.raises(ValueError, match="as weights"):
        convert.run(parse(tmp_path, "--calibration", tmp_path / "c.safetensors"))
    assert not any(tmp_path.iterdir())
