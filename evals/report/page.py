"""The report's page: results as plain texts for the template, and the template filled in."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from headq_ao.evals.harness.table import number
from headq_ao.evals.report import text
from headq_ao.evals.report.cards import across_models, choice_card, compared_chunks, summary
from headq_ao.evals.report.choice import choose
from headq_ao.evals.report.data import CONTROLS, Group, Recipe, Setting
from headq_ao.evals.report.figures import Figure
from headq_ao.evals.report.panel import Table, panel_tables, single_panels

TEMPLATES = Path(__file__).parent / "templates"
PAGE = "report.html"
DECIDING = "frontier"
COLUMNS = (
    *(
        "setting",
        "family",
        "packed",
        "bits K / V",
        "at 1k",
        "at 4k",
        "at 16k",
        "full-precision tokens",
        "tokens read packed",
    ),
    *("KL (nats)", "perplexity", "ratio", "flips"),
)

GroupKey = tuple[str, str]


def deciding_group(recipes: Sequence[Recipe]) -> Group | None:
    """The group that a setting is chosen by: the recipe ``frontier``, else most settings to choose from."""
    groups = [g for r in recipes if r.name != CONTROLS for g in r.groups]

    def candidates(group: Group) -> int:
        return sum(s.is_headq for s in group.both_sides)

    chosen = max(groups, key=lambda g: (g.recipe == DECIDING and candidates(g) > 0, candidates(g)), default=None)
    return chosen if chosen is not None and candidates(chosen) else None


def groups_by_model(recipes: Sequence[Recipe]) -> list[Group]:
    """For each model the group of most settings that pack both sides, controls left out."""
    best: dict[str, Group] = {}
    for recipe in recipes:
        for group in recipe.groups if recipe.name != CONTROLS else ():
            if len(group.both_sides) > len(best[group.model].both_sides if group.model in best else ()):
                best[group.model] = group
    return list(best.values())


def exact_memory(recipes: Sequence[Recipe]) -> dict[str, dict[int, float]]:
    """Bytes of each model's exact cache by tokens, where a recipe has one."""
    settings = [s for r in recipes for g in r.groups for s in g.settings]
    return {s.data["model"]: s.memory for s in reversed(settings) if s.kind == "exact"}


def embedded(path: Path) -> str:
    """A PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def setting_row(setting: Setting) -> dict[str, Any]:
    """A row of the table of all settings: texts, what they sort by, and how the setting was made."""
    score, at = setting.score, [setting.bits_at(t) for t in (1024, 4096, 16384)]
    body = setting.data["bits"].get("body")
    rows = score["report"].get("exact_rows")
    packed = score["packed_fraction"] if setting.sides != "none" else None
    return {
        "name": setting.name,
        "title": setting.title,
        "options": text.options_text(setting),
        "family": setting.family,
        "sides": setting.sides,
        "numbers": [
            (text.body_bits(setting), body),
            *((number(bits), bits) for bits in at),
            (text.exact_rows(setting), rows),
            ("–" if packed is None else text.percent(packed, 0), packed),
            (text.kl_text(setting), setting.kl),
            (text.perplexity_text(setting), score["perplexity"]),
            (text.ratio_text(setting), score["ppl_ratio"]),
            (text.percent(score["flips"]), score["flips"]),
        ],
        "made": made(setting),
    }


def made(setting: Setting) -> list[tuple[str, str]]:
    """Command, versions, device, threads, commit and date of a result."""
    e, p = setting.data["environment"], setting.data["protocol"]
    git = e.get("git") or {}
    commit = "–" if not git else git["commit"] + (" and changes not committed" if git.get("dirty") else "")
    device = e.get("device", "–") if e.get("device") != "cpu" else f"cpu, {e.get('cpu', '–')}"
    return [
        ("command", str(e.get("command", "–"))),
        ("protocol", ", ".join(f"{key} {value}" for key, value in p.items())),
        ("calibration", "the recipe's" if setting.data["calibrated"] else "none"),
        ("config", text.arguments(setting.data["config"] or {}) or "–"),
        ("versions", ", ".join(f"{name} {version}" for name, version in e.get("versions", {}).items())),
        ("device", f"{device}; {e.get('threads', '–')} threads"),
        ("commit", commit),
        ("date", str(e.get("date", "–"))),
    ]


def environment_words(settings: Sequence[Setting]) -> str:
    """Where and when a group was measured, in a sentence."""

    def each(*path: str) -> str:
        values = []
        for setting in settings:
            value: Any = setting.data["environment"]
            for key in path:
                value = (value or {}).get(key)
            values += [] if value is None else [str(value)]
        return ", ".join(dict.fromkeys(values)) or "unknown"

    dates = sorted(str(s.data["environment"].get("date", ""))[:10] for s in settings)
    days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    commits = ", ".join(c[:10] for c in each("git", "commit").split(", "))
    return (
        f"Measured {days} on {each('device')} ({each('cpu')}), threads: {each('threads')}; "
        f"torch {each('versions', 'torch')}, headq_ao {each('versions', 'headq_ao')}, commit {commits}."
    )


def headline_table(group: Group) -> Table:
    """The settings that a recipe puts first, with perplexities."""
    shown = [s for s in group.settings if s.data["headline"] or s.kind == "exact"]
    rows = [
        [
            *(s.title, text.body_bits(s), number(s.bits_at(4096)), text.perplexity_text(s), text.ratio_text(s)),
            *(text.kl_text(s), text.percent(s.score["flips"])),
        ]
        for s in shown
    ]
    header = ("cache", "bits K / V", "at 4k", "perplexity", "ratio", "KL (nats)", "flips")
    return Table("Headline settings; ± is the standard error over rows", header, rows)


def render(recipes: Sequence[Recipe], figures: Mapping[GroupKey, Sequence[Figure]], across: Sequence[Figure]) -> str:
    """The page.

    Args:
        recipes: in the order of their sections.
        figures: by recipe and the label of the group.
        across: of all models.
    """
    exact, deciding, models = exact_memory(recipes), deciding_group(recipes), groups_by_model(recipes)
    choices = [] if deciding is None else choose(deciding)
    whole = None if deciding is None else exact.get(deciding.model)
    sections = [
        {
            "name": recipe.name,
            "groups": [
                {
                    "label": group.label,
                    "protocol": text.protocol_words(group),
                    "environment": environment_words(group.settings),
                    "headline": headline_table(group) if any(s.data["headline"] for s in group.settings) else None,
                    "rows": [setting_row(s) for s in group.settings],
                    "figures": figures.get((recipe.name, group.label), ()),
                }
                for group in recipe.groups
            ],
            "chunks": compared_chunks(recipe.groups),
            "panels": [{"name": name, "tables": panel_tables(panel)} for name, panel in single_panels(recipe.panels)],
            "panel_images": recipe.panel_images,
        }
        for recipe in recipes
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(PAGE).render(
        deciding=deciding,
        protocol="" if deciding is None else text.protocol_words(deciding),
        environment="" if deciding is None else environment_words(deciding.settings),
        summary=summary(choices, whole),
        cards=[choice_card(c, deciding, recipes, whole) for c in choices if deciding is not None],
        across_figures=across,
        across_table=across_models(models) if len(models) > 1 else None,
        sections=sections,
        columns=COLUMNS,
        embedded=embedded,
        calibration_file=text.CALIBRATION_FILE,
    )
