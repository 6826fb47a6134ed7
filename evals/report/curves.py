"""Plots of error by layer, KL by position, memory by context, and KL of controls."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headq_ao.evals.report.data import Group, Setting
from headq_ao.evals.report.style import family_style, new_figure, plain_log_ticks, save
from headq_ao.evals.report.text import MIB, context

LAYER_ERRORS = {
    "key_mse": "key error: mean square",
    "fisher_error": "score error: ½ Var$_a$(δ), nats",
    "attention_kl": "attention: KL to exact, nats",
    "value_error": "value error, weighted by a²",
    "output_error": "attention output after W$_O$: relative error",
}
SIDES = {"K only": " (keys only)", "V only": " (values only)"}
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 3)))


def line_styles(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """A line style for each setting: its family's colour and marker, another dash for each of one family."""
    seen: dict[str, int] = {}
    styles = []
    for setting in settings:
        colour, marker = family_style(setting.family)
        index = seen[setting.family] = seen.get(setting.family, -1) + 1
        styles.append(
            {
                "color": colour,
                "linestyle": DASHES[index % len(DASHES)],
                "marker": marker,
                "markersize": 4.5,
                "markeredgecolor": "white",
                "markeredgewidth": 0.5,
                "linewidth": 1.6,
                "label": setting.name,
            }
        )
    return styles


def _positive(values: Sequence[float | None]) -> list[float]:
    """Values for a logarithmic axis, NaN (a gap) where there is no logarithm."""
    return [float("nan") if v is None or v <= 0 else v for v in values]


def has_layers(settings: Sequence[Setting]) -> bool:
    """Whether there is any error by layer to draw."""
    return any((s.data["layers"] or {}).get(metric) for s in settings for metric in LAYER_ERRORS)


def has_positions(settings: Sequence[Setting]) -> bool:
    """Whether there is any KL by position to draw on a log scale."""
    return any(bucket["kl"] > 0 for s in settings for bucket in s.score["kl_by_position"])


def layers(settings: Sequence[Setting], path: Path) -> None:
    """Each model-visible error by layer, one panel each; a side that stays exact has no line in its panels."""
    styles = line_styles(settings)
    with new_figure(10.2, 6.0) as figure:
        *panels, legend = figure.subplots(2, 3).flat
        for axes, (metric, title) in zip(panels, LAYER_ERRORS.items(), strict=True):
            axes.set_title(title)
            axes.set_yscale("log")
            for setting, style in zip(settings, styles, strict=True):
                values = _positive((setting.data["layers"] or {}).get(metric) or [])
                if any(v == v for v in values):
                    axes.plot(range(len(values)), values, **style | {"markevery": max(1, len(values) // 6)})
            plain_log_ticks(axes.yaxis)
            axes.set_xlabel("layer")
        legend.set_axis_off()
        legend.legend(handles=_handles(settings, styles), loc="center left", handlelength=3.2)
        save(figure, path)


def _handles(settings: Sequence[Setting], styles: Sequence[Mapping[str, Any]]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], **{**style, "label": setting.name + SIDES.get(setting.sides, "")})
        for setting, style in zip(settings, styles, strict=True)
    ]


def positions(settings: Sequence[Setting], path: Path) -> None:
    """Mean KL by position of the scored token, in buckets."""
    styles = line_styles(settings)
    with new_figure(10.2, 4.6) as figure:
        axes = figure.subplots()
        axes.set_yscale("log")
        for setting, style in zip(settings, styles, strict=True):
            buckets = setting.score["kl_by_position"]
            middle = [(b["start"] + b["stop"]) / 2 for b in buckets]
            axes.plot(middle, _positive([b["kl"] for b in buckets]), **style)
        plain_log_ticks(axes.yaxis)
        axes.set_xlabel("position in the row, tokens")
        axes.set_ylabel("KL to the exact cache, nats (log scale)")
        figure.legend(handles=_handles(settings, styles), loc="outside right upper", handlelength=3.2)
        save(figure, path)


def memory(settings: Sequence[Setting], exact: Mapping[int, float] | None, path: Path) -> None:
    """Memory of one sequence's cache by context: whole, and against the exact one where that is known.

    Settings that differ by less than a line's width share one line.

    Args:
        settings: to draw.
        exact: bytes of the exact cache by tokens.
        path: of the PNG.
    """
    alike = _same_memory(settings)
    styles = line_styles([group[0] for group in alike])
    with new_figure(10.2, 4.8) as figure:
        panels = figure.subplots(1, 1 if exact is None else 2, squeeze=False)[0]
        for axes in panels:
            axes.set_xscale("log", base=2)
        if exact is not None:
            ys = [n / MIB for n in exact.values()]
            panels[0].plot(list(exact), ys, color="#000000", linewidth=1.8, label="exact, bf16")
        for group, style in zip(alike, styles, strict=True):
            contexts = group[0].memory
            label = ", ".join(s.name + SIDES.get(s.sides, "") for s in group)
            panels[0].plot(list(contexts), [n / MIB for n in contexts.values()], **style | {"label": label})
            shared = {t: exact[t] / n for t, n in contexts.items() if t in exact} if exact else {}
            if shared:
                panels[1].plot(list(shared), list(shared.values()), **style)
        _memory_axes(panels, sorted({t for s in settings for t in s.memory}))
        handles, _ = panels[0].get_legend_handles_labels()
        figure.legend(handles=handles, loc="outside lower center", ncols=2, handlelength=3.2)
        save(figure, path)


def _same_memory(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Settings whose bytes are within 1 % of the first of their group's at every context."""
    groups: list[list[Setting]] = []
    for setting in settings:
        for group in groups:
            one, two = group[0].memory, setting.memory
            if one.keys() == two.keys() and all(abs(one[t] - two[t]) <= 0.01 * one[t] for t in one):
                group.append(setting)
                break
        else:
            groups.append([setting])
    return groups


def _memory_axes(panels: Sequence[Any], contexts: Sequence[int]) -> None:
    panels[0].set_yscale("log")
    plain_log_ticks(panels[0].yaxis)
    panels[0].set_title("cache of one sequence, MiB (log scale)")
    if len(panels) > 1:
        panels[1].set_title("times smaller than the exact cache in bf16")
        panels[1].set_ylim(bottom=0)
    for axes in panels:
        axes.set_xticks(contexts, [context(t) for t in contexts])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("tokens in the cache")


def bars(group: Group, path: Path) -> list[Setting]:
    """Mean KL of each setting as a bar on a log scale, the largest on top.

    Returns:
        The settings left out because their KL of zero or less has no logarithm.
    """
    settings = sorted(group.packed, key=lambda s: s.kl)
    drawn = [s for s in settings if s.kl > 0]
    with new_figure(10.2, 1.3 + 0.3 * len(drawn)) as figure:
        axes = figure.subplots()
        axes.set_xscale("log")
        for i, setting in enumerate(drawn):
            sem = setting.score["mean_kl_sem"] or 0.0
            axes.barh(
                [i], [setting.kl], xerr=[[min(sem, 0.9 * setting.kl)], [sem]], height=0.62,
                color=family_style(setting.family)[0], ecolor="#333333", error_kw={"elinewidth": 1},
            )  # fmt: skip
            axes.annotate(
                f"{setting.kl:.3g}", (setting.kl + sem, i), (5, 0), textcoords="offset points", va="center", fontsize=9
            )
        values = [s.kl for s in drawn]
        axes.set_xlim(min(values) / 2, max(values) * 3)
        axes.set_yticks(range(len(drawn)), [f"{s.title} ({s.sides})" for s in drawn])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        plain_log_ticks(axes.xaxis)
        axes.set_xlabel("KL to the exact cache, nats per token (log scale)")
        save(figure, path)
    return [s for s in settings if s not in drawn]
