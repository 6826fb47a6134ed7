"""Measure the settings of a recipe: ``python recipes/run.py recipes/wikitext.yaml``."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from headq_ao.evals.harness import inputs
from headq_ao.evals.harness.environment import environment, write_json
from headq_ao.evals.harness.perturbations import perturbation_panel, plot_panel
from headq_ao.evals.harness.recipe import Recipe, Setting, add_arguments, asked
from headq_ao.evals.harness.scoring import exact_logprobs
from headq_ao.evals.harness.table import model_tables
from headq_ao.evals.metrics.score_error import score_error
from headq_ao.evals.perplexity import evaluate
from headq_ao.evals.report import write_report
from headq_ao.integrations.transformers.calibrate import Readers

HERE = Path(__file__).resolve().parent
BATCH = 4  # rows that go through the model together
MadeFor = tuple[int | None, Readers]  # the context that a calibration is made for, and the queries that it is made of
DEFAULT: MadeFor = (None, "all")

EPILOG = """\
examples:
  HEADQ_WIKITEXT=path/to/wikitext-2-raw python recipes/run.py recipes/wikitext.yaml
  python recipes/run.py recipes/frontier.yaml --wikitext path/to/wikitext-2-raw --only kv_default --only k_default
  python recipes/run.py recipes/frontier.yaml --list         what would run, without running it
  python recipes/run.py recipes/frontier.yaml --force        measure again what is already there
  python recipes/run.py recipes/frontier.yaml --again        measure again and compare with the files, changing none
  python recipes/run.py recipes/controls.yaml --report out   and draw the page of this recipe

Each setting is one file recipes/results/RECIPE/SETTING.json. A run that was cut off goes on where it stopped: a
setting is skipped when its file was made with the same model, protocol, calibration and options. Afterwards:
  python -m headq_ao.evals.results                   the tables of README.md and docs
  python -m headq_ao.evals.report            plots and the page of all recipes
"""


def made_for(setting: Setting) -> MadeFor:
    """Which calibration a setting uses."""
    return setting.context_length, setting.readers or "all"


class Bench:
    """A model with what all its settings share: rows, exact scores, calibration.

    Args:
        recipe: whose model it is.
        model: name.
        made_for: calibrations that are needed: their context, None: the default one, and the readers of keys and
            values whose queries they are made of.
    """

    def __init__(self, recipe: Recipe, model: str, made_for: Iterable[MadeFor], progress: bool) -> None:
        p = recipe.protocol
        torch.manual_seed(recipe.seed)
        self.recipe, self.name, self.progress = recipe, model, progress
        self.model, tokenizer = inputs.load(model, None, inputs.DTYPES[p["dtype"]])
        self.rows = inputs.token_rows(tokenizer, recipe.text, p["rows"], p["row_length"])
        text, tokens = recipe.calibration_text, p["calibration_tokens"]
        self.calibrations = {
            (context, readers): inputs.calibrate_on(self.model, tokenizer, text, tokens, progress, context, readers)
            for context, readers in dict.fromkeys(made_for)
        }
        self.exact: list[torch.Tensor] = []

    def measure(self, setting: Setting) -> dict[str, Any]:
        """The result of one setting."""
        p = self.recipe.protocol
        if not self.exact:
            self.exact = exact_logprobs(self.model, self.rows, p["prefill"], self.progress)
        chunk = setting.chunk or p["chunk"]
        subject = setting.subject(self.recipe.seed, self.calibrations.get(made_for(setting)))
        result = evaluate(
            self.model, self.rows, self.exact, subject,
            prefill=p["prefill"], chunk=chunk, batch_size=BATCH, progress=self.progress, label=setting.name,
        )  # fmt: skip
        layers = None
        if setting.layers:
            with subject.on(self.model) as make_cache:
                errors = score_error(
                    self.model, self.rows[:1], make_cache, prefill=p["prefill"], chunk=chunk, progress=self.progress
                )
            layers = errors.per_layer()
        head = {**self.recipe.labels(setting), "options": setting.options}
        key = self.recipe.key(setting, self.name)
        return {**head, **key, **result, "layers": layers, "environment": environment()}

    def panel(self, folder: Path) -> None:
        """The perturbation panel, as ``panel.json`` and ``panel.png``."""
        assert self.recipe.panel is not None
        rows = self.rows[: self.recipe.panel["rows"]]
        panel = perturbation_panel(
            self.model, rows, self.calibrations[DEFAULT], seed=self.recipe.seed, progress=self.progress
        )
        plot_panel(panel, folder / "panel.png")
        about = {"model": self.name, "protocol": self.recipe.protocol, "settings": self.recipe.panel}
        write_json(folder / "panel.json", {**about, "panel": panel, "environment": environment()})


def panel_finished(recipe: Recipe, folder: Path) -> bool:
    """Whether the panel there is of this recipe."""
    try:
        there = json.loads((folder / "panel.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return (there["model"], there["protocol"], there["settings"]) == (recipe.models[0], recipe.protocol, recipe.panel)


def run(recipe: Recipe, pending: Sequence[tuple[str, Setting]], panel: bool, folder: Path, progress: bool) -> None:
    """Measure ``pending`` settings model by model; a file is written as soon as its setting is done."""
    for model in recipe.models:
        settings = [setting for name, setting in pending if name == model]
        wants_panel = panel and model == recipe.models[0]
        if not settings and not wants_panel:
            continue
        wanted = [made_for(setting) for setting in settings if setting.calibration] + [DEFAULT] * wants_panel
        bench = Bench(recipe, model, wanted, progress)
        for setting in tqdm(settings, desc=f"{recipe.name} {model}", unit="setting", disable=not progress):
            write_json(folder / recipe.file(setting, model), bench.measure(setting))
        if wants_panel:
            bench.panel(folder)


def relabelled(recipe: Recipe, setting: Setting, path: Path) -> dict[str, Any]:
    """The result at ``path``, under the title and in the place that the recipe gives it now."""
    result = json.loads(path.read_text(encoding="utf-8"))
    new = recipe.labels(setting) | {name: x for name, x in result.items() if name not in recipe.labels(setting)}
    if new != result:
        write_json(path, new)
    return new


def compare(recipe: Recipe, wanted: Sequence[tuple[str, Setting]], folder: Path, progress: bool) -> int:
    """Measure again what is in ``folder`` and say how far the KL of each row differs; 1 when it is over 1 %."""
    there = [(model, setting, recipe.finished(setting, model, folder)) for model, setting in wanted]
    there = [entry for entry in there if entry[2] is not None]
    worst = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        run(recipe, [(model, setting) for model, setting, _ in there], False, Path(temporary), progress)
        for model, setting, first in there:
            again = recipe.finished(setting, model, Path(temporary))
            assert again is not None and first is not None
            pairs = zip(first["score"]["kl_by_row"], again["score"]["kl_by_row"], strict=True)
            off = max(abs(a - b) / max(abs(a), 1e-9) for a, b in pairs)
            worst = max(worst, off)
            means = f"{first['score']['mean_kl']:.6f} then {again['score']['mean_kl']:.6f}"
            print(f"{recipe.file(setting, model):40} mean KL {means}; worst row differs by {100 * off:.3f} %")
    print(f"{len(there)} settings measured twice; the KL of a row differs by {100 * worst:.3f} % at most")
    return int(worst > 0.01 or not there)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python recipes/run.py",
        description="Measure the settings of a recipe and keep one JSON file for each.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, "recipes/wikitext.yaml", HERE / "results")
    add = parser.add_argument
    add("--force", action="store_true", help="measure again what is already there")
    add("--again", action="store_true", help="measure again and compare with the files; exit with 1 above 1 %%")
    add("--list", action="store_true", help="say what is done and what would run, and stop")
    add("--report", type=Path, metavar="FOLDER", help="afterwards draw this recipe's plots and page there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    recipe = asked(parser, args)
    if recipe.runner is not None:
        parser.error(f"{args.recipe} is run by python -m {recipe.runner} {args.recipe}")
    unknown = sorted(set(args.only) - {setting.name for setting in recipe.settings})
    if unknown:
        parser.error(f"no setting {', '.join(unknown)}; there are {', '.join(s.name for s in recipe.settings)}")
    chosen = [s for s in recipe.settings if not args.only or s.name in args.only]
    wanted = [(model, setting) for model in recipe.models for setting in chosen]
    folder = args.results / recipe.name
    pending = [key for key in wanted if args.force or recipe.finished(key[1], key[0], folder) is None]
    panel = recipe.panel is not None and not args.only and (args.force or not panel_finished(recipe, folder))
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.list:
        print("\n".join(f"{'to run' if key in pending else 'done':7} {recipe.file(key[1], key[0])}" for key in wanted))
        return 0
    if args.again:
        return compare(recipe, wanted, folder, not args.no_progress)
    done = len(wanted) - len(pending)
    print(f"{recipe.name}: {len(pending)} of {len(wanted)} settings to run, {done} already there", flush=True)
    run(recipe, pending, panel, folder, not args.no_progress)
    results = [relabelled(recipe, setting, folder / recipe.file(setting, model)) for model, setting in wanted]
    print(model_tables(results))
    if args.report is not None:
        print(f"page: {write_report([folder], args.report)}")
    wrong = recipe.outside(results)
    if wrong:
        print("\n".join(["", "outside the expected range:", *wrong]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
