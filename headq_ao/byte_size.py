"""Numbers of bytes as people write them."""

import re
from typing import Any

UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def byte_size(given: Any) -> int:
    """``"8GiB"``, ``"500MB"`` or a number of bytes.

    Raises:
        ValueError: where it is none of these, or less than one byte.

    Example:
        >>> from headq_ao.byte_size import byte_size
        >>> byte_size("8GiB"), byte_size("1.5 MB"), byte_size("100"), byte_size(100)
        (8589934592, 1500000, 100, 100)
    """
    found = 0
    if isinstance(given, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?", given.strip().lower())
        found = 0 if match is None else int(float(match[1]) * UNITS[match[2]])
    elif isinstance(given, int) and not isinstance(given, bool):
        found = given
    if found < 1:
        raise ValueError(f"must be a size such as 8GiB or 500MB, or a number of bytes, got {given!r}")
    return found


def bytes_text(n: float) -> str:
    """Bytes in the binary unit that fits.

    Example:
        >>> from headq_ao.byte_size import bytes_text
        >>> bytes_text(100), bytes_text(3 * 2**20)
        ('100 B', '3.0 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            break
        n /= 1024
    return f"{n:,.0f} {unit}" if unit == "B" else f"{n:,.1f} {unit}"
