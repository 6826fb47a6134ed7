"""The systems that stand nearest to HeadQ, over all that they were measured on: tables and a figure."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headq_ao.evals.harness.table import markdown_table, measured, number
from headq_ao.evals.report.style import family_style, new_figure, plain_log_ticks, save

Results = Mapping[str, dict[str, Any]]  # of one recipe, by setting
BITS_AT = "4096"
REFERENCE = "kv_mean_2"  # HeadQ at 2 code bits, which others are compared with row by row
RETRIEVAL = "neighbours_retrieval/retrieval.json"
SETTING = {"headq": "kv_default", "headq_2bit": "kv_2bit"}  # of recipes, by their name in recipes/retrieval.py
# recipe: what its column is called
COLUMNS = {
    "neighbours": "1k tokens",
    "neighbours_1bit": "one bit, 1k tokens",
    "neighbours_prompt": "behind a prompt of 896",
    "neighbours_4k": "4k tokens",
    "neighbours_8k": "8k tokens",
    "neighbours_code": "code",
    "neighbours_decode": "token by token",
    "neighbours_qwen": "Qwen2.5-Coder-0.5B, 1k",
}
SCORED = tuple(name for name in COLUMNS if name != "neighbours_decode")
SIDE = "neighbours_side"
SIDE_BASES = ("kivi", "trellis", "residual_vq")
SIDE_ROWS = ("side", "wrong_sign", "random", "matched", "equal")


def read(results: Path, recipe: str) -> dict[str, dict[str, Any]]:
    """The results of a recipe by setting, in its order."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((results / recipe).glob("*.json"))]
    return {result["name"]: result for result in sorted(found, key=lambda r: (r["order"], r["name"]))}


def score_of(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a setting scored; of those that decode token by token, on greedy continuations."""
    found: Mapping[str, Any] = result["score"] if "score" in result else result["greedy"]["tokens"]
    return found


def bits_of(results: Sequence[Results], name: str) -> float | None:
    """Bits at 4k tokens of a setting, of the first recipe that has them."""
    for found in results:
        if name in found and "bits" in found[name]:
            bits: float | None = found[name]["bits"]["at"][BITS_AT]
            return bits
    return None


def against(found: Results, name: str, reference: str) -> list[float] | None:
    """Logarithms of a setting's KL over another's, row by row; None where one of them was not measured."""
    if name not in found or reference not in found:
        return None
    pairs = zip(*(score_of(found[n])["kl_by_row"] for n in (name, reference)), strict=True)
    return [math.log(a / b) for a, b in pairs]


def ratio(results: Sequence[Results], name: str) -> str:
    """KL over the reference's: the geometric mean over recipes, and the range of their means."""
    logs = [sum(x) / len(x) for found in results if (x := against(found, name, REFERENCE)) is not None]
    return "1" if name == REFERENCE else spread(logs)


def spread(logs: Sequence[float]) -> str:
    """A geometric mean, of logarithms, with the least and the most; empty where there are none.

    Example:
        >>> import math
        >>> from headq_ao.evals.results.neighbours import spread
        >>> spread([math.log(1), math.log(4)]), spread([math.log(2)]), spread([])
        ('2 (1 to 4)', '2', '')
    """
    if not logs:
        return ""
    low, mean, high = (f"{math.exp(x):.2g}" for x in (min(logs), sum(logs) / len(logs), max(logs)))
    return mean if len(logs) == 1 else f"{mean} ({low} to {high})"


def table(results: Path) -> str:
    """One row a method, ordered by its bits at 4k, one column a text, length or model; cells are KL in nats."""
    columns = {name: found for name in COLUMNS if (found := read(results, name))}
    tables = list(columns.values())
    both = {n: r for found in reversed(tables) for n, r in found.items() if r["method"]["kind"] != "exact"}
    names = {n: r for n, r in both.items() if None not in (r.get("bits") or {}).values()}  # keys and values
    right = retrieval(results) if (results / RETRIEVAL).is_file() else None

    def place(name: str) -> tuple[float, float]:
        first = next(found[name] for found in tables if name in found)
        return round(bits_of(tables, name) or 0.0, 2), score_of(first)["mean_kl"]

    rows = []
    for name in sorted(names, key=place):
        cells = []
        for found in tables:
            score = score_of(found[name]) if name in found else None
            cells.append("" if score is None else measured(score["mean_kl"], score["mean_kl_sem"], 4))
        if right is not None:
            cells.append("" if name not in right["shares"] else f"{100 * right['shares'][name]:.0f} %")
        rows.append([names[name]["title"], number(bits_of(tables, name)), *cells, ratio(tables, name)])
    protocols = {name: next(iter(found.values()))["protocol"] for name, found in columns.items()}
    heads = [f"{COLUMNS[name]} ({p['rows']})" for name, p in protocols.items()]
    first = next(iter(tables[0].values()))
    facts = [] if right is None else ["facts found"]
    header = ["cache", "bits at 4k", *heads, *facts, f"× {names[REFERENCE]['title'].replace('*', '')}"]
    texts = "; ".join(
        f"{COLUMNS[name]}: {p['text']}, rows of {p['row_length']}, prefill {p['prefill']}, chunks of {p['chunk']}"
        for name, p in protocols.items()
    )
    note = (
        f"KL in nats ± standard error over rows, whose number is in brackets; {first['model']} where no other is "
        f"named. {texts}. Last column: KL over that of HeadQ's row, row by row, geometric mean over columns (lowest "
        "and highest column)."
    )
    if "neighbours_decode" in columns:
        note += " Token by token: greedy continuations, one token a call."
    if right is not None:
        note += (
            f" Facts found: of {right['asked']}, over {right['tokens']} tokens; the exact cache finds "
            f"{100 * right['shares']['exact']:.0f} %."
        )
    return markdown_table(header, rows) + "\n\n" + note


def retrieval(results: Path) -> dict[str, Any]:
    """Which share of the facts each cache found, by setting, how many were asked for, and in how many tokens."""
    stored = json.loads((results / RETRIEVAL).read_text(encoding="utf-8"))
    settings = stored["settings"]
    shares = {SETTING.get(name, name): entry["accuracy"] for name, entry in stored["subjects"].items()}
    return {"shares": shares, "asked": settings["contexts"] * settings["questions"], "tokens": settings["tokens"]}


def excess(result: Mapping[str, Any]) -> float:
    """Perplexity above the exact cache's, as a share of it."""
    return float(result["score"]["ppl_ratio"]) - 1


def removed(result: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """Which share of a base's excess perplexity is gone; below 0: there is more."""
    return 1 - excess(result) / excess(base)


def side_table(results: Path) -> str:
    """The side code on each base, and its controls."""
    found = read(results, SIDE)
    rows = []
    for base in SIDE_BASES:
        for name in (base, *(f"{base}_{row}" for row in SIDE_ROWS)):
            if name not in found:
                continue
            result, score = found[name], found[name]["score"]
            control = name.endswith("_matched")
            layers = {key: sum(x) / len(x) for key, x in result["layers"].items()}
            rows.append(
                [
                    result["title"],
                    "–" if control else number(result["bits"]["at"][BITS_AT]),
                    measured(score["mean_kl"], score["mean_kl_sem"], 4),
                    "1" if name == base else spread(against(found, name, base) or []),
                    measured(score["ppl_ratio"], score["ppl_ratio_sem"], 3),
                    "" if name == base else f"{100 * removed(result, found[base]):.0f} %",
                    *(f"{layers[key]:.3g}" for key in ("key_mse", "score_error", "attention_kl")),
                ]
            )
    p = next(iter(found.values()))["protocol"]
    header = [
        "keys, values exact", "bits at 4k", "KL (nats)", "× base", "ratio", "excess removed", "key MSE", "score error",
        "attention KL",
    ]  # fmt: skip
    note = (
        f"{next(iter(found.values()))['model']}, {p['rows']} rows of {p['row_length']} tokens of {p['text']}, prefill "
        f"{p['prefill']}, chunks of {p['chunk']}. × base: KL over that of the base alone, row by row, geometric mean "
        "(lowest and highest row). Excess removed: of the perplexity above the exact cache's that the "
        "base alone has. Key MSE, score error and attention KL: means over layers and heads, each on exact inputs, of "
        "the first row."
    )
    return markdown_table(header, rows) + "\n\n" + note


@dataclass(frozen=True)
class Numbers:
    """What claims are held against.

    Args:
        results: the folder recipes/results.
    """

    results: Path

    def of(self, recipe: str, name: str) -> dict[str, Any]:
        """One setting."""
        return read(self.results, recipe)[name]

    def times(self, recipe: str, name: str, other: str) -> str:
        """How many times as large a setting's KL is as another's."""
        one, two = (float(score_of(self.of(recipe, n))["mean_kl"]) for n in (name, other))
        return f"{one / two:.2f}" if one < two else f"{one / two:.1f}"

    def cost(self, recipe: str, name: str, digits: int = 1) -> str:
        """Perplexity above the exact cache's."""
        return f"{100 * excess(self.of(recipe, name)):+.{digits}f} %"

    def gone(self, recipe: str, name: str, base: str) -> str:
        """Which share of the excess perplexity of a base is gone."""
        return f"{100 * removed(self.of(recipe, name), self.of(recipe, base)):.0f} %"

    def bits(self, name: str) -> str:
        """At 4k tokens."""
        return number(self.of("neighbours", name)["bits"]["at"][BITS_AT])

    def facts(self, name: str) -> str:
        """Share of the facts that were found."""
        return f"{100 * retrieval(self.results)['shares'][name]:.0f} %"


def _side(n: Numbers) -> str:
    parts = [f"{n.gone(SIDE, f'{b}_side', b)} ({n.of(SIDE, b)['title']})" for b in SIDE_BASES]
    wrong = [f"{n.gone(SIDE, f'{b}_random', b)}" for b in SIDE_BASES]
    return f"{', '.join(parts)}; random directions: {', '.join(wrong)}"


def _rotated_values(n: Numbers) -> str:
    return f"KL of 2-bit values alone: {n.times('neighbours', 'v_rotated_2bit', 'v_per_token_2bit')} times that without"


def _correction(n: Numbers) -> str:
    return (
        f"{n.gone('neighbours', 'kvlinc_key', 'kvlinc_base')} of its base's excess perplexity removed (below 0: "
        f"added), φ of the key; {n.bits('kvlinc_key')} bits at 4k with its state, {n.bits('kvlinc_base')} without"
    )


def _joint(n: Numbers) -> str:
    evict, sixteen, four, kept = (
        n.times("neighbours_prompt", name, "rdkv_2.25")
        for name in ("rdkv_evict_2.25", "random_16bit_2.25", "random_4bit_2.25", "kv_2bit")
    )
    return (
        f"of the KL of both together, eviction alone has {evict} times as much within the same budget, random eviction "
        f"of 16-bit tokens {sixteen}, of 4-bit tokens {four}, HeadQ at 2 bits, which keeps every token, {kept}"
    )


def _retention(n: Numbers) -> str:
    costs = [n.cost("neighbours_prompt", name, 0) for name in ("rdkv_2.25", "rdkv_0.4", "random_4bit_0.4")]
    here = (
        f"perplexity {costs[1]} with 0.4 bits of 16 an element of the prompt, {costs[2]} where random tokens stay, "
        f"{costs[0]} with 2.25 bits"
    )
    if not (n.results / RETRIEVAL).is_file():
        return here
    return here + (
        f"; facts found in a long context: {n.facts('rdkv_0.4')} with 0.4 bits, {n.facts('rdkv_2.25')} with 2.25, "
        f"{n.facts('exact')} with all"
    )


def _depth(n: Numbers) -> str:
    times = 16 / float(n.of("neighbours", "residual_vq_8")["bits"]["at"][BITS_AT])
    return (
        f"perplexity {n.cost('neighbours', 'residual_vq_8')} at {times:.1f} times fewer; with six "
        f"{n.cost('neighbours', 'residual_vq_6')}"
    )


def _competitive(n: Numbers) -> str:
    four, own = (n.times("neighbours", "residual_vq_8", x) for x in ("int4_per_token_head", "kv_default"))
    return (
        f"eight books at {n.bits('residual_vq_8')} bits have {four} times the KL of vLLM's int4_per_token_head at "
        f"{n.bits('int4_per_token_head')} and {own} times that of HeadQ's default at {n.bits('kv_default')}"
    )


def _trellis(n: Numbers) -> str:
    scalar = n.times("neighbours", "kv_rotated_mean_2bit", "kv_2bit")
    coded = n.times("neighbours", "trellis_rotated_mean_2bit", "trellis_headq_2bit")
    return f"whitening and metric lower the KL {scalar} times under scalar codes, {coded} times under a trellis"


# whose it is, what is said, and what was measured here
CLAIMS: tuple[tuple[str, str, Callable[[Numbers], str]], ...] = (
    ("HeadQ (2605.03562, withdrawn)", "84 to 94 % of the excess perplexity go on the strongest 2-bit keys", _side),
    ("KVLinC (2510.05373)", "a Hadamard rotation lowers the error of values", _rotated_values),
    ("KVLinC", "linear corrections make up for the errors of quantized keys", _correction),
    ("RDKV (2605.08317)", "eviction and quantization are to be optimized jointly", _joint),
    ("RDKV", "2.48 % of the cache keep 97.81 % of the accuracy", _retention),
    ("residual VQ (2410.15704)", "a depth of 8 recovers most of the quality, 5.5 times fewer bytes", _depth),
    ("residual VQ", "competitive with existing methods of quantization", _competitive),
    ("asked here", "does HeadQ's basis gain as much under a trellis?", _trellis),
)


def claims(results: Path) -> str:
    """What abstracts say, and the same thing measured here, or that it was not."""
    numbers, rows = Numbers(results), []
    for of, said, measure in CLAIMS:
        try:
            here = measure(numbers)
        except (KeyError, FileNotFoundError):
            here = "not measured"
        rows.append([of, said, here])
    return markdown_table(["of", "said", "here"], rows, left=3)


def plot(results: Path, path: Path) -> Path:
    """KL against bits at 4k, one panel for each recipe of scored rows. Needs matplotlib (the extra ``plot``)."""
    columns = {name: found for name in SCORED if (found := read(results, name))}
    tables = list(columns.values())
    wide = math.ceil(len(columns) / 2)
    with new_figure(3.4 * wide, 7.2) as figure:
        panels = figure.subplots(2, wide, squeeze=False)
        families: dict[str, Any] = {}
        for axes, (name, found) in zip(panels.flat, columns.items(), strict=False):
            for setting, result in found.items():
                bits, score = bits_of(tables, setting), score_of(result)
                if bits is None:
                    continue
                kl, sem = score["mean_kl"], score["mean_kl_sem"] or 0.0
                colour, marker = family_style(result["family"])
                families[result["family"]] = axes.errorbar(
                    [bits], [kl], yerr=[[min(sem, 0.9 * kl)], [sem]], fmt=marker, color=colour, markersize=6.5,
                    elinewidth=1.1, markeredgecolor="white", markeredgewidth=0.6, linestyle="",
                )  # fmt: skip
            axes.set(xscale="log", yscale="log", title=COLUMNS[name], xlabel="bits at 4096 tokens")
            ticks = (1, 1.5, 2, 3, 4, 6, 8)
            axes.set_xlim(0.85, 9)
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axes.set_xticks([], minor=True)
            plain_log_ticks(axes.yaxis)
        for axes in panels.flat[len(columns) :]:
            axes.set_axis_off()
        panels[0][0].set_ylabel("KL to the exact cache (nats)")
        panels[1][0].set_ylabel("KL to the exact cache (nats)")
        figure.legend(families.values(), families.keys(), loc="outside lower center", ncols=4)
        return save(figure, path)


BLOCKS: dict[str, Callable[[Path], str]] = {
    "neighbours": table,
    "neighbours side": side_table,
    "neighbours claims": claims,
}
