"""The systems that stand nearest to HeadQ, over all that they were measured on: tables and a figure."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
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
    if not logs:
        return ""
    low, mean, high = (f"{math.exp(x):.2g}" for x in (min(logs), sum(logs) / len(logs), max(logs)))
    return mean if len(logs) == 1 or name == REFERENCE else f"{mean} ({low} to {high})"


def table(results: Path) -> str:
    """One row a method, ordered by its bits at 4k, one column a text, length or model; cells are KL in nats."""
    columns = {name: found for name in COLUMNS if (found := read(results, name))}
    tables = list(columns.values())
    both = {n: r for found in reversed(tables) for n, r in found.items() if r["method"]["kind"] != "exact"}
    names = {n: r for n, r in both.items() if None not in (r.get("bits") or {}).values()}  # keys and values
    right = retrieval(results)

    def place(name: str) -> tuple[float, float]:
        first = next(found[name] for found in tables if name in found)
        return round(bits_of(tables, name) or 0.0, 2), score_of(first)["mean_kl"]

    rows = []
    for name in sorted(names, key=place):
        cells = []
        for found in tables:
            score = score_of(found[name]) if name in found else None
            cells.append("" if score is None else measured(score["mean_kl"], score["mean_kl_sem"], 4))
        share = "" if name not in right["shares"] else f"{100 * right['shares'][name]:.0f} %"
        rows.append([names[name]["title"], number(bits_of(tables, name)), *cells, share, ratio(tables, name)])
    protocols = {name: next(iter(found.values()))["protocol"] for name, found in columns.items()}
    heads = [f"{COLUMNS[name]} ({p['rows']})" for name, p in protocols.items()]
    first = next(iter(tables[0].values()))
    header = ["cache", "bits at 4k", *heads, "facts found", f"× {names[REFERENCE]['title'].replace('*', '')}"]
    texts = "; ".join(
        f"{COLUMNS[name]}: {p['text']}, rows of {p['row_length']}, prefill {p['prefill']}, chunks of {p['chunk']}"
        for name, p in protocols.items()
    )
    note = (
        f"KL in nats ± standard error over rows, whose number is in brackets; {first['model']} where no other is "
        f"named. {texts}. Token by token: greedy continuations, one token a call. Facts found: of "
        f"{right['asked']}, over {right['tokens']} tokens; the exact cache finds "
        f"{100 * right['shares']['exact']:.0f} %. Last column: KL over that of HeadQ's row, row by "
        "row, geometric mean over columns (lowest and highest column)."
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
                    measured(score["ppl_ratio"], score["ppl_ratio_sem"], 3),
                    "" if name == base else f"{100 * removed(result, found[base]):.0f} %",
                    *(f"{layers[key]:.3g}" for key in ("key_mse", "score_error", "attention_kl")),
                ]
            )
    p = next(iter(found.values()))["protocol"]
    header = [
        "keys, values exact", "bits at 4k", "KL (nats)", "ratio", "excess removed", "key MSE", "score error",
        "attention KL",
    ]  # fmt: skip
    note = (
        f"{next(iter(found.values()))['model']}, {p['rows']} rows of {p['row_length']} tokens of {p['text']}, prefill "
        f"{p['prefill']}, chunks of {p['chunk']}. Excess removed: of the perplexity above the exact cache's that the "
        "base alone has. Key MSE, score error and attention KL: means over layers and heads, each on exact inputs, of "
        "the first row."
    )
    return markdown_table(header, rows) + "\n\n" + note


def claims(results: Path) -> str:
    """What abstracts say, and the same numbers here."""
    found, side = read(results, "neighbours"), read(results, SIDE)
    prompt = read(results, "neighbours_prompt")

    def kl(name: str, of: Results = found) -> float:
        return float(score_of(of[name])["mean_kl"])

    shares = ", ".join(
        f"{100 * removed(side[f'{base}_side'], side[base]):.0f} % ({side[base]['title']})"
        for base in SIDE_BASES
        if f"{base}_side" in side
    )
    corrected = [name for name in ("kvlinc_key", "kvlinc_residual") if name in found]
    corrections = ", ".join(
        f"{100 * removed(found[name], found['kvlinc_base']):.0f} % (of the {name.removeprefix('kvlinc_')})"
        for name in corrected
    )
    at = {name: number(found[name]["bits"]["at"][BITS_AT]) for name in ("kvlinc_base", "kvlinc_key")}
    factor = {
        codes: kl(rotated) / kl(headq)
        for codes, rotated, headq in (
            ("scalar", "kv_rotated_mean_2bit", "kv_2bit"),
            ("trellis", "trellis_rotated_mean_2bit", "trellis_headq_2bit"),
        )
    }
    random = {bits: kl(f"random_{bits}bit_2.25", prompt) / kl("rdkv_2.25", prompt) for bits in (4, 16)}
    vq, right = found["residual_vq_8"], retrieval(results)
    facts = ", ".join(
        f"{100 * right['shares'][name]:.0f} % of the facts found at {name.rpartition('_')[2]} bits"
        for name in ("rdkv_2.25", "rdkv_0.4")
        if name in right["shares"]
    )
    facts = f"{facts}, exact {100 * right['shares']['exact']:.0f} %"
    rows: list[tuple[str, str, str]] = [
        (
            "HeadQ (2605.03562, withdrawn)",
            "the side code removes 84 to 94 % of the excess perplexity on the strongest 2-bit rows of keys",
            shares,
        ),
        (
            "KVLinC (2510.05373)",
            "a Hadamard rotation lowers the error of values",
            f"KL of 2-bit values alone: {kl('v_rotated_2bit') / kl('v_per_token_2bit'):.2f} times that without",
        ),
        (
            "KVLinC",
            "linear correction adapters compensate for errors of quantized keys",
            f"excess perplexity removed from its base: {corrections}; {at['kvlinc_key']} bits at 4k with its state, "
            f"{at['kvlinc_base']} without",
        ),
        (
            "RDKV (2605.08317)",
            "eviction and bits are to be chosen together",
            f"at the same bytes eviction alone has {kl('rdkv_evict_2.25', prompt) / kl('rdkv_2.25', prompt):.1f} times "
            f"its KL, random eviction of 16-bit tokens {random[16]:.1f} times, of 4-bit tokens {random[4]:.1f} times; "
            f"HeadQ, which keeps every token, {kl('kv_2bit', prompt) / kl('rdkv_2.25', prompt):.2f} times",
        ),
        (
            "RDKV",
            "2.48 % of the cache keep 97.81 % of the full cache's accuracy",
            f"0.4 bits a number of the prompt, 2.5 % of 16: perplexity {100 * excess(prompt['rdkv_0.4']):+.0f} %, "
            f"random eviction {100 * excess(prompt['random_4bit_0.4']):+.0f} %; {facts}",
        ),
        (
            "residual VQ (2410.15704)",
            "eight codebooks recover most of the performance, at 5.5 times fewer bytes than half precision",
            f"perplexity {100 * excess(vq):+.1f} % at {16 / vq['bits']['at'][BITS_AT]:.1f} times fewer; six: "
            f"{100 * excess(found['residual_vq_6']):+.1f} %",
        ),
        (
            "residual VQ",
            "competitive with existing quantization methods",
            f"eight books have {kl('residual_vq_8') / kl('int4_per_token_head'):.2f} times the KL of vLLM's 4-bit type "
            f"and {kl('residual_vq_8') / kl('kv_default'):.1f} times that of HeadQ's default, which takes fewer bits",
        ),
        (
            "does HeadQ's basis gain as much under a trellis?",
            "asked here",
            f"whitening and metric lower the KL {factor['scalar']:.1f} times under scalar codes, "
            f"{factor['trellis']:.1f} times under a trellis",
        ),
    ]
    return markdown_table(["of", "said", "here"], [list(row) for row in rows], left=3)


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
            ticks = (1.25, 1.5, 2, 2.5, 3, 4, 5, 7)
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axes.set_xticks([], minor=True)
            plain_log_ticks(axes.yaxis)
        for axes in panels.flat[len(columns) :]:
            axes.set_axis_off()
        panels[0][0].set_ylabel("KL to the exact cache (nats)")
        panels[1][0].set_ylabel("KL to the exact cache (nats)")
        figure.legend(families.values(), families.keys(), loc="outside lower center", ncols=len(families))
        return save(figure, path)


BLOCKS: dict[str, Callable[[Path], str]] = {
    "neighbours": table,
    "neighbours side": side_table,
    "neighbours claims": claims,
}
