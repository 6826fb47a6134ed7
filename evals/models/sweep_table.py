"""The sweep's stored table as a page of the documentation: ``python -m headq_ao.evals.models.sweep_table``."""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

TABLE, PAGE = Path("recipes/results/sweep/models.json"), Path("docs/models.md")
KINDS = {
    "native": "attention reads packed tokens",
    "fallback": "packed in memory, dequantized for the model's own attention at each call: memory is saved, not time",
    "refused": "`quantize_` raises a ValueError with this reason, and leaves the model as it was",
    "no text": "it does not run on text alone here, with or without HeadQ",
    "not built": "no tiny model of it could be made here",
    "not checked": "as small as that it is still too large for the limit of time",
    "crash": "the check itself failed",
}
TITLES = {"causal": "Causal language models", "images": "Image-text-to-text models, with text"}
HEAD = """# Models

Every class of transformers {transformers}'s mappings, tiny and seeded, float32 on the CPU (PyTorch {torch}): prefill,
chunks, decoding, left padding, with and without a calibration, saving and loading, crops, restoring. Errors are held
against a dense cache whose rows carry 0.7 % noise; and the rows that a packed cache stands for, put into a dense one,
must give the same logits to 1e-5 by the reference and 1e-3 by the C++ kernels. `make test-models` makes this page.
"""


def page(table: dict[str, Any]) -> str:
    """The page."""
    parts = [HEAD.format(**table)]
    parts += [f"- **{kind}**: {told}." for kind, told in KINDS.items()]
    for mapping, title in TITLES.items():
        entries = [e for e in table["classes"] if e["mapping"] == mapping]
        counts = Counter(kind_of(e) for e in entries)
        told = ", ".join(f"{n} {kind}" for kind, n in counts.most_common())
        parts += ["", f"## {title}", "", f"{len(entries)}: {told}.", "", "| type | class | | error, control | why |"]
        parts += ["|---|---|---|---|---|", *map(line, entries)]
    return "\n".join(parts) + "\n"


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


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    given.page.write_text(page(json.loads(given.table.read_text())))


if __name__ == "__main__":
    main()
