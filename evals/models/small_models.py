"""Models of a few million parameters, one of each of several architectures, trained here in minutes.

Command line: ``python -m headq_ao.evals.models.small_models --help``.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headq_ao.evals.harness import texts
from headq_ao.evals.harness.environment import environment
from headq_ao.evals.models.small_report import report
from headq_ao.evals.models.small_training import Recipe, build, fast_bfloat16, fit, seeded, train_tokenizer
from headq_ao.ops.cpu_build import cache_folder

RECIPES = {
    "small-gpt-neox": Recipe("gpt-neox"),
    "small-gpt2": Recipe("gpt2"),
    "small-olmoe": Recipe("olmoe"),
    "small-deepseek-v2": Recipe("deepseek-v2"),
    "small-gemma4": Recipe("gemma4", layers=6),
}
NAMES = tuple(RECIPES)
TEXT = "wikitext"
TRAINING_FILE = "training.json"
REPORT_ROWS = 32
LAST = 20

EPILOG = """\
examples:
  python -m headq_ao.evals.models.small_models gpt-neox --text wikitext          about five minutes on one core
  python -m headq_ao.evals.models.small_models gpt2 --text my.txt --out my-gpt2 --seed 1
  python -m headq_ao.evals.models.small_models gpt2 --text bundled --steps 20    a trial; it learns next to nothing
  HEADQ_WIKITEXT=path/to/wikitext-2-raw python -m headq_ao.evals.perplexity --model small-gpt-neox --text wikitext

The models are a check that a result does not hang on one architecture, no more, and a weak one: 4 million parameters
(the mixture of experts 15, of which a token uses 3), one megabyte of text, about as good as a bigram model. GPT-2's
attention stays almost uniform. A small KL here says little about a large model. The run ends with the held-out figures,
which training.json keeps beside the weights.

'wikitext' trains on the raw WikiText-2 validation split and reports on its test split, 'bundled' on the two
texts that come along; a file of your own is trained on and not reported on.

Without --out the model goes to the cache folder (HEADQ_CACHE_DIR, or headq_ao in the user's), under the recipe and
the text, and is not trained again. With --text wikitext and no other option that is where "small-gpt-neox"
and its like, names of models in every evaluation here, find it, or train it on first use.
"""


def text_hash(path: Path) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def recipe_folder(recipe: Recipe, sha256: str) -> Path:
    """The cache folder of what ``recipe`` makes of the text with that hash."""
    given = {name: x for name, x in dataclasses.asdict(recipe).items() if x is not None}
    settings = json.dumps(given, sort_keys=True)
    tag = hashlib.sha256(settings.encode()).hexdigest()[:12]
    return cache_folder() / f"small-{recipe.architecture}-{tag}-{sha256[:12]}"


def train(recipe: Recipe, text: str, folder: Path, progress: bool = True) -> dict[str, Any]:
    """Train by ``recipe`` and write model, tokenizer and ``training.json`` to ``folder``, in whole or not at all.

    Args:
        recipe: size, steps, seed.
        text: ``"bundled"``, ``"wikitext"`` or a file, as in :func:`headq_ao.evals.harness.texts.find_text`.
        folder: must be absent or empty.
        progress: show bars.

    Returns:
        What ``training.json`` holds: recipe, text and its hash, tokens seen, losses, report, seconds, environment.

    Raises:
        FileNotFoundError: when the text is not there.
        ValueError: when ``folder`` is in use, or the text is shorter than a training row.
    """
    path = texts.find_text(text, "calibrate")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} must be a new or an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    content = path.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(content, recipe.vocab)
    ids = torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"])
    with seeded(recipe.seed):
        model = build(recipe, len(tokenizer))
        losses = fit(model, ids, recipe, progress)
    meta = {
        "recipe": dataclasses.asdict(recipe),
        "text": text if text in ("bundled", "wikitext") else path.name,
        "text_file": path.name,
        "text_sha256": text_hash(path),
        "text_tokens": len(ids),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": recipe.steps * recipe.batch * recipe.context,
        "bfloat16_matmuls": fast_bfloat16(),
        "first_loss": losses[0],
        "final_loss": sum(losses[-LAST:]) / len(losses[-LAST:]),
        "seconds": time.perf_counter() - start,
        "report": report_on(model, tokenizer, text, ids, progress),
        "environment": environment(),
    }
    save(model, tokenizer, meta, folder)
    return meta


def report_on(model: Any, tokenizer: Any, text: str, ids: torch.Tensor, progress: bool) -> dict[str, Any] | None:
    """The report on the held-out text that belongs to ``text``; None where there is none."""
    if text not in ("bundled", "wikitext"):
        return None
    try:
        held_out = texts.find_text(text, "report")
    except FileNotFoundError:
        return None
    return report(model, tokenizer, held_out, ids, REPORT_ROWS, progress)


def save(model: Any, tokenizer: Any, meta: dict[str, Any], folder: Path) -> None:
    """Write to a folder beside ``folder`` and rename it."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
        fresh = Path(parent) / folder.name
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        (fresh / TRAINING_FILE).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        try:
            os.replace(fresh, folder)
        except OSError:
            if not (folder / TRAINING_FILE).is_file():  # else another process was faster
                raise


def trained_before(recipe: Recipe) -> Path | None:
    """The cache folder of a model that ``recipe`` made of WikiText, for when the text itself is not there."""
    for path in sorted(recipe_folder(recipe, "").parent.glob(recipe_folder(recipe, "").name + "*")):
        if json.loads((path / TRAINING_FILE).read_text(encoding="utf-8"))["text"] == TEXT:
            return path
    return None


def find_or_train(name: str, progress: bool = True) -> Path:
    """The folder of one of :data:`NAMES`, trained on the WikiText validation text on first use.

    Raises:
        FileNotFoundError: when it was not trained and the text is not there.
    """
    recipe = RECIPES[name]
    try:
        text = texts.find_text(TEXT, "calibrate")
    except FileNotFoundError as error:
        before = trained_before(recipe)
        if before is None:
            raise FileNotFoundError(
                f"{name} is trained on first use, for some minutes, and its text is missing: {error}"
            ) from error
        return before
    folder = recipe_folder(recipe, text_hash(text))
    if not folder.exists():
        train(recipe, TEXT, folder, progress)
    return folder


def load(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model in eval mode and tokenizer of one of :data:`NAMES`; see :func:`find_or_train`."""
    folder = find_or_train(name)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)


def summary(meta: dict[str, Any]) -> str:
    """What the command prints about a trained model."""
    rate = meta["tokens_seen"] / meta["seconds"]
    lines = [
        f"{meta['parameters'] / 1e6:.1f} M parameters, {meta['tokens_seen']:,} tokens in {meta['seconds']:.0f} s "
        f"({rate:,.0f} per second), {meta['tokens_seen'] / meta['text_tokens']:.1f} times the text",
        f"training loss {meta['first_loss']:.3f} -> {meta['final_loss']:.3f} nats per token",
    ]
    if (r := meta["report"]) is not None:
        lines += [
            f"{r['text_file']}, {r['rows']} rows of {r['row_length']}: perplexity {r['perplexity']:.1f} per token "
            f"(bigrams {r['bigram_perplexity']:.1f}, unigrams {r['unigram_perplexity']:.1f}), "
            f"{r['word_perplexity']:.0f} per word, {r['bits_per_byte']:.3f} bits per byte",
            f"loss {r['nll_near']:.3f} with fewer than 32 tokens before, "
            + ("" if r["nll_far"] is None else f"{r['nll_far']:.3f} with 512 or more; ")
            + f"attention entropy {r['attention_entropy']:.2f} nats, uniform {r['uniform_entropy']:.2f}",
        ]
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m headq_ao.evals.models.small_models",
        description="Train a small model of an architecture from a seed, for evaluations.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Recipe("gpt2")
    add = parser.add_argument
    add("architecture", choices=[r.architecture for r in RECIPES.values()], help="which one")
    add("--text", default=TEXT, help="'wikitext' (default), 'bundled' or a text file to train on")
    add("--out", type=Path, help="new folder for the model (default: in the cache folder)")
    add("--seed", type=int, default=default.seed, help="of weights, rows and dropout (0)")
    add("--steps", type=int, help="optimizer steps, of 1024 tokens each (the recipe's)")
    add("--threads", type=int, help="CPU threads (PyTorch's default); another number rounds differently")
    add("--no-progress", action="store_true", help="no progress bars")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for name, low in {"seed": 0, "steps": 1, "threads": 1}.items():
        if (value := getattr(args, name)) is not None and value < low:
            parser.error(f"--{name} must be at least {low}, got {value}")
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = dataclasses.replace(RECIPES[f"small-{args.architecture}"], seed=args.seed)
    if args.steps:
        recipe = dataclasses.replace(recipe, steps=args.steps)
    try:
        folder = args.out or recipe_folder(recipe, text_hash(texts.find_text(args.text, "calibrate")))
        if args.out is None and (folder / TRAINING_FILE).is_file():
            meta = json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8"))
            print("Trained before:")
        else:
            meta = train(recipe, args.text, folder, not args.no_progress)
    except (ValueError, FileNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(summary(meta))
    print(f"Model: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
