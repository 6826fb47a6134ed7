"""Tables of a perturbation panel (:mod:`headq_ao.evals.harness.panel`); what a panel lacks is left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headq_ao.evals.report.text import percent

PREDICTORS = {"key_mse": "key MSE", "score_error": "score error", "fisher_error": "Fisher error ½ Var_a(δ)"}
MOST_ROWS = 12


@dataclass(frozen=True)
class Table:
    """A table of texts: the first column and ``text_columns`` are names, the others are numbers."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Sequence[int] = ()


def figure(x: Any) -> str:
    """A number to three digits, a dash where there is none."""
    return f"{x:.3g}" if isinstance(x, (int, float)) and not isinstance(x, bool) and x == x else "–"


def share(x: Any) -> str:
    return percent(x) if isinstance(x, (int, float)) and x == x else "–"


def single_panels(panels: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Panels with their names; a file may hold one or several by name."""
    found = []
    for name, panel in panels.items():
        if isinstance(panel, Mapping) and "correlations" not in panel:
            inner = [(str(k), p) for k, p in panel.items() if isinstance(p, Mapping) and "correlations" in p]
            about = panel.get("model", name) if len(inner) == 1 else None
            found += [(str(about or key), p) for key, p in inner] or [(name, panel)]
        elif isinstance(panel, Mapping):
            found.append((name, panel))
    return found


def panel_tables(panel: Mapping[str, Any]) -> list[Table]:
    """The tables that a panel has the data for."""
    makers = (correlations, wrong_order, pairs, null_space, matched_mse, bases)
    return [table for table in (make(panel) for make in makers) if table is not None and table.rows]


def _mapping(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = data.get(key)
    return value if isinstance(value, Mapping) else {}


def _rows(data: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = data.get(key)
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _label(row: Mapping[str, Any]) -> str:
    parts = [row.get("name"), row.get("setting")]
    return ", ".join(str(p) for p in parts if p is not None)


def correlations(panel: Mapping[str, Any]) -> Table:
    """Rank correlations of predictors with attention KL."""
    rows = []
    for name, of in _mapping(panel, "correlations").items():
        for predictor, label in PREDICTORS.items():
            numbers = _mapping(of, predictor) if isinstance(of, Mapping) else {}
            if numbers:
                keys = ("spearman", "within_head", "within_head_lowest", "pearson_log")
                rows.append(
                    [f"{label}, {name} ({of.get('perturbations', '–')})", *(figure(numbers.get(k)) for k in keys)]
                )
    header = ("predictor, set (perturbations)", "Spearman", "within a head, mean", "lowest head", "Pearson of logs")
    return Table("How well each error orders perturbations by their attention KL: 1 is the same order.", header, rows)


def wrong_order(panel: Mapping[str, Any]) -> Table:
    """Shares of pairs at equal bits that a predictor puts in the wrong order."""
    of = _mapping(_mapping(panel, "counterexamples"), "wrong_order")
    rows = [
        [label, share(of[name].get("share")), share(of[name].get("share_of_clear")), figure(of[name].get("clear"))]
        for name, label in PREDICTORS.items()
        if isinstance(of.get(name), Mapping)
    ]
    caption = "Pairs of quantizers of equal bits: how often the one with the smaller error has the larger attention KL."
    return Table(caption, ("predictor", "of all pairs", "of clear pairs (over 10 %)", "clear pairs"), rows)


def pairs(panel: Mapping[str, Any]) -> Table:
    """Quantizers of equal bits whose mean key MSE and mean KL disagree."""
    rows = []
    for row in _rows(_mapping(panel, "counterexamples"), "pairs")[:MOST_ROWS]:
        a, b = _mapping(row, "a"), _mapping(row, "b")
        numbers = [figure(x.get(key)) for key in ("key_mse", "attention_kl") for x in (a, b)]
        rows.append([f"{a.get('name')} / {b.get('name')}", figure(row.get("bits")), *numbers, share(row.get("heads"))])
    header = ("A / B", "bits", "key MSE A", "key MSE B", "KL A", "KL B", "heads alike")
    return Table(
        "Counterexamples: A has the smaller key error and the larger attention KL at the same bits.", header, rows
    )


def null_space(panel: Mapping[str, Any]) -> Table:
    """Large key errors that attention does not see."""
    rows = [
        [
            _label(row),
            figure(row.get("relative_key_mse")),
            figure(row.get("score_error")),
            figure(row.get("attention_kl")),
        ]
        for row in _rows(panel, "null_space")
    ]
    header = ("change of the keys", "key MSE / variance", "score error", "attention KL")
    return Table("Null space: changes that no query sees, and others to compare with.", header, rows)


def matched_mse(panel: Mapping[str, Any]) -> Table:
    """Noise of equal MSE in different directions."""
    rows = [
        [
            _label(row),
            *(figure(row.get(k)) for k in ("strength", "relative_key_mse", "attention_kl", "times_isotropic")),
        ]
        for row in _rows(_mapping(panel, "matched_mse"), "rows")
    ]
    header = ("noise in", "strength", "key MSE / variance", "attention KL", "times that of all directions")
    return Table("Matched MSE: noise of the same size, in different directions.", header, rows)


def bases(panel: Mapping[str, Any]) -> Table:
    """HeadQ's side code by basis, the wrong sign, and no side code."""
    rows = [
        [
            _label(row),
            *(figure(row.get(k)) for k in ("bits", "key_mse", "score_error", "attention_kl")),
            share(row.get("worse_than_query_pca")),
        ]
        for row in _rows(panel, "bases")
    ]
    header = ("side code", "bits", "key MSE", "score error", "attention KL", "heads worse than query PCA")
    return Table("The side code's basis and sign.", header, rows)
