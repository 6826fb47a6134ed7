"""Run a recipe: ``python recipes/run.py --help``."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm

from headq_ao import Calibration, HeadQConfig, headq_config
from headq_ao.evals import inputs
from headq_ao.evals.environment import environment
from headq_ao.evals.perplexity import evaluate
from headq_ao.evals.scoring import exact_logprobs
from headq_ao.evals.table import results_table

HERE = Path(__file__).resolve().parent
SETTING_KEYS = ("name", "title", "headline", "calibration", "options", "expected_kl")

EPILOG = """\
examples:
  HEADQ_WIKITEXT=path/to/wikitext-2-raw python recipes/run.py recipes/core.yaml
  python recipes/run.py recipes/core.yaml --wikitext path/to/wikitext-2-raw --only kv_default --only k_default
  python recipes/run.py recipes/core.yaml --force        measure again what is already there
  python recipes/run.py recipes/core.yaml --list         what would run, without running it

Each setting is one file recipes/results/RECIPE/SETTING.json. A run that was cut off goes on where it stopped: a
setting is skipped when its file was made with the same model, protocol, calibration and config. Then update README.md
with: python -m headq_ao.evals.table
"""


@dataclass
class Setting:
    """One line of a recipe.

    Args:
        name: of the result file.
        title: of the table row.
        options: of ``headq_config``, possibly with ``preset``.
        calibrated: whether the recipe's calibration is used.
        headline: whether it is shown in the short table.
        expected_kl: range of the mean KL in nats, or None.
    """

    name: str
    title: str
    options: dict[str, Any]
    calibrated: bool
    headline: bool
    expected_kl: tuple[float, float] | None

    def config(self, seed: int, calibration: Calibration | None = None) -> HeadQConfig:
        """The full config."""
        config = headq_config(**{"seed": seed} | self.options)
        config.calibration = calibration if self.calibrated else None
        return config


@dataclass
class Recipe:
    """A recipe file; ``protocol`` is what results record, with the text files' names."""

    name: str
    model: str
    seed: int
    protocol: dict[str, Any]
    settings: list[Setting]
    text: Path
    calibration_text: Path

    @classmethod
    def read(cls, path: Path, wikitext: str | None) -> "Recipe":
        """Read and check a recipe, so that every error comes before the first run.

        Raises:
            FileNotFoundError: on a missing recipe or text.
            ValueError: on a missing or unknown key, an invalid option, or a name used twice.
        """
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        keys = {"name", "model", "dtype", "seed", "protocol", "calibration", "settings"}
        if set(data) != keys:
            raise ValueError(f"{path} must have the keys {', '.join(sorted(keys))}; differs in {set(data) ^ keys}")
        protocol, calibration = dict(data["protocol"]), data["calibration"]
        text = inputs.find_text(protocol.pop("text"), "report", wikitext)
        calibration_text = inputs.find_text(calibration["text"], "calibrate", wikitext)
        protocol = {
            "text": text.name,
            **{name: protocol[name] for name in ("rows", "row_length", "prefill", "chunk")},
            "calibration": calibration_text.name,
            "calibration_tokens": calibration["tokens"],
            "dtype": data["dtype"],
        }
        settings = [
            Setting(
                s["name"], s["title"], s["options"], s.get("calibration", True), s.get("headline", False), _range(s)
            )
            for s in data["settings"]
        ]
        names = [setting.name for setting in settings]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{path}: each setting needs a name of its own, {', '.join(twice)} is used twice")
        for setting in settings:
            try:
                setting.config(data["seed"])
            except ValueError as error:
                raise ValueError(f"{path}: setting {setting.name}: {error}") from error
        extra = {key for s in data["settings"] for key in s} - set(SETTING_KEYS)
        if extra:
            raise ValueError(f"{path}: unknown key {', '.join(sorted(extra))}; a setting has {', '.join(SETTING_KEYS)}")
        return cls(data["name"], data["model"], data["seed"], protocol, settings, text, calibration_text)

    def labels(self, setting: Setting) -> dict[str, Any]:
        """How a result is shown: name, title, place in the table."""
        return {
            "name": setting.name,
            "title": setting.title,
            "order": self.settings.index(setting),
            "headline": setting.headline,
        }

    def key(self, setting: Setting) -> dict[str, Any]:
        """What must be equal for a result to be taken as done."""
        config = inputs.describe(setting.config(self.seed)) | {"calibration": None}
        return {"model": self.model, "protocol": self.protocol, "calibrated": setting.calibrated, "config": config}


def _range(setting: dict[str, Any]) -> tuple[float, float] | None:
    low_high = setting.get("expected_kl")
    return None if low_high is None else (float(low_high[0]), float(low_high[1]))


def finished(recipe: Recipe, setting: Setting, path: Path) -> dict[str, Any] | None:
    """The result at ``path`` when it is of the same model, protocol, calibration and config."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        there = {name: result[name] for name in ("model", "protocol", "calibrated")}
        there["config"] = result["config"] | {"calibration": None}
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return None
    return result if there == recipe.key(setting) else None


def write(path: Path, result: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def relabelled(recipe: Recipe, setting: Setting, path: Path) -> dict[str, Any]:
    """The result at ``path``, under the title and in the place that the recipe gives it now."""
    result = json.loads(path.read_text(encoding="utf-8"))
    new = recipe.labels(setting) | {name: x for name, x in result.items() if name not in recipe.labels(setting)}
    if new != result:
        write(path, new)
    return new


def run(recipe: Recipe, settings: Sequence[Setting], folder: Path, progress: bool) -> None:
    """Measure settings against one exact reference; a file is written as soon as its setting is done."""
    p = recipe.protocol
    torch.manual_seed(recipe.seed)
    model, tokenizer = inputs.load(recipe.model, None, inputs.DTYPES[p["dtype"]])
    rows = inputs.token_rows(tokenizer, recipe.text, p["rows"], p["row_length"])
    calibration = None
    if any(setting.calibrated for setting in settings):
        calibration = inputs.calibrate_on(model, tokenizer, recipe.calibration_text, p["calibration_tokens"], progress)
    exact = exact_logprobs(model, rows, p["prefill"], progress)
    for setting in tqdm(settings, desc=recipe.name, unit="setting", disable=not progress):
        config = setting.config(recipe.seed, calibration)
        result = evaluate(
            model, rows, exact, config,
            prefill=p["prefill"], chunk=p["chunk"], progress=progress, label=setting.name,
        )  # fmt: skip
        head = {
            **recipe.labels(setting),
            "options": setting.options,
            "calibrated": setting.calibrated,
            "model": recipe.model,
            "protocol": p,
        }
        write(folder / f"{setting.name}.json", {**head, **result, "environment": environment()})


def outside(recipe: Recipe, results: Sequence[dict[str, Any]]) -> list[str]:
    """One line per result whose KL is not in the range that the recipe expects."""
    expected = {setting.name: setting.expected_kl for setting in recipe.settings}
    lines = []
    for result in results:
        low_high, kl = expected[result["name"]], result["score"]["mean_kl"]
        if low_high is not None and not low_high[0] <= kl <= low_high[1]:
            lines.append(f"{result['name']}: mean KL {kl:.5f}, expected {low_high[0]} to {low_high[1]}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python recipes/run.py",
        description="Measure the settings of a recipe and keep one JSON file for each.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, help="a YAML file such as recipes/core.yaml")
    parser.add_argument("--wikitext", metavar="FOLDER", help="with wiki.valid.raw and wiki.test.raw (HEADQ_WIKITEXT)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="these settings only; repeatable")
    parser.add_argument("--force", action="store_true", help="measure again what is already there")
    parser.add_argument("--list", action="store_true", help="say what is done and what would run, and stop")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder (recipes/results)")
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's default)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    try:
        recipe = Recipe.read(args.recipe, args.wikitext)
    except KeyError as error:
        parser.error(f"{args.recipe}: the key {error} is missing")
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    unknown = sorted(set(args.only) - {setting.name for setting in recipe.settings})
    if unknown:
        parser.error(f"no setting {', '.join(unknown)}; there are {', '.join(s.name for s in recipe.settings)}")
    wanted = [s for s in recipe.settings if not args.only or s.name in args.only]
    folder = args.results / recipe.name
    done = {s.name: None if args.force else finished(recipe, s, folder / f"{s.name}.json") for s in wanted}
    pending = [s for s in wanted if done[s.name] is None]
    if args.list:
        print("\n".join(f"{'to run' if done[s.name] is None else 'done':7} {s.name}" for s in wanted))
        return 0
    print(f"{recipe.name}: {len(pending)} of {len(wanted)} settings to run, {len(wanted) - len(pending)} already there")
    if args.threads:
        torch.set_num_threads(args.threads)
    if pending:
        run(recipe, pending, folder, not args.no_progress)
    results = [relabelled(recipe, s, folder / f"{s.name}.json") for s in wanted]
    print(results_table(results))
    wrong = outside(recipe, results)
    print("\n".join(["", "outside the expected range:", *wrong]) if wrong else "", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
