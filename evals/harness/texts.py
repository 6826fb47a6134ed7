"""The texts that an evaluation reads, and their token rows."""

import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

TEXTS = Path(__file__).parents[1] / "texts"
OTHER_TEXTS = ("french", "code", "dialogue")
WIKITEXT_VARIABLE = "HEADQ_WIKITEXT"

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
        ValueError: where the file is empty, or no UTF-8 text.
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
    try:
        empty = not Path(name).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name!r} must be a UTF-8 text file, and its byte {error.start} is none of such a text"
        ) from error
    if empty:
        raise ValueError(f"{name!r} has no text")
    return Path(name)


def token_rows(tokenizer: Any, path: Path, rows: int, row_length: int) -> Tensor:
    """:func:`rows_of` the text of a file."""
    return rows_of(tokenizer, path.read_text(encoding="utf-8"), path.name, rows, row_length)


def rows_of(tokenizer: Any, text: str, name: str, rows: int, row_length: int) -> Tensor:
    """The first ``rows`` rows ``[rows, row_length]`` of a text that is tokenized once, without special tokens.

    Args:
        name: of the text, for messages.

    Raises:
        ValueError: when the text is too short.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < rows * row_length:
        raise ValueError(
            f"{name} has {len(ids)} tokens, fewer than {rows} rows of {row_length}; "
            "take fewer or shorter rows, or a longer text"
        )
    return ids[: rows * row_length].view(rows, row_length)
