"""What an evaluation reads: a model, a calibration; :mod:`headq_ao.evals.harness.texts` has the texts."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headq_ao import Calibration, HeadQConfig, calibrate
from headq_ao.evals.harness.texts import find_text as find_text
from headq_ao.evals.harness.texts import token_rows as token_rows
from headq_ao.evals.models import qwen, small_models, smollm2
from headq_ao.integrations.transformers.calibrate import Readers

SMOLLM2 = "smollm2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CALIBRATION_ROW = 1024


def load(model: str, gguf_file: str | None, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, Any]:
    """Model in eval mode and tokenizer: a named one, else what transformers finds under the name.

    Named: ``"smollm2"`` and ``"qwen2.5-coder-0.5b"`` come from packages, ``"small-gpt-neox"`` and the others of
    :data:`small_models.NAMES` are trained on first use.

    Raises:
        ValueError: when transformers cannot load it.
        ModuleNotFoundError: when the model's package is not installed.
        FileNotFoundError: when a model must be trained and its text is not there.
    """
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


def calibrate_on(
    model: Any, tokenizer: Any, path: Path, tokens: int, progress: bool, context_length: int | None = None,
    readers: Readers = "all",
) -> Calibration:  # fmt: skip
    """Calibrate on the first ``tokens`` tokens of a text, in rows of at most 1024."""
    length = min(tokens, CALIBRATION_ROW)
    rows = token_rows(tokenizer, path, tokens // length, length)
    given: dict[str, Any] = {"context_length": context_length, "readers": readers}
    return calibrate(model, list(rows), progress=progress, source=path.name, **given)


def describe(config: HeadQConfig) -> dict[str, Any]:
    """A config as plain data, its calibration as the meta data that the calibration carries."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if isinstance(config.calibration, Calibration):
        fields["calibration"] = config.calibration.meta
    elif isinstance(config.calibration, str):
        fields["calibration"] = Path(config.calibration).name
    return fields


def call_spans(first: int, length: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each call that feeds ``length`` tokens: ``first`` tokens, then ``chunk`` at a time.

    Example:
        >>> from headq_ao.evals.harness.inputs import call_spans
        >>> list(call_spans(5, 12, 4)), list(call_spans(0, 3, 4))
        ([(0, 5), (5, 9), (9, 12)], [(0, 3)])
    """
    return itertools.pairwise(sorted({0, *range(first, length, chunk), length}))
