"""Tables: aligned text for a terminal, and the Markdown of recipes' results."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PREDICTORS = {"key_mse": "key mean square error", "score_error": "score error", "fisher_error": "Fisher error"}
HEADER = (
    "cache", "bits K / V", "at 1k / 4k / 16k", "KL (nats)", "ratio", "perplexity", "flips", "full-precision tokens",
    "packed", "method and options",
)  # fmt: skip


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned columns, the first ``left`` of them to the left and the others to the right.

    Example:
        >>> from headq_ao.evals.harness.table import text_table
        >>> print(text_table(["cache", "bits"], [["exact", "32"], ["HeadQ", "2.5"]]))
        cache  bits
        -----  ----
        exact    32
        HeadQ   2.5
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first ``left`` columns are aligned left."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows])


def number(x: float | None, digits: int = 2) -> str:
    """A number or a dash."""
    return "–" if x is None or x != x else f"{x:.{digits}f}"


def measured(x: float, sem: float | None, digits: int) -> str:
    """A number with its standard error over rows."""
    return number(x, digits) if sem is None else f"{x:.{digits}f} ± {sem:.{digits}f}"


def options_text(result: dict[str, Any]) -> str:
    """What a setting asked for, as one writes it in ``headq_config(...)`` or for another method."""
    parts = [f"{name}={value!r}" for name, value in result["options"].items()]
    text = ", ".join(parts + ([] if result["calibrated"] else ["no calibration"]))
    name = result["method"]["name"]
    return (text or "defaults") if name == "headq" else f"{name}({text})"


def result_row(result: dict[str, Any]) -> list[str]:
    """The cells of one setting under ``HEADER``."""
    score, bits = result["score"], result["bits"]
    exact = result["method"]["kind"] == "exact"
    sides, asked = [bits[side] for side in ("key", "value")], (result.get("config") or {}).get("v_bits")
    one_row = sides[1] is None and asked is not None and result["method"]["name"] == "headq"
    return [
        result["title"],
        f"{number(sides[0])}, one row" if one_row else " / ".join("exact" if x is None else number(x) for x in sides),
        "–" if exact else " / ".join(number(x) for x in bits["at"].values()),
        "0" if exact else measured(score["mean_kl"], score["mean_kl_sem"], 4),
        "1" if exact else measured(score["ppl_ratio"], score["ppl_ratio_sem"], 3),
        measured(score["perplexity"], score["perplexity_sem"], 2),
        f"{100 * score['flips']:.1f} %",
        "all" if exact else number(score["report"]["exact_rows"], 0),
        f"{100 * score['packed_fraction']:.0f} %",
        f"`{options_text(result)}`",
    ]


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results of one recipe in its order.

    Raises:
        FileNotFoundError: when the folder holds none.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    results = [result for result in found if "score" in result]  # a recipe's panel lies beside them
    if not results:
        raise FileNotFoundError(f"no results in {folder}; make them with: python recipes/run.py recipes/NAME.yaml")
    return sorted(results, key=lambda result: (result["order"], result["name"]))


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown table of results, followed by one line on the protocol."""
    first = results[0]
    p, score = first["protocol"], first["score"]
    perplexity = measured(score["exact_perplexity"], score["exact_perplexity_sem"], 2)
    note = (
        f"{first['model']}, {p['dtype']}; {p['rows']} rows of {p['row_length']} tokens of {p['text']}, "
        f"prefill {p['prefill']}, chunks of {p['chunk']}; calibration on {p['calibration_tokens']} tokens of "
        f"{p['calibration']}; exact perplexity {perplexity}. "
        "± is the standard error over rows; full-precision tokens: sinks and window at the end of a row; packed: share "
        "of the tokens read that were packed ones."
    )
    return markdown_table(HEADER, [result_row(result) for result in results]) + "\n\n" + note


def model_tables(results: Sequence[dict[str, Any]]) -> str:
    """One table per model, in the order of the results."""
    models = list(dict.fromkeys(result["model"] for result in results))
    return "\n\n".join(results_table([r for r in results if r["model"] == model]) for model in models)


def panel_table(folder: Path) -> str:
    """How well each measure of key error predicts the attention KL, from the recipe's ``panel.json``.

    Raises:
        FileNotFoundError: when there is none.
    """
    path = folder / "panel.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; make it with: python recipes/run.py recipes/{folder.name}.yaml")
    found = json.loads(path.read_text(encoding="utf-8"))
    panel = found["panel"]
    pooled, orders = panel["correlations"]["all"], panel["counterexamples"]
    header = ["measure", "rank correlation with KL", "within a head", "lowest head", "wrong order at equal bits"]
    rows = [
        [
            title,
            *(number(pooled[name][key], 3) for key in ("spearman", "within_head", "within_head_lowest")),
            f"{100 * orders['wrong_order'][name]['share']:.1f} %",
        ]
        for name, title in PREDICTORS.items()
    ]
    free = panel["null_space"][0]
    note = (
        f"{found['model']}; {pooled['perturbations']} perturbations of the keys of each layer, {panel['rows']} rows of "
        f"{panel['row_length']} tokens; {orders['compared']} comparisons of two quantizers of equal bits on one head. "
        f"{free['name'].capitalize()}: mean square {number(free['relative_key_mse'], 0)} times the keys' variance, "
        f"attention KL {free['attention_kl']:.0e} nats."
    )
    return markdown_table(header, rows) + "\n\n" + note
