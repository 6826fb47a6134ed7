"""A model of the evaluations as a folder that vLLM serves: plain weights, tokenizer, chat template."""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from headq_ao.evals.harness.inputs import DTYPES, SMOLLM2, calibrate_on, load
from headq_ao.evals.harness.texts import find_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command ``convert``."""
    add = parser.add_argument
    add("folder", type=Path, help="where the checkpoint goes")
    add("--model", default=SMOLLM2, help="'smollm2', 'qwen2.5-coder-0.5b' or what transformers loads (%(default)s)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: %(default)s)")
    add("--calibration", type=Path, metavar="FILE", help="calibrate too, in fp32, and write the calibration here")
    add("--text", default="bundled", help="to calibrate on: 'bundled', 'wikitext' or a file (default: %(default)s)")
    add("--tokens", type=int, default=4096, help="of that text (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint, and the calibration where one is asked for."""
    text = find_text(args.text, "calibrate")
    model, tokenizer = load(args.model, None, torch.float32)
    if args.calibration is not None:
        if args.folder.resolve() == args.calibration.resolve().parent:
            raise ValueError(f"vLLM reads every .safetensors of {args.folder} as weights: name a file outside it")
        calibration = calibrate_on(model, tokenizer, text, args.tokens, progress=True)
        args.calibration.parent.mkdir(parents=True, exist_ok=True)
        calibration.save(args.calibration)
        print(f"calibration on {args.tokens} tokens of {text.name}: {args.calibration}")
    save(plain_copy(model), tokenizer, args.folder, DTYPES[args.dtype])
    print(f"{args.model} in {args.dtype}: {args.folder}")
    return 0


def plain_copy(model: Any) -> Any:
    """The same weights in a model that ``save_pretrained`` writes; one that came from GGUF refuses.

    Raises:
        RuntimeError: when the copy computes other logits.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(model.generation_config)
    ids = torch.arange(8, 24)[None]
    if not torch.equal(logits(model, ids), logits(plain, ids)):
        raise RuntimeError(f"the copy of {type(model).__name__} computes other logits than the model it was made of")
    return plain


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """Logits ``[1, S, vocab]``."""
    out: Tensor = model(ids).logits
    return out


def save(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write weights in ``dtype``, config, tokenizer and chat template."""
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
