"""The report's figures: which are drawn for a group of settings, and what each caption says."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headq_ao.evals.report import curves, plots
from headq_ao.evals.report.choice import BUDGETS, best
from headq_ao.evals.report.data import Group, Setting
from headq_ao.evals.report.text import context, memory_words, small


@dataclass(frozen=True)
class Figure:
    """A PNG file, what it shows to those who do not see it, and its caption."""

    path: Path
    alt: str
    caption: str


Draw = Callable[[], Figure]
LEAST_SETTINGS = 3  # fewer say more in a table


def file_name(*parts: str) -> str:
    """A PNG's name from parts such as a model's path.

    Example:
        >>> from headq_ao.evals.report.figures import file_name
        >>> file_name("wikitext", "org/model", "kl")
        'wikitext-org-model-kl.png'
    """
    return re.sub(r"[^\w.]+", "-", "-".join(parts)) + ".png"


def planned(group: Group, exact: Mapping[int, float] | None, folder: Path) -> list[Draw]:
    """What to call, in order, to draw a group's figures; those without data are left out, all with two settings.

    Args:
        group: of one recipe and model.
        exact: bytes of the model's exact cache by tokens, where known.
        folder: of the PNGs.
    """
    shown = group.shown()
    if len(group.packed) < LEAST_SETTINGS:
        return []

    def path(kind: str) -> Path:
        return folder / file_name(group.recipe, group.label, kind)

    draws: list[Draw] = []
    if plots.drawable(group.packed, perplexity=False):
        draws.append(lambda: frontier([group], path("kl"), perplexity=False))
    if plots.drawable(group.packed, perplexity=True):
        draws.append(lambda: frontier([group], path("perplexity"), perplexity=True))
    if curves.has_layers(shown):
        draws.append(lambda: by_layer(shown, path("layers")))
    if curves.has_positions(shown):
        draws.append(lambda: by_position(shown, path("positions")))
    draws.append(lambda: by_context(shown, exact, path("memory")))
    return draws


def control_figures(group: Group, folder: Path) -> list[Draw]:
    """The bars of a group of controls."""
    path = folder / file_name(group.recipe, group.label, "bars")
    return [lambda: control_bars(group, path)] if any(s.kl > 0 for s in group.packed) else []


def _left_out(settings: Sequence[Setting]) -> str:
    if not settings:
        return ""
    parts = [f"{s.name} ({s.bits:.2f} bits, KL {small(s.kl)})" for s in settings]
    return f" Beyond the axes: {', '.join(parts)}."


def frontier(groups: Sequence[Group], path: Path, perplexity: bool) -> Figure:
    """Bits against KL or perplexity, of one group or of one per model."""
    left_out = plots.frontier(groups, path, perplexity)
    what = "perplexity above the exact cache" if perplexity else "KL to the exact cache"
    caption = (
        "Lower and further left is better. Each point is a setting; each line goes through the settings of lowest KL "
        "for their bits. Dashed uprights are the budgets. Bars are standard errors over rows, which hold what rows do "
        "to all settings alike: the comparisons in the text are paired."
    )
    if perplexity:
        caption += " The black line at 0 % is the exact cache; the axis is linear up to 1 % and logarithmic beyond."
    elif len(groups) == 1:
        caption += _lines_apart(groups[0])
    models = ", ".join(g.label for g in groups)
    return Figure(path, f"Bits at 4096 tokens against {what}: {models}", caption + _left_out(left_out))


def _lines_apart(group: Group) -> str:
    """Where the two lines stand at the budgets."""
    parts = []
    for budget in BUDGETS:
        ours, theirs = (
            best([s for s in group.both_sides if getattr(s, kind)], budget.most) for kind in ("is_headq", "is_baseline")
        )
        if ours and theirs:
            parts.append(f"{small(ours.kl)} and {small(theirs.kl)} at {budget.bits:g}")
    return f" The lines of headq_config and of the baselines stand at {'; '.join(parts)} bits." if parts else ""


def by_layer(settings: Sequence[Setting], path: Path) -> Figure:
    """Error by layer."""
    curves.layers(settings, path)
    caption = (
        "The error of each layer as attention sees it (log scales). Two settings can stand in another order in key "
        "error than in score error and attention KL: the queries decide which errors count."
    )
    for setting in settings:
        values = [v for v in (setting.data["layers"] or {}).get("attention_kl") or [] if v is not None]
        if values:
            worst = max(range(len(values)), key=values.__getitem__)
            caption += f" {setting.name} has its largest attention KL, {small(values[worst])}, in layer {worst}."
            break
    return Figure(path, "Errors of keys, scores, attention, values and output by layer", caption)


def by_position(settings: Sequence[Setting], path: Path) -> Figure:
    """KL by position."""
    curves.positions(settings, path)
    buckets = settings[0].score["kl_by_position"]
    caption = "Does the error grow as more of the history is packed? Means over rows in buckets of positions."
    if buckets:
        first, last = buckets[0], buckets[-1]
        caption += (
            f" {settings[0].name}: {small(first['kl'])} at positions {first['start']} to {first['stop'] - 1}, "
            f"{small(last['kl'])} at {last['start']} to {last['stop'] - 1}."
        )
    return Figure(path, "KL to the exact cache by position in the row", caption)


def by_context(settings: Sequence[Setting], exact: Mapping[int, float] | None, path: Path) -> Figure:
    """Memory by context."""
    curves.memory(settings, exact, path)
    caption = (
        "The whole cache of one sequence, sinks and window included, in bf16. At short contexts full-precision tokens "
        "weigh most."
    )
    first, longest = settings[0], max(settings[0].memory, default=None)
    if longest is not None:
        caption += f" {first.name}: {memory_words(first, exact, [longest])}."
    if exact is None:
        caption += " The exact cache of this model is not among the results, so it is not drawn."
    contexts = ", ".join(context(t) for t in first.memory)
    return Figure(path, f"Memory of one sequence's cache at {contexts} tokens", caption)


def control_bars(group: Group, path: Path) -> Figure:
    """KL of each control."""
    left_out = curves.bars(group, path)
    caption = "KL of each control on a log scale, the worst on top; lines at the ends are standard errors over rows."
    return Figure(path, f"KL of the controls: {group.label}", caption + _left_out(left_out))
