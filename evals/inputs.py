"""What an evaluation reads: a model, a text, token rows, a calibration."""

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from headq_ao import Calibration, HeadQConfig, calibrate
from headq_ao.evals import qwen, smollm2

TEXTS = Path(__file__).parent / "texts"
OTHER_TEXTS = ("french", "code", "dialogue")
WIKITEXT_VARIABLE = "HEADQ_WIKITEXT"
SMOLLM2 = "smollm2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CALIBRATION_ROW = 1024

Purpose = Literal["report", "calibrate"]
BUNDLED: dict[Purpose, str] = {"report": "heldout.txt", "calibrate": "calibration.txt"}
WIKITEXT: dict[Purpose, str] = {"report": "wiki.test.raw", "calibrate": "wiki.valid.raw"}


def find_text(name: str, purpose: Purpose, wikitext: str | None = None) -> Path:
    """The text file behind ``"bundled"``, ``"wikitext"``, another bundled text's name, or a path.

    Args:
        name: ``"bundled"``: this package's held-out or calibration text; ``"wikitext"``: the raw test or validation
            split; ``"french"``, ``"code"``, ``"dialogue"``: bundled texts of other kinds; anything else is a file.
        purpose: report and calibrate never share a text.
        wikitext: folder of the raw WikiText files; None: the environment variable ``HEADQ_WIKITEXT``.

    Raises:
        FileNotFoundError: with what to do about it.
    """
    if name == "bundled":
        return TEXTS / BUNDLED[purpose]
    if name == "wikitext":
        folder = wikitext or os.environ.get(WIKITEXT_VARIABLE)
        if not folder:
            raise FileNotFoundError(
                f"wikitext needs the folder that holds {WIKITEXT[purpose]} (the raw WikiText-2 files): "
                f"set {WIKITEXT_VARIABLE}=FOLDER"
            )
        path = Path(folder) / WIKITEXT[purpose]
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no file {WIKITEXT[purpose]}; it must hold the raw WikiText-2 files")
        return path
    if name in OTHER_TEXTS:
        return TEXTS / f"{name}.txt"
    if not Path(name).is_file():
        known = ", ".join(map(repr, ("bundled", "wikitext", *OTHER_TEXTS)))
        raise FileNotFoundError(f"no text file {name!r}; give a path or one of {known}")
    return Path(name)


def load(model: str, gguf_file: str | None, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, Any]:
    """Model in eval mode and tokenizer: a named one, else what transformers finds under the name.

    Named: ``"smollm2"`` and ``"qwen2.5-coder-0.5b"`` come from packages, ``"small-gpt-neox"`` and ``"small-gpt2"``
    are trained on first use.

    Raises:
        ValueError: when transformers cannot load it.
        ModuleNotFoundError: when the model's package is not installed.
        FileNotFoundError: when a model must be trained and its text is not there.
    """
    from headq_ao.evals import small_models  # it finds its text here

    if model == SMOLLM2:
        return smollm2.load_model(dtype).to(device), smollm2.load_tokenizer()
    if model == qwen.NAME:
        return qwen.load_model(dtype).to(device), qwen.load_tokenizer()
    if model in small_models.NAMES:
        trained, tokenizer = small_models.load(model, dtype)
        return trained.to(device), tokenizer
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **options)
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **options).eval().to(device), tokenizer
    except (OSError, ValueError) as error:
        raise ValueError(f"transformers cannot load {model!r}: {error}") from error


def token_rows(tokenizer: Any, path: Path, rows: int, row_length: int) -> Tensor:
    """The first ``rows`` rows ``[rows, row_length]`` of a text that is tokenized once, without special tokens.

    Raises:
        ValueError: when the text is too short.
    """
    text = path.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < rows * row_length:
        raise ValueError(
            f"{path.name} has {len(ids)} tokens, fewer than {rows} rows of {row_length}; "
            "take fewer or shorter rows, or a longer text"
        )
    return ids[: rows * row_length].view(rows, row_length)


def calibrate_on(
    model: Any, tokenizer: Any, path: Path, tokens: int, progress: bool, context_length: int | None = None
) -> Calibration:
    """Calibrate on the first ``tokens`` tokens of a text, in rows of at most 1024."""
    length = min(tokens, CALIBRATION_ROW)
    rows = token_rows(tokenizer, path, tokens // length, length)
    return calibrate(model, list(rows), context_length=context_length, progress=progress, source=path.name)


def describe(config: HeadQConfig) -> dict[str, Any]:
    """A config as plain data, its calibration as the meta data that the calibration carries."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if isinstance(config.calibration, Calibration):
        fields["calibration"] = config.calibration.meta
    elif config.calibration is not None:
        fields["calibration"] = Path(config.calibration).name
    return fields
