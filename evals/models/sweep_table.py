"""The sweep's stored table, as docs/models.md shows it."""

from collections import Counter
from typing import Any

TITLES = {"causal": "Causal language models", "images": "Image-text-to-text models, with text", "pixels": "With images"}


def models_table(mapping: str, table: dict[str, Any]) -> str:
    """The classes of one mapping, and how many are served in which way."""
    entries = [e for e in table["classes"] if e["mapping"] == mapping]
    counts = Counter(kind_of(e) for e in entries)
    told = ", ".join(f"{n} {kind}" for kind, n in counts.most_common())
    head = ["| type | class | | error, control | why |", "|---|---|---|---|---|"]
    return "\n".join([f"{len(entries)}: {told}.", "", *head, *map(line, entries)])


def kind_of(entry: dict[str, Any]) -> str:
    """How a class is served, or that a check failed."""
    return f"{entry['kind']}, wrong" if entry.get("wrong") else str(entry["kind"])


def line(entry: dict[str, Any]) -> str:
    """One class."""
    errors = ""
    if "control" in entry:
        worst = max(entry[name]["error"] for name in ("uncalibrated", "calibrated"))
        errors = f"{worst:.4f}, {entry['control']:.4f}"
    why = " ".join(str(entry.get("why", "")).split()).replace("|", "\\|")
    why = why if len(why) <= 160 else f"{why[:157]}…"
    return f"| {entry['name']} | {entry['class']} | {kind_of(entry)} | {errors} | {why} |"
