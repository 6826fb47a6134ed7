"""Fixtures shared by the tests: tiny seeded models, and a clean slate of once-only warnings."""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers

from headq_ao import headq_config, quantize_
from headq_ao.integrations.transformers import attention
from tests import older_transformers

VOCAB = 128
FAST = {"epoch_tokens": 64, "residual_length": 32, "block_size": 16}  # packs after few tokens
TORCHAO_0_17 = (  # it warns of the version that its weights have by default, and of the other one too
    "ignore:Config Deprecation. version 1 of Int8:UserWarning",
    "ignore:Deprecation. (Plain\\w+|AffineQuantizedTensor) is deprecated:UserWarning",
    "ignore:Stored version is not the same as current default version:UserWarning",
)
ROOT = Path(__file__).resolve().parents[1]
older_transformers.install()


def pytest_configure(config):
    if importlib.metadata.version("torchao").startswith("0.17."):
        for line in TORCHAO_0_17:
            config.addinivalue_line("filterwarnings", line)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """No test depends on which tests its process has run before."""
    torch.manual_seed(0)


def load_recipe(name):
    """The script ``recipes/NAME.py`` as a module: the folder is no package."""
    spec = importlib.util.spec_from_file_location(f"recipes_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def warn_again():
    """Warnings that are given once per model are given once per test."""
    attention._warned.clear()


@pytest.fixture
def reference_ops(monkeypatch):
    """No compiled kernel: packed tokens are written and read by the references, in fp32 throughout."""
    for operator in ("paged_attention", "cache_update", "error_feedback"):
        kernel = importlib.import_module(f"headq_ao.ops.{operator}.cpu_kernel")
        monkeypatch.setattr(kernel, "library", lambda: None)


@pytest.fixture
def tiny():
    """``tiny(family, head_dim, heads, kv_heads, **options)``: a seeded random causal LM in eval mode.

    The weights are larger than transformers' default, so that a logit depends on what attention reads.
    """
    return build_tiny


def build_tiny(family="llama", head_dim=32, heads=4, kv_heads=2, layers=2, seed=0, model_class=None, **options):
    common = dict(
        vocab_size=VOCAB,
        hidden_size=heads * 16,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        tie_word_embeddings=False,
    )
    grouped = common | {"num_key_value_heads": kv_heads, "head_dim": head_dim}
    whole = common | {"hidden_size": heads * head_dim}
    window = {"sliding_window": 100}
    config = {
        "llama": lambda: transformers.LlamaConfig(**grouped | options),
        "qwen3": lambda: transformers.Qwen3Config(**grouped | options),
        "mistral": lambda: transformers.MistralConfig(**grouped | window | options),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **grouped | window | {"layer_types": ["sliding_attention", "full_attention"] * (layers // 2)} | options
        ),
        "phi3": lambda: transformers.Phi3Config(**whole | {"num_key_value_heads": kv_heads} | options),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**whole | options),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=heads * head_dim, n_layer=layers, n_head=heads, n_positions=4096,
            initializer_range=0.1, pad_token_id=0, eos_token_id=1, bos_token_id=2, **options,
        ),
    }[family]()  # fmt: skip
    torch.manual_seed(seed)
    model = (model_class or transformers.AutoModelForCausalLM).from_config(config).eval()
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None  # random models stop anywhere
    return model


@pytest.fixture
def model():
    """A tiny quantized Llama, without a calibration."""
    made = build_tiny()
    quantize_(made, headq_config(**FAST))
    return made


@pytest.fixture
def token_ids():
    """``token_ids(batch, length, seed=0)``: random ids, special tokens left out."""

    def make(batch, length, seed=0):
        return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))

    return make
