"""Decoding from the packed cache and from DynamicCache, in turns.

``python -m headq_ao.evals.benchmarks.bench_generate --help``.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from headq_ao import headq_config, quantize_
from headq_ao.evals.benchmarks.bench_memory import (
    CACHES,
    TINY,
    calibration_of,
    held_bytes,
    load_model,
    new_cache,
    peaks,
    text_ids,
)
from headq_ao.evals.benchmarks.bench_result import CheckFailedError, add_result_options, check_whole, each
from headq_ao.evals.benchmarks.bench_timing import clock, linear_fit, load_average
from headq_ao.evals.harness.environment import environment, write_json
from headq_ao.evals.harness.inputs import SMOLLM2, describe
from headq_ao.evals.harness.table import markdown_table
from headq_ao.integrations.transformers.models import with_cache

CONTEXTS = (1024, 2048, 4096, 8192)
STEPS = 64
MEMORY = (f"{SMOLLM2}:8192", f"{TINY}:32768")
KL_LIMIT = 0.5  # nats between the next tokens of both caches; measured: below 0.02
EPILOG = """\
Both caches belong to one model in one process: the packed copy shares its weights. A context is filled by one prefill
call for each cache; then the caches take turns, one token at a time, A B A B. Times are medians of steps: CPU time of
the thread with one thread, wall time with more. Memory is resident memory of one fresh process for each cache. When
the two caches disagree on the next token, or no packed token was read, nothing is reported and the exit status is 1.

examples:
  python -m headq_ao.evals.benchmarks.bench_generate --json bench_generate.json --plot bench_generate.png
  python -m headq_ao.evals.benchmarks.bench_generate --contexts 1024 4096 --threads 1 --batch 1 --memory none
  python -m headq_ao.evals.benchmarks.bench_generate --model tiny --contexts 32768 --memory none --no-calibration
"""

Models = dict[str, Any]


def both(model: Any, config: Any) -> Models:
    """The model as it is, and a copy with HeadQ that shares its weights."""
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    packed = copy.deepcopy(model, shared)
    quantize_(packed, config)
    return {"dense": model, "packed": packed}


@torch.no_grad()
def filled(models: Models, ids: Tensor) -> dict[str, Any]:
    """A cache of each kind that holds ``ids [1, T]``, by one call each."""
    caches = {kind: new_cache(kind, model) for kind, model in models.items()}
    for kind, cache in caches.items():
        models[kind](ids, **with_cache(cache), logits_to_keep=1)
    return caches


@torch.no_grad()
def agreement(models: Models, caches: dict[str, Any], ids: Tensor) -> float:
    """KL in nats between the next tokens of both caches, after one step; the check that lets a run report.

    Raises:
        CheckFailedError: when it is too large, or the packed cache read no packed token.
    """
    logits = [models[kind](ids, **with_cache(caches[kind]), logits_to_keep=1).logits[:, -1].double() for kind in CACHES]
    exact, packed = (x.log_softmax(-1) for x in logits)
    kl = float((exact.exp() * (exact - packed)).sum(-1).max())
    if not kl <= KL_LIMIT:
        raise CheckFailedError(f"the next token from the packed cache differs by {kl:.2g} nats, more than {KL_LIMIT}")
    if caches["packed"].packed_fraction == 0:
        raise CheckFailedError("no packed token was read: take longer contexts")
    return kl


@torch.no_grad()
def decode(models: Models, caches: dict[str, Any], ids: Tensor, steps: int, threads: int) -> dict[str, Any]:
    """Time ``steps`` steps of each cache in turns.

    Args:
        models, caches: by kind; the caches grow.
        ids: the token that each step feeds, ``[B, 1]``.
        steps: of each; without a calibration, whole pages of tokens, which are packed together.
        threads: that torch uses.

    Returns:
        By kind ``ms`` (median), ``ms_mean``, ``steps_ms`` and ``cache_bytes``; ``speedup``, the median over
        neighbouring steps.
    """
    now = clock(threads)
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(steps):
        for kind, model in models.items():
            start = now()
            model(ids, **with_cache(caches[kind]), logits_to_keep=1)
            times[kind].append(1e3 * (now() - start))
    result: dict[str, Any] = {
        kind: {
            "ms": statistics.median(x), "ms_mean": statistics.fmean(x), "steps_ms": x,
            "cache_bytes": held_bytes(caches[kind]),
        }
        for kind, x in times.items()
    }  # fmt: skip
    pairs = zip(times["dense"], times["packed"], strict=True)
    return result | {"speedup": statistics.median(a / b for a, b in pairs)}


@torch.no_grad()
def prefill(models: Models, ids: Tensor, repeats: int, threads: int) -> dict[str, Any]:
    """Seconds of one call over ``ids [1, T]`` for each cache, in turns, and the median ratio packed / dense."""
    now = clock(threads)
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(repeats):
        for kind, model in models.items():
            cache = new_cache(kind, model)
            start = now()
            model(ids, **with_cache(cache), logits_to_keep=1)
            times[kind].append(now() - start)
    ratio = statistics.median(b / a for a, b in zip(times["dense"], times["packed"], strict=True))
    middle = {kind: statistics.median(x) for kind, x in times.items()}
    return {"context": ids.shape[1], "threads": threads, **middle, "ratio": ratio, "all": times}


def fits(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How ms per token grow with the context, batch 1, for each number of threads and cache; from 3 contexts on."""
    found = []
    for threads in dict.fromkeys(c["threads"] for c in cells):
        line = [c for c in cells if c["threads"] == threads and c["batch"] == 1]
        if len(line) < 3:
            continue
        for kind in CACHES:
            fit = linear_fit([c["context"] / 1024 for c in line], [c[kind]["ms"] for c in line])
            found.append({"threads": threads, "cache": kind, **fit})
    return found


def result_table(result: dict[str, Any]) -> str:
    """The table of a result, numbers of threads side by side.

    Raises:
        ValueError: when the result is not whole.
    """
    check_whole(result)
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for c in result["cells"]:
        groups.setdefault((c["batch"], c["context"]), []).append(c)
    head = ["batch", "context", "DynamicCache, ms", "HeadQ, ms", "times as fast", "cache, MB"]
    rows = []
    for (batch, context), cells in groups.items():
        sizes = [f"{cells[0][kind]['cache_bytes'] / 1e6:.1f}" for kind in CACHES]
        ms = [each([c[kind]["ms"] for c in cells], lambda x: f"{x:.1f}") for kind in CACHES]
        rows.append([
            str(batch), f"{context:,}", *ms, each(cells, lambda c: f"{c['speedup']:.2f}"), " → ".join(sizes),
        ])  # fmt: skip
    return markdown_table(head, rows, left=0) + "\n\n" + notes(result)


def notes(result: dict[str, Any]) -> str:
    """The lines below the table."""
    env = result["environment"]
    text = (
        f"{result['model']}, float32, one decoding step; {' / '.join(map(str, result['threads']))} threads of "
        f"{env['cpu']}, caches in turns, medians"
    )
    if result["prefill"]:
        ratios = each(result["prefill"], lambda p: f"{p['ratio']:.3f}")
        text += f". Prefill of {result['prefill'][0]['context']:,} tokens takes {ratios} times as long as DynamicCache"
    for fit in result["fits"]:
        name = "HeadQ" if fit["cache"] == "packed" else "DynamicCache"
        text += (
            f". {name}, {fit['threads']} threads: {fit['at_0']:.1f} ms {fit['slope']:+.2f} ms per 1024 tokens "
            f"(R² {fit['r2']:.4f})"
        )
    for m in result["memory"]:
        above = [(max(m[k]["prefill_peak"], m[k]["decode_peak"]) - m[k]["before"]) / 1e6 for k in CACHES]
        steady = [(m[k]["decode_peak"] - m[k]["before"]) / 1e6 for k in CACHES]
        text += (
            f". Memory above the model, {m['model']}, {m['context']:,} tokens, DynamicCache → HeadQ: {above[0]:.0f} → "
            f"{above[1]:.0f} MB at the peak, {steady[0]:.0f} → {steady[1]:.0f} MB while decoding, of which the cache "
            f"is {m['dense']['cache'] / 1e6:.0f} → {m['packed']['cache'] / 1e6:.0f} MB"
        )
    return text + ". `python -m headq_ao.evals.benchmarks.bench_generate`."


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m headq_ao.evals.benchmarks.bench_generate",
        description="Time and memory of decoding with the packed cache against DynamicCache.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, default = p.add_argument, "(default: %(default)s)"
    add("--model", default=SMOLLM2, help=f"'smollm2', 'tiny' (random weights) or what transformers loads {default}")
    add("--preset", help="of headq_config (default: balanced)")
    add("--no-calibration", action="store_true", help="statistics from the prompt (default: the bundled text's)")
    add("--contexts", nargs="+", type=int, default=list(CONTEXTS), help=f"tokens before the first step {default}")
    add("--threads", nargs="+", type=int, default=[1, 2], help=f"numbers of threads {default}")
    add("--steps", type=int, default=STEPS, help=f"of each cache, whole blocks {default}")
    add("--batch", nargs="+", type=int, default=[8], help=f"batch sizes at --batch-context, besides 1 {default}")
    add("--batch-context", type=int, default=4096, help=f"{default}")
    add("--prefill-context", type=int, default=4096, help=f"tokens of the prefill that is timed, 0: none {default}")
    add("--prefill-repeats", type=int, default=3, help=f"{default}")
    add("--memory", nargs="+", default=list(MEMORY), help=f"MODEL:TOKENS whose peak is measured, or none {default}")
    add_result_options(p)
    return p


def checked(args: argparse.Namespace) -> tuple[list[tuple[int, int]], list[tuple[str, int]]]:
    """``(batch, context)`` cells and ``(model, tokens)`` of the memory; ValueError on what cannot be measured."""
    cells = [(1, context) for context in args.contexts]
    cells += [(batch, args.batch_context) for batch in args.batch if batch != 1]
    if min(min(cell) for cell in cells) < 1 or min(args.threads) < 1 or args.prefill_repeats < 1:
        raise ValueError("batch sizes, contexts, threads and repeats must be at least 1")
    if args.steps < 32 or args.steps % 32:
        raise ValueError(f"steps must be a multiple of 32, the tokens of a page, got {args.steps}")
    memory = []
    for text in args.memory if args.memory != ["none"] else []:
        name, colon, tokens = text.rpartition(":")
        if not colon or not tokens.isdigit():
            raise ValueError(f"--memory takes MODEL:TOKENS, like smollm2:8192, got {text!r}")
        memory.append((name, int(tokens)))
    return cells, memory


def run(args: argparse.Namespace, models: Models, tokenizer: Any, cells: Sequence[tuple[int, int]],
        memory: Sequence[tuple[str, int]], calibration: Any, result: dict[str, Any],
        keep: Callable[[], None]) -> None:  # fmt: skip
    """Measure everything into ``result``, and ``keep`` after each part."""
    parts = len(cells) * len(args.threads) + (len(args.threads) if args.prefill_context else 0) + len(memory)
    with tqdm(total=parts, unit="part") as bar:

        def done(line: str) -> None:
            result["fits"] = fits(result["cells"])
            keep()
            tqdm.write(line, file=sys.stdout)
            bar.update()

        for batch, context in cells:
            torch.set_num_threads(max(args.threads))
            bar.set_description(f"filling {context}")
            ids = text_ids(tokenizer, context)
            caches = filled(models, ids)
            if batch > 1:
                for cache in caches.values():
                    cache.batch_repeat_interleave(batch)
            token = ids[:, -1:].repeat(batch, 1)
            kl = agreement(models, caches, token)
            bar.set_description(f"decoding {batch} × {context}")
            for threads in args.threads:
                torch.set_num_threads(threads)
                decode(models, caches, token, 2, threads)  # warms up
                found = decode(models, caches, token, args.steps, threads)
                result["cells"].append({"batch": batch, "context": context, "threads": threads, "kl": kl, **found})
                done(summary(result["cells"][-1]))
            del caches
        for threads in args.threads if args.prefill_context else ():
            torch.set_num_threads(threads)
            bar.set_description(f"prefill {args.prefill_context}")
            ids = text_ids(tokenizer, args.prefill_context)
            found = prefill(models, ids, args.prefill_repeats, threads)
            result["prefill"].append(found)
            done(
                f"prefill of {args.prefill_context} tokens, {threads} threads: dense {found['dense']:.2f} s, packed "
                f"{found['packed']:.2f} s, {found['ratio']:.3f} times as long"
            )
        for name, tokens in memory:
            bar.set_description(f"memory {name}")
            with tempfile.TemporaryDirectory() as folder:
                path = None
                if calibration is not None and name == args.model:
                    path = Path(folder) / "calibration.safetensors"
                    calibration.save(path)
                found = peaks(name, tokens, args.preset, path, max(args.threads))
            result["memory"].append(found)
            above = ", ".join(
                f"{kind} {(found[kind]['prefill_peak'] - found[kind]['before']) / 1e6:.0f} MB at the peak of prefill, "
                f"{(found[kind]['decode_peak'] - found[kind]['before']) / 1e6:.0f} MB in decoding, cache "
                f"{found[kind]['cache'] / 1e6:.1f} MB"
                for kind in CACHES
            )
            done(f"memory above the model, {name}, {tokens} tokens: {above}")


def summary(found: dict[str, Any]) -> str:
    """One cell in a line."""
    return (
        f"batch {found['batch']}, {found['context']:,} tokens, {found['threads']} threads: dense "
        f"{found['dense']['ms']:.1f} ms, packed {found['packed']['ms']:.1f} ms, {found['speedup']:.2f} times as fast; "
        f"means {found['dense']['ms_mean']:.1f} and {found['packed']['ms_mean']:.1f}; KL {found['kl']:.4f}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    args = parser().parse_args(argv)
    try:
        cells, memory = checked(args)
        headq_config(args.preset)
        model, tokenizer = load_model(args.model, max(c for _, c in cells) + 4096)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    before = torch.get_num_threads()
    torch.set_num_threads(max(args.threads))
    calibration = None if args.no_calibration else calibration_of(model, tokenizer)
    config = headq_config(args.preset, calibration=calibration)
    result: dict[str, Any] = {
        "complete": False, "model": Path(args.model).name, "threads": args.threads, "steps": args.steps,
        "config": describe(config), "load_average": load_average(),
        "cells": [], "prefill": [], "memory": [], "fits": [], "environment": environment(),
    }  # fmt: skip

    def keep() -> None:
        if args.json is not None:
            write_json(args.json, result)

    start = time.perf_counter()
    try:
        run(args, both(model, config), tokenizer, cells, memory, calibration, result, keep)
    except RuntimeError as error:  # a failed check, or a memory process that did
        result["refused"] = str(error)
        keep()
        print(f"refused: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(before)
    result |= {"complete": True, "seconds": time.perf_counter() - start}
    keep()
    if args.plot is not None:
        from headq_ao.evals.benchmarks.bench_plot import plot_generate

        plot_generate(result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
