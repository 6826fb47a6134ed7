"""Plots of bits against quality."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from headq_ao.evals.report.choice import BUDGETS, pareto
from headq_ao.evals.report.data import Group, Setting
from headq_ao.evals.report.style import FAMILIES, family_style, new_figure, place_labels, plain_log_ticks, save

HEADQ_LINE, BASELINE_LINE = "#0072B2", "#8C4A12"
BIT_TICKS = (1, 1.5, 2, 2.25, 2.5, 3, 3.5, 4, 4.5, 5)
MOST_BITS = 5.0  # of the plots: beyond lie settings that are all but exact, which would press the others together
Measure = Callable[[Setting], tuple[float, float]]


def kl_of(setting: Setting) -> tuple[float, float]:
    """Mean KL and its standard error."""
    return setting.kl, setting.score["mean_kl_sem"] or 0.0


def perplexity_cost(setting: Setting) -> tuple[float, float]:
    """Perplexity above the exact cache's and its standard error, in percent."""
    return 100 * (setting.score["ppl_ratio"] - 1), 100 * (setting.score["ppl_ratio_sem"] or 0.0)


def _bits_axis(axes: Any, settings: Sequence[Setting], narrow: bool) -> None:
    bits = [s.bits for s in settings]
    axes.set_xscale("log", base=2)
    low, high = min(bits) * (0.94 if narrow else 0.87), max(bits) * 1.12
    ticks = [t for t in BIT_TICKS if low <= t <= high and not (narrow and t in (2.25, 3.5, 4.5))]
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xticks([], minor=True)
    for budget in BUDGETS:
        if low < budget.bits < high:
            axes.axvline(budget.bits, color="#C9C9C9", linewidth=1.1, linestyle=(0, (2, 2)), zorder=0.5)
    axes.set_xlabel("bits at 4096 tokens" if narrow else "bits per element at 4096 tokens, packed sides")


def _size(marker: str) -> float:
    return {"*": 10.0, "X": 8.0, "P": 8.5}.get(marker, 6.5)


def _points(axes: Any, settings: Sequence[Setting], measure: Measure) -> None:
    floor = axes.get_yscale() == "log"
    for setting in settings:
        y, sem = measure(setting)
        colour, marker = family_style(setting.family)
        hollow = setting.sides == "V only"
        axes.errorbar(
            [setting.bits], [y], yerr=[[min(sem, 0.9 * y) if floor else sem], [sem]],
            fmt=marker, color=colour, markersize=_size(marker), elinewidth=1.2, alpha=0.95,
            markerfacecolor="white" if hollow else colour, markeredgecolor=colour if hollow else "white",
            markeredgewidth=1.5 if hollow else 0.6, zorder=3 if setting.is_headq else 2.5,
        )  # fmt: skip


def _fronts(axes: Any, settings: Sequence[Setting], measure: Measure) -> tuple[list[Setting], list[Any]]:
    """Draw the two staircases of what is best within a number of bits; their corner settings and lines come back."""
    corners: list[Setting] = []
    stairs = []
    for headq, colour, dash in ((True, HEADQ_LINE, "-"), (False, BASELINE_LINE, (0, (5, 2)))):
        front = pareto([s for s in settings if s.is_headq == headq])
        if front:
            ends = [*(s.bits for s in front[1:]), max(axes.get_xlim()[1], front[-1].bits)]
            line = [(x, measure(s)[0]) for s, end in zip(front, ends, strict=True) for x in (s.bits, end)]
            axes.plot(*zip(*line, strict=True), color=colour, linestyle=dash, linewidth=1.6, alpha=0.75, zorder=1.5)
            corners += front
            stairs.append(line)
    return corners, stairs


def _lines_and_names(axes: Any, settings: Sequence[Setting], measure: Measure, names: bool) -> None:
    """The staircases and names at their corners; where one side is packed, names of the best for their bits."""
    both = settings[0].sides == "K+V"
    named, stairs = _fronts(axes, settings, measure) if both else (_best_of_each_side(settings), [])
    if names:
        obstacles = [(s.bits, measure(s)[0]) for s in settings]
        for line in stairs:
            obstacles += [point for a, b in pairwise(line) for point in _between(axes, a, b)]
        place_labels(axes, [(s.bits, measure(s)[0], s.name, s.is_headq or not both) for s in named], obstacles)


def _best_of_each_side(settings: Sequence[Setting]) -> list[Setting]:
    return [s for side in ("K only", "V only") for s in pareto([s for s in settings if s.sides == side])]


def _between(axes: Any, start: Any, stop: Any) -> Any:
    """Points every few pixels of a straight piece on the screen, in data coordinates."""
    import numpy as np

    ends = axes.transData.transform([start, stop])
    n = int(np.abs(ends[1] - ends[0]).max() / 6) + 2
    return axes.transData.inverted().transform(np.linspace(ends[0], ends[1], n))


def _frontier_legend(figure: Any, settings: Sequence[Setting]) -> None:
    from matplotlib.lines import Line2D

    present = {s.family for s in settings}
    order = [*FAMILIES, *sorted(present - set(FAMILIES))]
    handles = [
        Line2D([], [], color=c, marker=m, linestyle="", markersize=_size(m), markeredgecolor="white", label=family)
        for family in order
        if family in present
        for c, m in [family_style(family)]
    ]
    handles += [
        Line2D([], [], color=HEADQ_LINE, linewidth=1.6, label="best of headq_config"),
        Line2D([], [], color=BASELINE_LINE, linewidth=1.6, linestyle=(0, (5, 2)), label="best baseline"),
    ]
    if any(s.sides == "V only" for s in settings):
        grey: dict[str, Any] = {"color": "#555555", "marker": "o", "linestyle": "", "markersize": 7}
        handles.append(Line2D([], [], **grey, label="filled: keys packed"))
        handles.append(Line2D([], [], **grey, markerfacecolor="white", label="hollow: values packed"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.6, handletextpad=0.5)


def _quality_axis(axes: Any, perplexity: bool, settings: Sequence[Setting]) -> None:
    if not perplexity:
        axes.set_yscale("log")
        return
    from matplotlib.ticker import NullLocator

    axes.set_yscale("symlog", linthresh=1.0, linscale=0.8)
    values = [perplexity_cost(s)[0] for s in settings]
    ticks = (-100, -10, -1, 0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10000)
    low, high = min(*values, 0), max(*values, 1)
    shown = [t for t in ticks if 1.6 * low - 0.5 <= t <= 1.6 * high]
    axes.set_yticks(shown, [f"{t:g} %" for t in shown])
    axes.yaxis.set_minor_locator(NullLocator())


def frontier(groups: Sequence[Group], path: Path, perplexity: bool = False) -> list[Setting]:
    """Bits against KL (log scale) or against perplexity above exact.

    With several groups one panel each, keys and values packed; with one group a second panel for settings that pack
    one side only.

    Args:
        groups: one per model, each with at least one setting to draw.
        path: of the PNG.
        perplexity: draw that instead of KL.

    Returns:
        The settings left out: more than :data:`MOST_BITS`, or a KL of zero or less, which has no logarithm.
    """
    measure = perplexity_cost if perplexity else kl_of
    titled = _panels(groups)
    drawn = [(title, shown) for title, settings in titled if (shown := [s for s in settings if _drawn(s, perplexity)])]
    every = [s for _, settings in drawn for s in settings]
    narrow = len(drawn) > 2
    lines = 2 if len(drawn) > 3 else 1
    columns = math.ceil(len(drawn) / lines)
    with new_figure(10.2, 5.9 if lines == 1 else 8.6) as figure:
        ratios = [1.75, 1] if len(groups) == 1 and columns == 2 else [1] * columns
        grid = figure.subplots(lines, columns, sharey=True, squeeze=False, width_ratios=ratios)
        _quality_axis(grid[0][0], perplexity, every)
        panels = list(zip(grid.flat, drawn, strict=False))
        for axes in grid.flat[len(drawn) :]:
            axes.set_axis_off()
        for axes, (title, settings) in panels:
            axes.set_title(title)
            _bits_axis(axes, settings, narrow)
            _points(axes, settings, measure)
            if perplexity:
                axes.axhline(0, color="#222222", linewidth=1.2, zorder=1)
        for first in grid[:, 0]:
            first.set_ylabel("perplexity above exact" if perplexity else "KL to the exact cache, nats (log scale)")
        if not perplexity:
            plain_log_ticks(grid[0][0].yaxis)
        _frontier_legend(figure, every)
        figure.draw_without_rendering()
        for axes, (_, settings) in panels:
            _lines_and_names(axes, settings, measure, names=not narrow)
        save(figure, path)
    return [s for _, settings in titled for s in settings if not _drawn(s, perplexity)]


def drawable(settings: Sequence[Setting], perplexity: bool) -> bool:
    """Whether :func:`frontier` has a point to draw."""
    return any(_drawn(s, perplexity) for s in settings)


def _drawn(setting: Setting, perplexity: bool) -> bool:
    return setting.bits <= MOST_BITS and (perplexity or setting.kl > 0)


def _panels(groups: Sequence[Group]) -> list[tuple[str, list[Setting]]]:
    """Title and settings of each panel."""
    if len(groups) > 1:
        return [(g.label, g.both_sides) for g in groups]
    (group,) = groups
    one_side = [s for s in group.packed if s.sides != "K+V"]
    both = (f"{group.label}: keys and values packed", group.both_sides)
    return [both, ("one side packed, the other exact", one_side)]
