"""The figure of a perturbation panel."""

import math
import os
from typing import Any

from headq_ao.evals.harness.key_changes import NO_SIDE_CODE, SIDE, WRONG_SIGN
from headq_ao.evals.harness.panel import FLOOR, TARGET

# colours that stay apart for colour-blind readers (Okabe and Ito), and markers
FAMILIES = {
    "noise, any direction": ("#8c8c8c", "o"),
    "noise, query directions": ("#0072b2", "o"),
    "noise, key directions": ("#009e73", "o"),
    "noise, chosen keys": ("#e69f00", "o"),
    "other quantizers": ("#cc79a7", "^"),
    "HeadQ": ("#d55e00", "s"),
}
CONTROL = "HeadQ, controls"
BARS = {
    "query_pca": ("query PCA", "#d55e00"),
    "score_optimal": ("score-optimal", "#e8935c"),
    "key_pca": ("key PCA", "#009e73"),
    "random": ("random", "#8c8c8c"),
    NO_SIDE_CODE: (NO_SIDE_CODE, "#c9c9c9"),
    WRONG_SIGN: (WRONG_SIGN, "#404040"),
}
SHOWN_STRENGTH = 0.2
NAMES = {"key_mse": "Key MSE", "fisher_error": "Fisher error"}
AXES = {"key_mse": "key MSE (squared key units)", "fisher_error": "Fisher error ½ Var$_a$(δ) (nats)"}


def plot_panel(panel: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw :func:`headq_ao.evals.harness.perturbations.perturbation_panel`'s result as a PNG.

    Above: attention KL against key MSE and against Fisher error; a point is one perturbation in one layer. Below: noise
    of one MSE in different directions, and the side code's bases at equal bits. Needs matplotlib (the extra ``plot``).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(12.5, 10.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.12, 1], hspace=0.02)
    left, right = upper.subplots(1, 2, sharey=True)
    for axes, predictor in ((left, "key_mse"), (right, "fisher_error")):
        scatter(axes, panel, predictor)
    left.set_ylabel("attention KL (nats)")
    handles, labels = left.get_legend_handles_labels()
    upper.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    left, right = lower.subplots(1, 2)
    matched_bars(left, panel)
    basis_bars(right, panel)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10.5)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def scatter(axes: Any, panel: dict[str, Any], predictor: str) -> None:
    """KL against a predictor, both logarithmic, coloured by family."""
    about = [panel["perturbations"][p["perturbation"]] for p in panel["points"]]
    for family, (color, marker) in FAMILIES.items():
        for control in (False, True) if family == "HeadQ" else (False,):
            wanted = (family, control)
            shown = [p for p, a in zip(panel["points"], about, strict=True) if (a["family"], a["control"]) == wanted]
            style = {"marker": "x"} if control else {"marker": marker, "linewidths": 0, "alpha": 0.75}
            x, y = ([p[key] for p in shown] for key in (predictor, TARGET))
            axes.scatter(x, y, s=22, color=color, label=CONTROL if control else family, **style)
    axes.set(xscale="log", yscale="log", xlabel=AXES[predictor])
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    if predictor == "fisher_error":
        ends = [f(p[key] for p in panel["points"] for key in (predictor, TARGET)) for f in (min, max)]
        axes.plot(ends, ends, color="black", linewidth=0.8, linestyle="--", zorder=0)
        axes.text(0.97, 0.05, "dashed: KL = Fisher error", transform=axes.transAxes, ha="right", fontsize=9)
    found = panel["correlations"]["all"][predictor]
    wrong = panel["counterexamples"]["wrong_order"][predictor]["share"]
    axes.set_title(
        f"{NAMES[predictor]}: rank correlation with KL {found['spearman']:.3f}, within a head "
        f"{found['within_head']:.3f};\n"
        f"orders equal-bit quantizers wrongly in {100 * wrong:.0f} % of comparisons"
    )


def matched_bars(axes: Any, panel: dict[str, Any]) -> None:
    """KL of noise of one MSE, by where it is."""
    rows = sorted((r for r in panel["matched_mse"]["rows"] if r["strength"] == SHOWN_STRENGTH), key=lambda r: r[TARGET])
    names, kl = [r["name"] for r in rows], [r[TARGET] for r in rows]
    bars = axes.barh(names, kl, color=[FAMILIES[r["family"]][0] for r in rows], height=0.7)
    axes.bar_label(bars, [f"×{r['times_isotropic']:.2g}" for r in rows], padding=4, fontsize=9)
    null = [r for r in panel["null_space"] if r["family"] == "null"]
    below = math.ceil(math.log10(max(FLOOR, *(r[TARGET] for r in null))))
    mse = min(r["relative_key_mse"] for r in null)
    axes.set(xscale="log", xlim=(min(kl) / 2, max(kl) * 2.5), xlabel="attention KL (nats); × that of all directions")
    axes.set_title(
        f"Noise of equal MSE, {100 * SHOWN_STRENGTH**2:.0f} % of the variance of the keys\n"
        f"(null directions: MSE {mse:.0f} times the variance, KL below 10$^{{{below}}}$ nats)"
    )
    axes.tick_params(axis="y", length=0)


def basis_bars(axes: Any, panel: dict[str, Any]) -> None:
    """KL of the side code's bases, a group of bars for each setting, with the share of flipped top keys."""
    at, ticks, longest = 0.0, [], 0.0
    for group in panel["bases"][::-1]:
        start = at
        for row in sorted(group["rows"], key=lambda r: list(BARS).index(r["name"]), reverse=True):
            axes.barh(at, row[TARGET], color=BARS[row["name"]][1], height=0.85)
            note = f"{row[TARGET]:.3f}, {100 * row['top1_flips']:.0f} % flips, {row['bits']:.4g} bits"
            axes.annotate(note, (row[TARGET], at), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5)
            longest = max(longest, row[TARGET])
            at += 1
        ticks.append(((start + at - 1) / 2, group["setting"].replace(SIDE, SIDE.replace(" ", "\n", 1))))
        at += 1
    for label, color in BARS.values():
        axes.barh(0, 0, color=color, label=label)
    axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks], fontsize=9)
    axes.set(xlim=(0, 1.45 * longest), xlabel="attention KL (nats)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.13), ncols=3, frameon=False, fontsize=9)
    axes.set_title("Side code by basis, at equal bits; no side code takes fewer")
    axes.tick_params(axis="y", length=0)
