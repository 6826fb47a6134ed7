"""What the page says for each bit budget: the pick, what it costs, and what stands beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

from headq_ao.evals.harness.table import number
from headq_ao.evals.report import text
from headq_ao.evals.report.choice import BUDGETS, SIDE_CODE, Choice, choose
from headq_ao.evals.report.data import CONTROLS, Group, Recipe, Setting
from headq_ao.evals.report.panel import Table


def rivals(choice: Choice, pick: Setting) -> Table:
    """The pick beside what else one could take for the budget."""
    plain = pick.family != SIDE_CODE
    roles = [
        ("the pick", pick),
        (f"within {choice.budget.most:.2f} bits", choice.within),
        ("with a side code" if plain else "without a side code", choice.other_code),
        ("without a calibration", choice.uncalibrated),
        ("best baseline", choice.baseline),
    ]
    rows = [
        [
            f"{role}: {s.name}",
            number(s.bits),
            text.kl_text(s),
            "1" if s is pick else text.kl_ratio_text(s, pick),
            text.ratio_text(s),
            text.percent(s.score["flips"]),
            text.exact_rows(s),
        ]
        for role, s in roles
        if s is not None
    ]
    header = (
        "setting",
        "bits at 4096",
        "KL (nats)",
        "KL over the pick's",
        "perplexity ratio",
        "flips",
        "full-precision tokens",
    )
    return Table("Beside it (KL ratios: ± over rows, paired)", header, rows)


def choice_card(choice: Choice, group: Group, recipes: Sequence[Recipe], exact: Mapping[int, float] | None) -> Any:
    """What the page says for one budget."""
    budget, pick = choice.budget, choice.pick
    card: dict[str, Any] = {"budget": f"{budget.bits:g}", "pick": None, "baseline": text.baseline_words(choice)}
    if pick is None:
        return card | {"words": [text.no_pick_words(choice, group), card["baseline"]]}
    words = [text.cost_words(pick, exact), card["baseline"], text.near_words(choice)]
    if pick.bits > budget.most:
        within = f": {choice.within.name} has KL {text.kl_text(choice.within)}" if choice.within else " of headq_config"
        words.insert(0, f"It takes {pick.bits - budget.bits:.2f} bits more than asked. Best within the budget{within}.")
    elsewhere = [
        f"{g.recipe} ({g.protocol['rows']} rows, chunk {g.protocol['chunk']}): KL {text.kl_text(other)}, "
        f"perplexity {text.perplexity_text(other)}, ratio {text.ratio_text(other)}"
        for recipe in recipes
        if recipe.name not in (group.recipe, CONTROLS)
        for g in recipe.groups
        for other in g.settings
        if other.same_as == pick.same_as
    ]
    if elsewhere:
        words.append(f"The same setting in other recipes: {'; '.join(elsewhere)}.")
    return card | {
        "pick": {"name": pick.name, "title": pick.title, "bits": number(pick.bits), "call": text.call(pick)},
        "words": [w for w in words if w],
        "table": rivals(choice, pick),
    }


def summary(choices: Sequence[Choice], exact: Mapping[int, float] | None) -> Table:
    """One row per budget."""
    rows = []
    for choice in choices:
        pick, baseline, budget = choice.pick, choice.baseline, f"{choice.budget.bits:g}"
        if pick is None:
            rows.append([budget, "none fits", *["–"] * 7])
            continue
        memory = []
        for t in (4096, 16384):
            held, whole = pick.memory.get(t), (exact or {}).get(t)
            times = "" if held is None or whole is None else f" ({whole / held:.1f}×)"
            memory.append("–" if held is None else text.size(held) + times)
        rows.append(
            [
                *(budget, pick.name, number(pick.bits), text.kl_text(pick), text.ratio_text(pick)),
                *(text.percent(pick.score["flips"]), *memory),
                "–" if baseline is None else text.kl_ratio_text(pick, baseline),
            ]
        )
    header = (
        *("budget, bits", "setting", "bits at 4096", "KL (nats)", "perplexity ratio", "flips"),
        *("cache at 4k", "cache at 16k", "KL over best baseline's"),
    )
    caption = "One setting per budget; keys and values packed. In brackets: times smaller than exact in bf16."
    return Table(caption, header, rows, text_columns=(1,))


def compared_chunks(groups: Sequence[Group]) -> Table | None:
    """Settings that a recipe measured at several chunk lengths on the same rows, against the first of them."""
    rows = []
    for i, group in enumerate(groups):
        first = next(g for g in groups if g.model == group.model)
        for setting in group.settings if groups.index(first) < i else ():
            for other in first.settings:
                if other.same_as == setting.same_as:
                    chunks = [number(g.protocol["chunk"], 0) for g in (first, group)]
                    name = f"{group.model}: {other.name} / {setting.name}"
                    kls = (text.kl_text(other), text.kl_text(setting), text.kl_ratio_text(setting, other))
                    rows.append([name, *chunks, *kls])
    header = ("A / B", "chunk A", "chunk B", "KL A", "KL B", "KL B over A")
    return Table("Chunk lengths on the same rows (± over rows, paired)", header, rows) if rows else None


def across_models(groups: Sequence[Group]) -> Table:
    """The pick of each budget on each model."""
    rows = []
    for group in groups:
        for choice in choose(group, BUDGETS):
            pick, baseline = choice.pick, choice.baseline
            name = f"{group.model} at {choice.budget.bits:g} bits"
            if pick is None:
                rows.append([name, "none fits", *["–"] * 5])
                continue
            against = ("–", "–") if baseline is None else (baseline.name, text.kl_ratio_text(pick, baseline))
            numbers = (number(pick.bits), text.kl_text(pick), text.ratio_text(pick))
            rows.append([name, pick.name, *numbers, *against])
    header = ("model, budget", "pick", "bits at 4096", "KL (nats)", "perplexity ratio", "best baseline", "KL over it")
    return Table("Does the choice hold on other models?", header, rows, text_columns=(1, 5))
