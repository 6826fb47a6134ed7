"""What a table of perturbations says: rank correlations, counterexamples, and the panels that are drawn."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headq_ao.evals.harness.key_changes import BASES, EVERYWHERE, NO_SIDE_CODE, SIDE, WRONG_SIGN, Perturbation

PREDICTORS = ("key_mse", "score_error", "fisher_error")
TARGET = "attention_kl"
VALUES = ("key_mse", "relative_key_mse", "score_error", "fisher_error", TARGET, "top1_flips")
FLOOR = 1e-12  # nats: below, a KL is rounding; keeps logarithms finite
CLEAR = math.log(1.1)  # two values differ clearly from 10 % on
POINTS_PER_PERTURBATION = 4
EXAMPLES = 12


@dataclass
class Measurements:
    """Errors of each perturbation in each layer and head, ``values[name] [P, L, Hq]``, and ``bits`` of quantizers."""

    changes: Sequence[Perturbation]
    layers: Sequence[int]
    values: dict[str, Tensor]
    bits: dict[int, float | None] = field(default_factory=dict)

    def about(self, p: int) -> dict[str, Any]:
        """What a perturbation is, as plain data."""
        names = ("name", "setting", "family", "strength", "control")
        return {name: getattr(self.changes[p], name) for name in names} | {"bits": self.bits.get(p)}

    def means(self, p: int) -> dict[str, Any]:
        """The same with its means over layers and heads."""
        return self.about(p) | {name: digits(x[p].mean()) for name, x in self.values.items()}

    def label(self, p: int) -> str:
        """Name and setting."""
        change = self.changes[p]
        return change.name if change.setting is None else f"{change.name}, {change.setting}"

    def pick(self, **wanted: Any) -> list[int]:
        """Indices of the perturbations with these fields."""
        return [p for p, c in enumerate(self.changes) if all(getattr(c, k) == x for k, x in wanted.items())]


def summarize(table: Measurements, seed: int) -> dict[str, Any]:
    """Plain data for JSON.

    Returns:
        - ``layers``: the measured ones
        - ``perturbations``: each one's name, setting, family, strength, control, bits and means over layers and heads
        - ``correlations``: see :func:`correlations`
        - ``counterexamples``: see :func:`counterexamples`
        - ``null_space``: the exact null directions, and noise of other kinds to compare with
        - ``matched_mse``: noise of equal MSE in different directions, see :func:`matched_mse`
        - ``bases``: the side code's bases at equal bits, see :func:`bases`
        - ``points``: for a scatter plot, means over heads in a few layers, drawn from the seed: index into
          ``perturbations``, layer, and the values
    """
    everywhere = table.pick(name=EVERYWHERE)
    last = [p for p, c in enumerate(table.changes) if c.name.startswith("last ") and c.strength is not None]
    return {
        "layers": list(table.layers),
        "perturbations": [table.means(p) for p in range(len(table.changes))],
        "correlations": correlations(table),
        "counterexamples": counterexamples(table),
        "null_space": [table.means(p) for p in (*table.pick(family="null"), last[-1], everywhere[-1], everywhere[0])],
        "matched_mse": matched_mse(table),
        "bases": bases(table),
        "points": points(table, seed),
    }


def correlations(table: Measurements) -> dict[str, dict[str, Any]]:
    """How well each predictor orders perturbations by their attention KL; the null directions are left out.

    Per set of perturbations (all, noise, quantizers) and predictor: ``spearman`` and ``pearson_log`` (of logarithms)
    over all perturbations, layers and heads; ``within_head``: Spearman's over the perturbations of one head, mean over
    heads, and the lowest; ``per_layer``: Spearman's and ``per_layer_pearson_log`` over perturbations and heads.
    """
    real = [p for p, c in enumerate(table.changes) if c.family != "null"]
    sets = {
        "all": real,
        "noise": [p for p in real if table.changes[p].strength is not None],
        "quantizers": [p for p in real if table.changes[p].strength is None],
    }
    out: dict[str, dict[str, Any]] = {}
    for name, members in sets.items():
        y = table.values[TARGET][members]
        out[name] = {"perturbations": len(members)}
        for predictor in PREDICTORS:
            x = table.values[predictor][members]
            within = spearman(x.movedim(0, -1), y.movedim(0, -1))
            layers = [t.movedim(0, 1).flatten(1) for t in (x, y)]
            out[name][predictor] = {
                "spearman": digits(spearman(x.flatten(), y.flatten())),
                "pearson_log": digits(pearson(logarithm(x.flatten()), logarithm(y.flatten()))),
                "within_head": digits(within.mean()),
                "within_head_lowest": digits(within.min()),
                "per_layer": [digits(r) for r in spearman(*layers)],
                "per_layer_pearson_log": [digits(r) for r in pearson(*map(logarithm, layers))],
            }
    return out


def counterexamples(table: Measurements) -> dict[str, Any]:
    """Pairs of quantizers of equal bits that a predictor puts in the wrong order.

    Returns:
        ``wrong_order``: per predictor, the share of (pair, layer, head) where the quantizer with the lower predictor
        has the higher KL, of all and of those where both differ by more than 10 %; ``pairs``: pairs (A, B) where A has
        the lower MSE and the higher KL, means over layers and heads, and the share of single heads where that is so;
        ``examples``: the strongest single heads, one per pair and order.
    """
    pairs = equal_bits(table)
    wrong: dict[str, Any] = {}
    log_kl = torch.stack([log_ratio(table.values[TARGET], a, b) for a, b in pairs])
    for predictor in PREDICTORS:
        log_x = torch.stack([log_ratio(table.values[predictor], a, b) for a, b in pairs])
        disagree, clear = log_x * log_kl < 0, (log_x.abs() > CLEAR) & (log_kl.abs() > CLEAR)
        wrong[predictor] = {
            "share": digits(disagree.double().mean()),
            "share_of_clear": digits((disagree & clear).sum() / clear.sum()),
            "clear": int(clear.sum()),
        }
    kl, mse = table.values[TARGET], table.values["key_mse"]
    found, examples = [], []
    for pair in pairs:
        a, b = sorted(pair, key=lambda p: float(mse[p].mean()))
        if mse[a].mean() < mse[b].mean() and kl[a].mean() > kl[b].mean():
            found.append(
                side_by_side(table, a, b) | {"heads": digits(((mse[a] < mse[b]) & (kl[a] > kl[b])).float().mean())}
            )
        for a, b in (pair, pair[::-1]):
            strength = torch.minimum(log_ratio(mse, b, a), log_ratio(kl, a, b))
            at = int(strength.argmax())
            where = divmod(at, kl.shape[2])
            if strength.flatten()[at] > CLEAR:
                examples.append((float(strength.flatten()[at]), side_by_side(table, a, b, where)))
    examples.sort(key=lambda e: -e[0])
    return {
        "compared": len(pairs) * kl[0].numel(),
        "wrong_order": wrong,
        "pairs": sorted(found, key=lambda f: f["a"]["attention_kl"] / f["b"]["attention_kl"], reverse=True),
        "examples": [e for _, e in examples[:EXAMPLES]],
    }


def equal_bits(table: Measurements) -> list[tuple[int, int]]:
    """Pairs of quantizers, controls left out, with the same counted bits."""
    groups: dict[float, list[int]] = {}
    for p, bits in sorted(table.bits.items()):
        if bits is not None and not table.changes[p].control:
            groups.setdefault(round(bits, 6), []).append(p)
    return [pair for members in groups.values() for pair in itertools.combinations(members, 2)]


def side_by_side(table: Measurements, a: int, b: int, where: tuple[int, int] | None = None) -> dict[str, Any]:
    """Two quantizers, means over layers and heads or in one (layer, head)."""
    out: dict[str, Any] = {"bits": table.bits[a]}
    if where is not None:
        out |= {"layer": table.layers[where[0]], "head": where[1]}
    for side, p in (("a", a), ("b", b)):
        values = {n: x[p].mean() if where is None else x[p][where] for n, x in table.values.items()}
        out[side] = {"name": table.label(p)} | {n: digits(x) for n, x in values.items()}
    return out


def matched_mse(table: Measurements) -> dict[str, Any]:
    """Noise whose MSE is the same, at each strength.

    Returns:
        ``rows``: means of each, with ``times_isotropic``, its KL over that of noise in all directions;
        ``within_head``: Spearman's correlation of score error and Fisher error with KL over noises of one strength in
        one head, mean over heads and strengths (that of the MSE is not defined).
    """
    noises = [p for p, c in enumerate(table.changes) if c.strength is not None and c.family != "null"]
    rows, kl = [], table.values[TARGET]
    rank: dict[str, list[Tensor]] = {name: [] for name in PREDICTORS[1:]}
    for strength in sorted({table.changes[p].strength or 0.0 for p in noises}):
        members = [p for p in noises if table.changes[p].strength == strength]
        (isotropic,) = table.pick(name=EVERYWHERE, strength=strength)
        rows += [table.means(p) | {"times_isotropic": digits(kl[p].mean() / kl[isotropic].mean())} for p in members]
        for name, found in rank.items():
            found.append(spearman(table.values[name][members].movedim(0, -1), kl[members].movedim(0, -1)))
    return {"rows": rows, "within_head": {name: digits(torch.stack(found).mean()) for name, found in rank.items()}}


def bases(table: Measurements) -> list[dict[str, Any]]:
    """Means of HeadQ's codes for each setting of the side code: its bases, the wrong sign, and the base code alone.

    ``worse_than_query_pca``: share of heads where the KL is higher than with query PCA.
    """
    out, kl = [], table.values[TARGET]
    for first in table.pick(name=BASES[0]):
        setting = table.changes[first].setting or ""
        alone = table.pick(name=NO_SIDE_CODE, setting=setting.partition(SIDE)[0])
        members = [p for name in (*BASES, WRONG_SIGN) for p in table.pick(name=name, setting=setting)]
        worse = {p: digits((kl[p] > kl[first]).double().mean()) for p in (*members, *alone)}
        out.append(
            {"setting": setting, "rows": [table.means(p) | {"worse_than_query_pca": w} for p, w in worse.items()]}
        )
    return out


def points(table: Measurements, seed: int) -> list[dict[str, Any]]:
    """Means over heads of every perturbation but the null ones, in a few layers each."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for p, change in enumerate(table.changes):
        if change.family != "null":
            order = torch.randperm(len(table.layers), generator=generator)[:POINTS_PER_PERTURBATION]
            for i in sorted(order.tolist()):
                values = {name: digits(table.values[name][p, i].mean()) for name in (*PREDICTORS, TARGET)}
                out.append({"perturbation": p, "layer": table.layers[i]} | values)
    return out


def log_ratio(x: Tensor, a: int, b: int) -> Tensor:
    """``log(x_a / x_b)``."""
    return logarithm(x[a]) - logarithm(x[b])


def logarithm(x: Tensor) -> Tensor:
    """Of what may be 0."""
    return x.double().clamp(min=FLOOR).log()


def digits(x: Tensor, n: int = 5) -> float | None:
    """A number with ``n`` significant digits; None for nan, which JSON does not know."""
    value = float(x)
    return float(f"{value:.{n}g}") if value == value else None


def ranks(x: Tensor) -> Tensor:
    """Ranks from 1 along the last axis, ties given the mean of theirs, fp64.

    Example:
        >>> import torch
        >>> from headq_ao.evals.harness.panel import ranks
        >>> ranks(torch.tensor([30.0, 10.0, 10.0, 20.0])).tolist()
        [4.0, 1.5, 1.5, 3.0]
    """
    x = x.contiguous()
    ordered = x.sort(-1).values
    below, upto = (torch.searchsorted(ordered, x, right=right) for right in (False, True))
    return (below + upto + 1).double() / 2


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation along the last axis, fp64; nan where a side is constant."""
    x, y = (t.double() - t.double().mean(-1, keepdim=True) for t in (x, y))
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's rank correlation along the last axis: Pearson's of the ranks.

    Example:
        >>> import torch
        >>> from headq_ao.evals.harness.panel import spearman
        >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 10.0, 9.0])).item()
        0.5
    """
    return pearson(ranks(x), ranks(y))
