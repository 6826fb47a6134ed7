"""Recipe files: the settings that ``recipes/run.py`` measures, checked before the first run."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from headq_ao import Calibration
from headq_ao.evals.harness import inputs
from headq_ao.evals.harness.environment import write_json
from headq_ao.evals.harness.subjects import Subject
from headq_ao.integrations.transformers.calibrate import Readers

RECIPE_KEYS = {"name", "model", "dtype", "seed", "protocol", "calibration", "settings"}
OPTIONAL_KEYS = {"panel", "runner"}
PROTOCOL_KEYS = ("rows", "row_length", "prefill", "chunk")


@dataclass
class Setting:
    """One line of a recipe.

    Args:
        name: of the result file.
        title: of the table row.
        method: of :class:`headq_ao.evals.harness.subjects.Subject`.
        options: of the method; for HeadQ those of ``headq_config``, possibly with ``preset``.
        family: settings that are drawn alike.
        calibration: whether the recipe's calibration is used.
        headline: whether it is shown in the short table.
        layers: whether errors are measured per layer too.
        chunk: tokens per call, where it is not the recipe's.
        context_length: that the calibration is made for, where it is not the default of ``calibrate``.
        readers: of keys and values whose queries it is made of, ``"own"`` where it is not the default.
        expected_kl: range of the mean KL in nats, or None.
    """

    name: str
    title: str
    options: dict[str, Any]
    method: str = "headq"
    family: str = "HeadQ"
    calibration: bool = True
    headline: bool = False
    layers: bool = False
    chunk: int | None = None
    context_length: int | None = None
    readers: Readers | None = None
    expected_kl: tuple[float, float] | None = None

    def subject(self, seed: int, calibration: Calibration | None = None) -> Subject:
        """What is scored."""
        return Subject(self.method, self.options, calibration if self.calibration else None, seed)


SETTING_KEYS = tuple(Setting.__dataclass_fields__)


@dataclass
class Recipe:
    """A recipe file; ``protocol`` is what results record, with the text files' names.

    ``panel`` says on how many rows of the first model the perturbation panel is made, or None. ``runner`` names the
    module that measures it, None: ``recipes/run.py``.
    """

    name: str
    models: list[str]
    seed: int
    protocol: dict[str, Any]
    settings: list[Setting]
    text: Path
    calibration_text: Path
    panel: dict[str, Any] | None = None
    runner: str | None = None

    @classmethod
    def read(cls, path: Path, wikitext: str | None) -> "Recipe":
        """Read and check a recipe, so that every error comes before the first run.

        Raises:
            FileNotFoundError: on a missing recipe or text.
            ValueError: on a missing or unknown key, an invalid option, or a name used twice.
        """
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not RECIPE_KEYS <= set(data) <= RECIPE_KEYS | OPTIONAL_KEYS:
            raise ValueError(
                f"{path} must have the keys {', '.join(sorted(RECIPE_KEYS))} and may have "
                f"{', '.join(sorted(OPTIONAL_KEYS))}; differs in {set(data) ^ RECIPE_KEYS - OPTIONAL_KEYS}"
            )
        protocol, calibration = dict(data["protocol"]), data["calibration"]
        text = inputs.find_text(protocol.pop("text"), "report", wikitext)
        calibration_text = inputs.find_text(calibration["text"], "calibrate", wikitext)
        protocol = {
            "text": text.name,
            **{name: protocol[name] for name in PROTOCOL_KEYS},
            "calibration": calibration_text.name,
            "calibration_tokens": calibration["tokens"],
            "dtype": data["dtype"],
        }
        settings = [_setting(path, entry, data["seed"]) for entry in data["settings"]]
        names = [setting.name for setting in settings]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{path}: each setting needs a name of its own, {', '.join(twice)} is used twice")
        panel = data.get("panel")
        if panel is not None and (set(panel) != {"rows"} or not 1 <= panel["rows"] <= protocol["rows"]):
            raise ValueError(f"{path}: panel must be {{rows: N}} with N of the protocol's rows, got {panel}")
        models = data["model"] if isinstance(data["model"], list) else [data["model"]]
        return cls(
            data["name"], models, data["seed"], protocol, settings, text, calibration_text, panel, data.get("runner")
        )

    def file(self, setting: Setting, model: str) -> str:
        """The name of a result file."""
        return f"{setting.name}.json" if len(self.models) == 1 else f"{model}.{setting.name}.json"

    def labels(self, setting: Setting) -> dict[str, Any]:
        """How a result is shown: name, title, family, place in the table."""
        return {
            "name": setting.name,
            "title": setting.title,
            "family": setting.family,
            "order": self.settings.index(setting),
            "headline": setting.headline,
        }

    def key(self, setting: Setting, model: str) -> dict[str, Any]:
        """What must be equal for a result to be taken as done."""
        subject = setting.subject(self.seed)
        config = subject.cache_config()
        config = config and config | {"calibration": None}
        own: dict[str, Any] = {"chunk": setting.chunk, "calibration_context": setting.context_length}
        own["calibration_readers"] = setting.readers
        protocol = self.protocol | {name: x for name, x in own.items() if x is not None}
        return {
            "model": model,
            "protocol": protocol,
            "calibrated": setting.calibration,
            "method": subject.describe(),
            "config": config,
        }

    def finished(self, setting: Setting, model: str, folder: Path) -> dict[str, Any] | None:
        """The result in ``folder`` when it is of the same model, protocol, calibration, method and config."""
        try:
            result = json.loads((folder / self.file(setting, model)).read_text(encoding="utf-8"))
            there = {name: result[name] for name in ("model", "protocol", "calibrated", "method", "config")}
            there["config"] = there["config"] and _given(there["config"] | {"calibration": None})
            complete = bool(result.get("layers")) or not setting.layers
        except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
            return None
        wanted = self.key(setting, model)
        wanted["config"] = wanted["config"] and _given(wanted["config"])
        return result if complete and there == wanted else None

    def outside(self, results: list[dict[str, Any]]) -> list[str]:
        """One line per result whose KL is not in the range that the recipe expects."""
        expected = {setting.name: setting.expected_kl for setting in self.settings}
        lines = []
        for result in results:
            scored = result.get("score") or result.get("greedy", {"tokens": result})["tokens"]
            low_high, kl = expected[result["name"]], scored["mean_kl"]
            if low_high is not None and not low_high[0] <= kl <= low_high[1]:
                lines.append(f"{result['name']}: mean KL {kl:.5f}, expected {low_high[0]} to {low_high[1]}")
        return lines


def add_arguments(parser: argparse.ArgumentParser, example: str, results: Path) -> None:
    """What every command asks that measures a recipe."""
    add = parser.add_argument
    add("recipe", type=Path, help=f"a YAML file such as {example}")
    add("--wikitext", metavar="FOLDER", help="with wiki.valid.raw and wiki.test.raw (HEADQ_WIKITEXT)")
    add("--only", action="append", default=[], metavar="NAME", help="these settings only; repeatable")
    add("--results", type=Path, default=results, help="folder (recipes/results)")
    add("--threads", type=int, help="CPU threads (PyTorch's default)")
    add("--no-progress", action="store_true", help="no progress bars")


def asked(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Recipe:
    """The recipe that a command line names; what is wrong with it ends the command."""
    try:
        return Recipe.read(args.recipe, args.wikitext)
    except KeyError as error:
        parser.error(f"{args.recipe}: the key {error} is missing")
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def run_settings(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, make_bench: Callable[[Recipe, bool], Any],
    table: Callable[[Sequence[dict[str, Any]]], str],
) -> None:  # fmt: skip
    """The command of a recipe's ``runner``: measure the settings asked for, store each as it ends, and print a table.

    Args:
        parser: with what :func:`add_arguments` adds.
        argv: of the command line.
        make_bench: what all settings share, of the recipe and of whether to show progress; its ``measure`` gives the
            result of a setting.
        table: results as text.
    """
    args = parser.parse_args(argv)
    recipe = asked(parser, args)
    chosen = [s for s in recipe.settings if not args.only or s.name in args.only]
    if not chosen:
        parser.error(f"no such setting; there are {', '.join(s.name for s in recipe.settings)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    bench, results = make_bench(recipe, not args.no_progress), list[dict[str, Any]]()
    for setting in chosen:
        results.append(bench.measure(setting))
        write_json(args.results / recipe.name / recipe.file(setting, recipe.models[0]), results[-1])
    print(table(results))


def _given(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what is left open: an option that came later changes no older result."""
    return {name: value for name, value in config.items() if value is not None}


def _setting(path: Path, entry: dict[str, Any], seed: int) -> Setting:
    extra = set(entry) - set(SETTING_KEYS)
    if extra:
        raise ValueError(f"{path}: unknown key {', '.join(sorted(extra))}; a setting has {', '.join(SETTING_KEYS)}")
    missing = [name for name in ("name", "title", "options") if name not in entry]
    if missing:
        raise ValueError(f"{path}: a setting has no {', '.join(missing)}: {entry}")
    setting = Setting(**entry)
    if setting.expected_kl is not None:
        low, high = setting.expected_kl
        setting.expected_kl = (float(low), float(high))
    try:
        setting.subject(seed)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: setting {setting.name}: {error}") from error
    return setting
