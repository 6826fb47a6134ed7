"""Neutral text in front of short prompts, so that there are packed tokens to read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

NEUTRAL = Path(__file__).parent / "neutral.txt"  # written for this project, CC0 1.0
SEPARATOR = "\n\n"


def fill_front(context: str, least: int, tokenizer: Any, encode: Callable[[str], list[int]]) -> str:
    """The context, with neutral text in front until it has at least ``least`` tokens.

    The text begins at its start, is repeated where it is too short, and is cut at a token; an empty line follows it.

    Args:
        context: left as it is when it is long enough.
        least: tokens, as ``encode`` counts them.
        tokenizer: cuts the text.
        encode: text to ids, as the prompt will be encoded.
    """
    short = least - len(encode(context))
    if short <= 0:
        return context
    text = NEUTRAL.read_text(encoding="utf-8").strip() + SEPARATOR
    ids = tokenizer.encode(text, add_special_tokens=False)
    while True:
        whole, part = divmod(short, len(ids))
        filled: str = text * whole + tokenizer.decode(ids[:part]).rstrip() + SEPARATOR + context
        missing = least - len(encode(filled))
        if missing <= 0:
            return filled
        short += missing
