"""A random adapter (LoRA) that changes keys and values, to see what a calibration of the base model costs it."""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

TARGETS = ("k_proj", "v_proj")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command ``adapter``."""
    add = parser.add_argument
    add("model", type=Path, help="checkpoint folder, as convert writes it")
    add("folder", type=Path, help="where the adapter goes, in PEFT's format")
    add("--rank", type=int, default=8, help="(default: %(default)s)")
    add("--share", type=float, default=0.25, help="norm of the change by the norm of the weight (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Write the adapter."""
    if args.rank < 1 or args.share <= 0:
        raise ValueError(f"--rank must be at least 1 and --share above 0, got {args.rank} and {args.share}")
    g = torch.Generator().manual_seed(args.seed)
    tensors: dict[str, torch.Tensor] = {}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if name.removesuffix(".weight").rpartition(".")[2] not in TARGETS:
            continue
        up = torch.randn(weight.shape[0], args.rank, generator=g)
        down = torch.randn(args.rank, weight.shape[1], generator=g)
        up *= args.share * weight.detach().norm() / (up @ down).norm()
        at = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{at}.lora_A.weight": down, f"{at}.lora_B.weight": up}
    if not tensors:
        raise ValueError(f"{args.model} has no {' and '.join(TARGETS)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": args.rank, "lora_alpha": args.rank, "target_modules": list(TARGETS), "bias": "none",
        "task_type": "CAUSAL_LM", "base_model_name_or_path": None,
    }  # fmt: skip
    (args.folder / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    print(f"{len(tensors) // 2} weights changed by {args.share} of their norm: {args.folder}")
    return 0
