"""Result files of recipes/run.py, read and checked for the report."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from headq_ao.evals.report.data import CONTROLS, OWN, REPORT_TOKENS, Group, Recipe, Setting

PANEL = "panel"
FIRST_RECIPES = ("wikitext", "frontier")

NUMBERS = (
    "score.mean_kl",
    "score.perplexity",
    "score.exact_perplexity",
    "score.ppl_ratio",
    "score.flips",
    "score.packed_fraction",
)
REQUIRED = (
    *("name", "title", "order", "headline", "family", "method.kind", "method.name", "method.options", "calibrated"),
    *("model", "protocol.chunk", "config", "bits.at", "memory_bytes", "layers", "environment"),
    *("score.mean_kl_sem", "score.kl_by_row", "score.kl_by_position", "score.ppl_ratio_sem", "score.report"),
    *NUMBERS,
)
KINDS = ("headq", "baseline", "transformers", "exact")


def recipe_order(name: str) -> tuple[int, str]:
    """Sort key: wikitext, frontier, the others by name, controls."""
    if name in FIRST_RECIPES:
        return FIRST_RECIPES.index(name), name
    return len(FIRST_RECIPES) + (name == CONTROLS), name


def remake(recipe: str) -> str:
    """The command that makes a recipe's results again."""
    return f"python recipes/run.py recipes/{recipe}.yaml --force"


def _get(data: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        data = data[key]
    return data


def _has(data: Any, dotted: str) -> bool:
    try:
        _get(data, dotted)
    except (KeyError, TypeError):
        return False
    return True


def not_finite(data: Any, name: str) -> Iterator[str]:
    """Dotted names of the NaNs and infinities in plain data."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from not_finite(value, f"{name}.{key}")
    elif isinstance(data, Sequence) and not isinstance(data, str):
        for i, value in enumerate(data):
            yield from not_finite(value, f"{name}[{i}]")
    elif isinstance(data, float) and not math.isfinite(data):
        yield name


def check(data: Any, recipe: str, file_name: str) -> Setting:
    """A setting of the present format, with finite numbers.

    Raises:
        ValueError: naming the file, what it lacks and the command that makes it again.
    """
    file, again = f"{recipe}/{file_name}", f"make it again with: {remake(recipe)}"
    if not isinstance(data, dict) or "score" not in data:
        raise ValueError(f"{file} must be a result of recipes/run.py, an object with a score; {again}")
    if "bits" not in data:
        raise ValueError(f"{file} has no bits: it is of an older format; {again}")
    missing = [key for key in REQUIRED if not _has(data, key)]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}; {again}")
    if data["method"]["kind"] not in KINDS:
        raise ValueError(f"{file}: method.kind must be one of {', '.join(KINDS)}, got {data['method']['kind']!r}")
    score = {key: value for key, value in data["score"].items() if key != "report"}
    checked = {"score": score, "bits": data["bits"], "memory_bytes": data["memory_bytes"], "layers": data["layers"]}
    bad = [found for key, value in checked.items() for found in not_finite(value, key)]
    if bad:
        raise ValueError(f"{file}: all numbers must be finite, {', '.join(bad[:4])} is not; {again}")
    bad = [key for key in NUMBERS if not isinstance(_get(data, key), (int, float))]
    setting = Setting(recipe, data)
    if setting.sides != "none" and setting.bits_at(REPORT_TOKENS) is None:
        bad.append(f"bits.at.{REPORT_TOKENS}")
    if bad:
        raise ValueError(f"{file}: {', '.join(bad)} must be a number; {again}")
    return setting


def group_by_model(recipe: str, settings: Sequence[Setting]) -> tuple[Group, ...]:
    """One group per model, and per chunk length where a recipe has several, in the recipe's order.

    Raises:
        ValueError: when protocols of one model differ in more than :data:`OWN`.
    """
    groups = []
    for model in dict.fromkeys(s.data["model"] for s in settings):
        members = [s for s in settings if s.data["model"] == model]
        first = members[0]
        for other in members[1:]:
            one, two = first.data["protocol"], other.data["protocol"]
            keys = sorted(key for key in {*one, *two} - {*OWN} if one.get(key) != two.get(key))
            if keys:
                differ = ", ".join(f"{key} {one.get(key)!r} and {two.get(key)!r}" for key in keys)
                raise ValueError(
                    f"settings of one frontier must share a protocol; in {recipe}, {first.name} and {other.name} "
                    f"have {differ}: make them again with {remake(recipe)}, or give them a recipe of their own"
                )
        chunks = list(dict.fromkeys(s.data["protocol"]["chunk"] for s in members))
        for chunk in chunks:
            same = tuple(s for s in members if s.data["protocol"]["chunk"] == chunk)
            groups.append(Group(recipe, model, same, f"{model}, chunk {chunk}" if len(chunks) > 1 else model))
    return tuple(groups)


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        ValueError: naming the file when it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.parent.name}/{path.name} is not JSON ({error}); delete it or make it again") from error


def read_recipe(folder: Path) -> Recipe:
    """Read one results folder.

    Raises:
        FileNotFoundError: when it holds no result and no panel.
        ValueError: see :func:`check` and :func:`group_by_model`.
    """
    files = sorted(folder.glob("*.json"))
    panels = {path.stem: read_json(path) for path in files if path.stem.startswith(PANEL)}
    settings = [check(read_json(path), folder.name, path.name) for path in files if not path.stem.startswith(PANEL)]
    if not files:
        raise FileNotFoundError(
            f"no results in {folder}; make them with: python recipes/run.py recipes/{folder.name}.yaml"
        )
    settings.sort(key=lambda s: (s.data["order"], s.name))
    images = tuple(sorted(folder.glob(f"{PANEL}*.png")))
    return Recipe(folder.name, group_by_model(folder.name, settings), panels, images)


def find_folders(results: Path, names: Sequence[str] = ()) -> list[Path]:
    """The named recipes' folders, or all of ``results`` that hold scored settings or a panel.

    Raises:
        FileNotFoundError: when there is none, or none of that name.
    """
    if names:
        lacking = [name for name in names if not (results / name).is_dir()]
        if lacking:
            there = ", ".join(sorted(p.name for p in results.glob("*") if p.is_dir())) or "none"
            raise FileNotFoundError(f"{results} has no results of {', '.join(lacking)}; there are: {there}")
        return [results / name for name in names]
    found = [
        folder
        for folder in sorted(results.glob("*"))
        if any(path.stem.startswith(PANEL) or _has(read_json(path), "score") for path in folder.glob("*.json"))
    ]
    if not found:
        raise FileNotFoundError(
            f"no results under {results}; make some with: python recipes/run.py recipes/RECIPE.yaml"
        )
    return found
