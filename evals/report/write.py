"""From results folders to plots and the page."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from headq_ao.evals.report.data import CONTROLS, Recipe
from headq_ao.evals.report.figures import Draw, Figure, control_figures, file_name, frontier, planned
from headq_ao.evals.report.page import PAGE, GroupKey, exact_memory, groups_by_model, render
from headq_ao.evals.report.plots import drawable
from headq_ao.evals.report.read import read_recipe, recipe_order
from headq_ao.files import atomic_path


def write_report(results_folders: Sequence[Path], out_folder: Path, *, progress: bool = True) -> Path:
    """Write ``report.html`` and its plots.

    Args:
        results_folders: one per recipe, such as ``recipes/results/wikitext``.
        out_folder: made when it is not there; files of the same names are replaced.
        progress: show a progress bar.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: when a folder holds no results.
        ValueError: on results of an older format, numbers that are not finite, protocols that differ within one
            recipe and model, or two folders of one name; the message names the files and what to do.
        ModuleNotFoundError: without matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("the report's plots need matplotlib: pip install 'headq_ao[plot]'")
    names = [folder.name for folder in results_folders]
    if not names:
        raise FileNotFoundError(
            "no results folder given; a report needs at least one, such as recipes/results/wikitext"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"each results folder must have a name of its own, {', '.join(twice)} is given twice")
    recipes = sorted((read_recipe(Path(folder)) for folder in results_folders), key=lambda r: recipe_order(r.name))
    out_folder = Path(out_folder)
    out_folder.mkdir(parents=True, exist_ok=True)
    figures, across = _draw(recipes, out_folder, progress)
    page = out_folder / PAGE
    with atomic_path(page) as temporary:
        Path(temporary).write_text(render(recipes, figures, across), encoding="utf-8")
    return page


def _draw(recipes: Sequence[Recipe], out: Path, progress: bool) -> tuple[dict[GroupKey, list[Figure]], list[Figure]]:
    """All figures: by recipe and model, and those across models."""
    exact, models = exact_memory(recipes), groups_by_model(recipes)
    plan: list[tuple[GroupKey | None, Draw]] = []
    for recipe in recipes:
        for group in recipe.groups:
            is_control = recipe.name == CONTROLS
            draws = control_figures(group, out) if is_control else planned(group, exact.get(group.model), out)
            plan += [((recipe.name, group.label), draw) for draw in draws]
    comparable = [g for g in models if drawable(g.both_sides, perplexity=False)]
    if len(comparable) > 1:
        path = out / file_name("across", "models", "kl")
        plan.append((None, lambda: frontier(comparable, path, perplexity=False)))
    figures: dict[GroupKey, list[Figure]] = {}
    across: list[Figure] = []
    for key, draw in tqdm(plan, desc="plots", unit="plot", disable=not progress):
        (across if key is None else figures.setdefault(key, [])).append(draw())
    return figures, across
