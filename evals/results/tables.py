"""Tables of results that recipes leave: presets, stored prompts, facts in a long context, sizes of calibrations."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from headq_ao.evals.harness.table import markdown_table, measured, number, read_results
from headq_ao.evals.rate_distortion import HEADER, table_rows

# name of the row, result of recipes/frontier.yaml, key in the result of recipes/presets.py
PRESETS = (
    ('`"balanced"`, the default', "kv_default"),
    ('`"quality"`', "kv_quality"),
    ('`"near_lossless"`', "kv_near_lossless"),
    ("the default, uncalibrated", "kv_no_calibration"),
    ('`"headq_paper"`, keys only', "k_paper"),
)
FRONT = {
    "exact": "exact cache",
    "fp8": "transformers' fp8",
    "kivi_2bit_g64": "KIVI, 2 bits",
    "kv_default": "**HeadQ**",
    "kv_quality": "**HeadQ**, quality",
}
CACHES = {
    "exact": "exact",
    "headq": "HeadQ, default",
    "headq_quality": "HeadQ, quality",
    "headq_near_lossless": "HeadQ, near_lossless",
    "headq_2bit": "HeadQ, 2 bits in every layer",
    "kivi_2bit_g64": "KIVI, 2 bits, groups of 64",
    "turboquant_2bit": "TurboQuant, 2 bits",
    "kv_mean_2": "HeadQ, mean of 2 code bits",
    "trellis_headq_2bit": "trellis in HeadQ's basis and metric, 2 bits",
    "trellis_2bit": "trellis of rotated tokens, 2 bits",
    "residual_vq_6": "residual VQ, 6 books",
    "kvlinc_base": "KVLinC-like without its correction, 2 bits",
    "int4_per_token_head": "vLLM's int4_per_token_head",
    "turboquant_3bit_nc": "vLLM's turboquant_3bit_nc",
    "rdkv_2.25": "RDKV-like, 2.25 bits",
    "rdkv_0.4": "RDKV-like, 0.4 bits",
    "random_16bit_2.25": "random eviction, 16-bit tokens, 2.25 bits",
    "random_4bit_2.25": "random eviction, 4-bit tokens, 2.25 bits",
}  # of recipes/retrieval.py


def front(folder: Path) -> str:
    """The five rows of README.md, from recipes/wikitext.yaml."""
    found = {result["name"]: result for result in read_results(folder)}
    rows = []
    exact = found["exact"]["memory_bytes"]["16384"]
    for name, title in FRONT.items():
        result = found[name]
        score, is_exact = result["score"], name == "exact"
        rows.append(
            [
                title,
                "16" if is_exact else number(result["bits"]["at"]["4096"]),
                f"{exact / result['memory_bytes']['16384']:.1f} ×",
                "1" if is_exact else measured(score["ppl_ratio"], score["ppl_ratio_sem"], 3),
                "0" if is_exact else measured(score["mean_kl"], score["mean_kl_sem"], 4),
            ]
        )
    first = found["exact"]
    protocol = first["protocol"]
    header = ["cache", "bits per element", "smaller at 16k tokens", "perplexity ratio", "KL (nats)"]
    note = (
        f"{first['model']}, {protocol['rows']} rows of {protocol['row_length']} tokens of WikiText-2's test split. "
        "Bits: as stored, scales included, at 4096 tokens. Smaller: the whole cache of a sequence, full-precision "
        "tokens included, against 16 bits. KL: of the next-token distribution to the exact cache's."
    )
    return markdown_table(header, rows) + "\n\n" + note


def presets(result: dict[str, Any], frontier: Path) -> str:
    """Quality from ``recipes/frontier.yaml``, time of ``recipes/presets.py``."""
    found = {scored["name"]: scored for scored in read_results(frontier)}
    rows = []
    for name, file in PRESETS:
        score, bits = found[file]["score"], found[file]["bits"]
        rows.append(
            [
                name,
                number(bits["body"]),
                number(bits["at"]["4096"]),
                measured(score["ppl_ratio"], score["ppl_ratio_sem"], 4),
                measured(score["mean_kl"], score["mean_kl_sem"], 4),
                f"{100 * (result['prefill'][name]['cpu_ratio'] - 1):+.0f} %",
            ]
        )
    header = ["preset", "bits stored", "bits at 4k", "perplexity ratio", "KL (nats)", "prefill, CPU time"]
    note = (
        f"{result['model']}, {result['dtype']}. Bits, ratio and KL: `recipes/frontier.yaml`. Prefill of "
        f"{result['tokens']} tokens against the exact cache: median of {result['repeats']} turns in one process; "
        "`python recipes/presets.py`."
    )
    return markdown_table(header, rows) + "\n\n" + note


def prompt_cache(result: dict[str, Any]) -> str:
    """A stored prompt: sizes of files, and time to read them against computing the prompt again."""
    seconds = result["seconds"]
    header = [f"{result['tokens']} tokens, {result['model']}", "file", "seconds to read", "seconds to compute"]
    rows = [
        ["packed", f"{result['packed_bytes'] / 1e6:.1f} MB", number(seconds["load"]), number(seconds["recompute"], 1)],
        *(
            [["packed, `compress=True`", f"{n / 1e6:.1f} MB", number(seconds["load_compressed"]), ""]]
            if (n := result.get("compressed_bytes"))
            else []
        ),
        [
            "dense, bfloat16",
            f"{result['dense_bf16_bytes'] / 1e6:.1f} MB",
            number(seconds["load_dense_bf16"]),
            number(seconds["recompute_dense"], 1),
        ],
    ]
    return markdown_table(header, rows) + (
        f"\n\n{result['size_ratio']:.3f} of the dense file; read {result['speedup_over_recompute']:.0f} times faster "
        f"than computed. {result['dtype']}, {result['text']}; `python recipes/prompt_cache.py`."
    )


def retrieval(result: dict[str, Any]) -> str:
    """Facts found in a long context through each cache."""
    settings = result["settings"]
    n = settings["contexts"] * settings["questions"]
    header = [
        f"{n} questions, {settings['tokens']} tokens of context", "bits", "right", "against exact, 95 % interval",
    ]  # fmt: skip
    rows = []
    for name, entry in result["subjects"].items():
        mean, low, high = (100 * entry["accuracy_difference"][key] for key in ("mean", "low", "high"))
        against = "" if name == "exact" else f"{mean:+.1f} points ({low:+.1f} to {high:+.1f})"
        bits = "" if entry["body_bits"] is None else number(entry["body_bits"])
        rows.append([CACHES.get(name, name), bits, f"{100 * entry['accuracy']:.1f} %", against])
    packed = min((e["packed_fraction"] for n, e in result["subjects"].items() if n != "exact"), default=0.0)
    return markdown_table(header, rows) + (
        f"\n\n{settings['pairs']} facts in each of {settings['contexts']} contexts, {settings['choices']} choices "
        f"(guessing: {100 / settings['choices']:.1f} %), the same for all caches; at least {100 * packed:.0f} % of the "
        f"tokens that a question read were packed. {settings['model']}, {settings['dtype']}, calibrated on "
        f"{settings['calibration']}; `python recipes/retrieval.py`."
    )


def decode_mode(folder: Path) -> str:
    """Decoding one token a call on the exact cache's continuations, from :mod:`headq_ao.evals.decode_mode`."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    found.sort(key=lambda result: result["order"])
    header = ["cache", "tokens", "KL, one by one", "median", "99.9 %", "over chunks", "same next token"]
    rows = []
    for result in found:
        for kind in ("greedy", "sampled"):
            tokens = result[kind]["tokens"]
            quantiles = (number(tokens["kl_quantiles"][q], 5) for q in ("0.5", "0.999"))
            kl = measured(tokens["mean_kl"], tokens["mean_kl_sem"], 5)
            last = [f"{result[kind]['ratio']:.2f} ×", f"{100 * result[kind]['agreement']:.1f} %"]
            rows.append([result["title"], kind, kl, *quantiles, *last])
    p, free = found[0]["protocol"], {r["title"]: r["free_running"] for r in found}
    new = p["row_length"] - p["prefill"]
    apart = ", ".join(
        f"{title} {100 * (1 - x['never']):.0f} % (median step {x['median']})" for title, x in free.items()
    )
    repeats = ", ".join(f"{100 * found[0][kind]['repeated_4grams']:.0f} % {kind}" for kind in ("greedy", "sampled"))
    return markdown_table(header, rows, left=2) + (
        f"\n\n{p['rows']} prompts of {p['prefill']} tokens, continued by {new} with the exact cache, greedily and "
        f"sampled at temperature 1 (4-grams that repeat: {repeats}). Running free and greedily, continuations that "
        f"leave the exact cache's within {new} tokens: {apart}. {found[0]['model']}, {p['dtype']}; "
        "`python -m headq_ao.evals.decode_mode recipes/decode_mode.yaml`."
    )


def routing(folder: Path) -> str:
    """How often other experts read a token, from :mod:`headq_ao.evals.routing`."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    found.sort(key=lambda result: result["order"])
    header = ["cache", "KL", "other set", "other experts", "tokens", "KL where changed", "elsewhere"]
    rows = []
    for result in [*found, {"title": "dense bfloat16 cache", **found[0]["bfloat16"]}]:
        shares = [f"{100 * result['changed'][name]:.2f} %" for name in ("sets", "experts", "tokens")]
        kls = [result[name] for name in ("mean_kl", "kl_where_changed", "kl_where_same")]
        shown = ["" if x is None else f"{x:.2g}" for x in kls]
        rows.append([result["title"], shown[0], *shares, *shown[1:]])
    p, experts = found[0]["protocol"], found[0]["experts"]
    return markdown_table(header, rows) + (
        f"\n\n{found[0]['model']}, {p['dtype']}, {experts['active']} of {experts['number']} experts in each layer; "
        f"{p['rows']} rows of {p['row_length']} tokens, prefill {p['prefill']}, chunks of {p['chunk']}. *Other set*: "
        "tokens and layers whose experts are not those under the exact cache; *tokens*: those with another set in some "
        "layer. `python -m headq_ao.evals.routing recipes/routing.yaml`."
    )


def rate_distortion(result: dict[str, Any]) -> str:
    """How far codes are from the Gaussian bound, from :mod:`headq_ao.evals.rate_distortion`."""
    p = result["protocol"]
    return markdown_table(HEADER, table_rows(result), left=2) + (
        f"\n\nBits a coordinate, mean over heads and layers. {result['model']}, {p['rows']} rows of {p['row_length']} "
        f"tokens of {p['text']}, calibration on {p['calibration']}; `python -m headq_ao.evals.rate_distortion`."
    )


def latent(folder: Path) -> str:
    """What it is worth to code a row that is key and value for both, of recipes/latent.yaml."""
    titles = {0: "key alone", 0.3: "value by 0.3", 1: "**key and value**", 3: "value by 3"}
    found = read_results(folder)
    return controlled(found, titles, 1, 0, lambda result: result["options"].get("value_weight", 1)) + (
        " *Key alone*: rows are coded under `C_q`; *key and value*, the default: under `C_q + λ Σ W_uvᵀ W_uv`; *value "
        "by w*: with λ times w (`value_weight`). `python recipes/run.py recipes/latent.yaml`."
    )


def shared_kv(folder: Path) -> str:
    """What it is worth to code keys for the queries of all layers that read them, of recipes/shared_kv.yaml."""
    titles = {"own": "queries of one layer", "all": "**of all readers**"}

    def readers(result: dict[str, Any]) -> Any:
        return result["protocol"].get("calibration_readers", "all") if result["calibrated"] else None

    return controlled(read_results(folder), {None: "uncalibrated", **titles}, "all", "own", readers) + (
        " Two of six layers store keys and values, and three layers read each. *Queries of one layer*: `C_q` of the "
        'layer that stores them (`calibrate(..., readers="own")`). `python recipes/run.py recipes/shared_kv.yaml`.'
    )


def controlled(
    found: Sequence[dict[str, Any]], titles: dict[Any, str], default: Any, control: Any,
    kind: Callable[[dict[str, Any]], Any],
) -> str:  # fmt: skip
    """KL by bits and by what a control changes.

    Args:
        found: results of a recipe.
        titles: of the columns, by what ``kind`` tells of a result.
        default, control: kinds that the last columns compare.
    """
    cells = dict[str, dict[Any, dict[str, Any]]]()
    for result in found:
        bits = result["options"].get("k_bits")
        row = ("default bits" if bits is None else f"{bits} bits") + ("" if result["calibrated"] else ", uncalibrated")
        row = row if kind(result) is not None else row.removesuffix(", uncalibrated")
        cells.setdefault(row, {})[kind(result)] = result["score"]
    rows = []
    for name, of_kind in cells.items():
        shown = [f"{of_kind[k]['mean_kl']:.2g}" if k in of_kind else "" for k in titles]
        a, b = of_kind[default], of_kind[control]
        lower = sum(x < y for x, y in zip(a["kl_by_row"], b["kl_by_row"], strict=True))
        rows.append([name, *shown, f"{a['mean_kl'] / b['mean_kl']:.2f}", f"{lower} of {len(a['kl_by_row'])}"])
    p, score = found[0]["protocol"], found[0]["score"]
    header = ["bits", *titles.values(), f"ratio to {titles[control]}", "lower in rows"]
    return markdown_table(header, rows) + (
        f"\n\nKL in nats; {found[0]['model']}, {p['dtype']}, perplexity {score['exact_perplexity']:.0f}; {p['rows']} "
        f"rows of {p['row_length']} tokens, prefill {p['prefill']}, chunks of {p['chunk']}; calibration on "
        f"{p['calibration_tokens']} tokens."
    )


def calibration_size(result: dict[str, Any]) -> str:
    """KL by how much text of what kind there was to calibrate on, against no calibration."""
    presets = list(result["without"])
    header = ["calibrated on", "effective tokens", "used", *(f"KL, `{name}`" for name in presets)]
    rows = [["nothing", "", "", *(number(result["without"][name], 4) for name in presets)]]
    for kind, entry in result["kinds"].items():
        used = "yes" if entry["used"] else "no"
        rows.append([kind, str(entry["effective"]), used, *(number(entry["kl"][name], 4) for name in presets)])
    return markdown_table(header, rows) + (
        f"\n\n{result['model']}, {result['dtype']}; KL in nats over {result['rows']} rows of {result['row_length']} "
        f"tokens of {result['text']}, calibrations on {result['calibration_text']}. One that is not used leaves the KL "
        "at that of none; `python recipes/calibration_size.py`."
    )


def first_minutes(result: dict[str, Any]) -> str:
    """What a newcomer's commands took, by the clock."""
    rows = []
    for step in result["steps"]:
        told = [str(step[name]) for name in ("commit", "threads", "load")]
        rows.append([f"`{step['command']}`", step["where"], *told, number(step["seconds"], 0)])
    return markdown_table(["command", "where", "commit", "threads", "load", "seconds"], rows, left=3)
