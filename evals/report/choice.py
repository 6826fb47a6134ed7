"""Which setting to pick at a bit budget, and how sure the rows make one of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from headq_ao.evals.report.data import OWN, Group, Setting

SIDE_CODE = "HeadQ, side code"
BASELINE_SLACK = 0.1


@dataclass(frozen=True)
class Budget:
    """Bits per element at 4096 tokens that a cache may take.

    Args:
        bits: the nominal budget.
        tolerance: above it, for what a sequence stores beside its rows.
        stretch: above it, for a setting that is better than all within the tolerance.
    """

    bits: float
    tolerance: float = 0.05
    stretch: float = 0.0

    @property
    def most(self) -> float:
        return self.bits + self.tolerance


BUDGETS = (Budget(2.25), Budget(2.5), Budget(3), Budget(4, stretch=0.30))


@dataclass(frozen=True)
class Choice:
    """The setting for a budget and what it is compared with; all of them pack keys and values.

    Args:
        budget: what was asked for.
        pick: HeadQ setting of lowest mean KL, or None where none fits.
        within: the best within the tolerance, where the pick needs the budget's stretch.
        other_code: the best within the same bits without a side code, or with one where the pick has none.
        uncalibrated: the best within the same bits without a calibration, where the pick has one.
        baseline: the best baseline of at most budget + 0.1 bits, or of the pick's bits + tolerance where that is more.
        near: HeadQ settings within the same bits that the rows do not tell from the pick.
    """

    budget: Budget
    pick: Setting | None = None
    within: Setting | None = None
    other_code: Setting | None = None
    uncalibrated: Setting | None = None
    baseline: Setting | None = None
    near: tuple[Setting, ...] = ()


def paired_ratio(a: Setting, b: Setting) -> tuple[float, float | None] | None:
    """Mean KL of ``a`` over that of ``b``, with the standard error that pairing their rows gives.

    With ``a_i``, ``b_i`` the mean KL of row i of n, ``r = Σa_i / Σb_i`` and, by the delta method,
    ``sem(r) = sqrt(Σ(a_i − r b_i)² / (n (n − 1))) / mean(b)``: what a row adds to both cancels.

    Returns:
        ratio and standard error, None for the error where the two do not share their rows or have but one;
        None where ``b`` has no KL to divide by.

    Example:
        >>> from headq_ao.evals.report.choice import paired_ratio
        >>> from headq_ao.evals.report.data import Setting
        >>> half, whole = ({"score": {"mean_kl": m * 2, "kl_by_row": [m, 3 * m]}} for m in (0.1, 0.2))
        >>> common = {"model": "m", "protocol": {"rows": 2}}
        >>> paired_ratio(Setting("recipe", half | common), Setting("recipe", whole | common))
        (0.5, 0.0)
    """
    if b.kl <= 0:
        return None
    rows_a, rows_b = a.score["kl_by_row"], b.score["kl_by_row"]
    n = len(rows_a)
    text_a, text_b = ({**s.data["protocol"], **dict.fromkeys(OWN), "model": s.data["model"]} for s in (a, b))
    paired = n == len(rows_b) and text_a == text_b
    if not paired or n < 2:
        return a.kl / b.kl, None
    ratio = sum(rows_a) / sum(rows_b)
    variance = sum((x - ratio * y) ** 2 for x, y in zip(rows_a, rows_b, strict=True)) / (n * (n - 1))
    return ratio, math.sqrt(variance) * n / sum(rows_b)


def told_apart(a: Setting, b: Setting) -> bool | None:
    """Whether the paired ratio of KLs differs from 1 by two standard errors; None where rows cannot tell."""
    ratio = paired_ratio(a, b)
    if ratio is None or ratio[1] is None:
        return None
    return abs(ratio[0] - 1) > 2 * ratio[1]


def best(settings: Sequence[Setting], most_bits: float = math.inf) -> Setting | None:
    """The setting of lowest KL within a number of bits; fewer bits where two are equal."""
    fitting = [s for s in settings if s.bits <= most_bits]
    return min(fitting, key=lambda s: (s.kl, s.bits), default=None)


def pareto(settings: Sequence[Setting]) -> list[Setting]:
    """Settings that no other one beats in both bits and KL, by growing bits."""
    front: list[Setting] = []
    for setting in sorted(settings, key=lambda s: (s.bits, s.kl)):
        if not front or setting.kl < front[-1].kl:
            front.append(setting)
    return front


def choose(group: Group, budgets: Sequence[Budget] = BUDGETS) -> list[Choice]:
    """The setting for each budget, from the settings that pack both sides."""
    headq = [s for s in group.both_sides if s.is_headq]
    baselines = [s for s in group.both_sides if s.is_baseline]
    choices = []
    for budget in budgets:
        pick = best(headq, max(budget.most, budget.bits + budget.stretch))
        room = budget.bits + BASELINE_SLACK
        baseline = best(baselines, room if pick is None else max(room, pick.bits + budget.tolerance))
        choice = Choice(budget, pick, baseline=baseline)
        choices.append(choice if pick is None else _with_rivals(choice, pick, headq))
    return choices


def _with_rivals(choice: Choice, pick: Setting, headq: Sequence[Setting]) -> Choice:
    others = [s for s in headq if s.bits <= max(choice.budget.most, pick.bits) and s is not pick]
    side = pick.family == SIDE_CODE
    return replace(
        choice,
        within=best(others, choice.budget.most) if pick.bits > choice.budget.most else None,
        other_code=best([s for s in others if (s.family == SIDE_CODE) != side]),
        uncalibrated=best([s for s in others if not s.data["calibrated"]]) if pick.data["calibrated"] else None,
        near=tuple(s for s in others if told_apart(s, pick) is False),
    )
