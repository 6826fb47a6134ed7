"""Decode attention over packed tokens against bf16 kernels, in one process.

``python -m headq_ao.evals.benchmarks.bench_decode --help``.
"""

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm.auto import tqdm

from headq_ao.evals.benchmarks import bench_kernels
from headq_ao.evals.benchmarks.bench_real import REAL_TOKENS, real_error
from headq_ao.evals.benchmarks.bench_result import CheckFailedError, add_result_options, check_whole, each
from headq_ao.evals.benchmarks.bench_rows import (
    BF16_LIMIT,
    LIMIT,
    Packed,
    Shape,
    check,
    exact_attention,
    random_packed,
)
from headq_ao.evals.benchmarks.bench_timing import (
    BUDGET,
    Call,
    bursts,
    cache_bytes,
    cold_copies,
    linear_fit,
    load_average,
)
from headq_ao.evals.harness.environment import environment, write_json
from headq_ao.evals.harness.inputs import SMOLLM2
from headq_ao.evals.harness.table import markdown_table
from headq_ao.ops.layout import PIECES
from headq_ao.ops.paged_attention import reference

SHAPES = ("32/8/128", "9/3/64", "8/1/256")
CONTEXTS = (1024, 4096, 16384, 65536)
THREADS = (1, 2)
Bits = Mapping[tuple[int, int], int]  # of KV heads with these code bits of keys and values, how many
MIX = "default"
# what the default config gives the 90 KV heads of SmolLM2 ("real" of a result has it again)
DEFAULT_MIX = (
    "2/2:31", "3/3:16", "1/1:13", "2/1:9", "4/3:6", "3/2:5", "1/2:2", "5/4:2", "3/4:2", "4/4:2", "4/2:1", "2/3:1",
)  # fmt: skip
BASELINES = {
    "bf16": "bf16 C++",
    "folded": "SDPA bf16, query group folded into q_len",
    "gqa": "SDPA bf16, enable_gqa",
    "compiled": "the operator's reference, torch.compile",
    "external": "bf16 C++ of --external",
}
PROBES = ("read", "int8")
QUERY_PARTS = 2  # int8 parts of a query or a weight, which one code is multiplied with
EPILOG = """\
Each cell is one layer, batch 1, one new token: headq_ao.ops.paged_attention over packed tokens, mapping the query and
reading out of the basis included, and, on the same tokens rounded to bf16, the baselines. First all outputs are
compared with exact attention over the dequantized tokens; when one is off, nothing is reported and the exit status is
1. Then all methods take turns, burst by burst, over copies of their tokens that together exceed the last-level cache
three times. Times are medians: CPU time of the thread with one thread, wall time with more. Read bandwidth and int8
peak are measured in the same turns.

examples:
  python -m headq_ao.evals.benchmarks.bench_decode --json bench_decode.json --plot bench_decode.png
  python -m headq_ao.evals.benchmarks.bench_decode --shapes 9/3/64 --contexts 4096 --threads 1 --real none
  python -m headq_ao.evals.benchmarks.bench_decode --k-bits 2 3 4 --v-bits 2 2 4  three settings and the mix
"""


def measure(
    shape: Shape,
    context: int,
    settings: Mapping[str, Bits],
    threads: Sequence[int],
    baselines: Sequence[str],
    source: Path | None = None,
    repeats: int = 7,
    budget: float = BUDGET,
    report: Callable[[dict[str, Any]], None] = lambda cell: None,
) -> list[dict[str, Any]]:
    """Check and time all methods at one shape and context.

    Args:
        shape: of the layer.
        context: packed tokens per KV head, a multiple of 32.
        settings: by name, how many heads have which code bits of keys and values; a time is the mean over layers whose
            heads all have the same, as many as there are such heads.
            Baselines run on the tokens of the first setting's first layer.
        threads: numbers of threads, one cell each.
        baselines: of :data:`BASELINES`.
        source: C++ file of the ``"external"`` baseline.
        repeats, budget: bursts of each method and their seconds.
        report: gets each cell as soon as it is there.

    Returns:
        Cells: ``shape``, ``context``, ``threads``, ``probes`` (``read_gbs``, ``int8_gops``), ``methods`` by name with
        ``ms``, ``bursts_ms``, ``bytes``, ``gbs``, ``read_share``, for packed ones ``gops`` and ``int8_share``, and the
        ``error``; and ``speedup`` of each packed method over each baseline, the median over neighbouring bursts.

    Raises:
        CheckFailedError: when an output differs from exact attention.

    Example:
        >>> from headq_ao.evals.benchmarks.bench_decode import measure
        >>> from headq_ao.evals.benchmarks.bench_rows import Shape
        >>> settings = {"k2v2": {(2, 2): 1}}
        >>> (cell,) = measure(Shape(2, 1, 64), 64, settings, [1], ["bf16"], repeats=1, budget=0.0)
        >>> sorted(cell["methods"]), cell["methods"]["k2v2"]["error"] < 1e-3, list(cell["speedup"]["k2v2"])
        (['bf16', 'k2v2'], True, ['bf16'])
    """
    before = torch.get_num_threads()
    pairs = {pair: None for bits in settings.values() for pair in bits}
    rows = {pair: random_packed(shape, context, *pair) for pair in pairs}
    exact = {pair: exact_attention(x.q, *x.dequantize(), shape.scaling) for pair, x in rows.items()}
    cells = []
    try:
        for n in threads:
            torch.set_num_threads(n)
            methods, about = {}, {}
            for name, bits in settings.items():
                methods[name], about[name] = packed_method(bits, rows, exact)
            methods |= probes(n)
            first, target = next(iter(rows.values())), next(iter(exact.values()))
            bf16 = [x.bfloat16() for x in first.dequantize()]
            for name in baselines:
                made = baseline(name, first, bf16, target, source)
                if made is not None:
                    methods[name], about[name] = made
            cells.append(cell(shape, context, n, bursts(methods, n, repeats, budget), about))
            report(cells[-1])
    finally:
        torch.set_num_threads(before)
    return cells


def packed_method(
    bits: Bits, rows: Mapping[tuple[int, int], Packed], exact: Mapping[tuple[int, int], Tensor]
) -> tuple[list[Call], dict[str, Any]]:
    """Checked calls of the operator on the cold tokens of that many layers each, the heads of a layer alike."""
    errors, layers = [], []
    for pair, n in bits.items():
        x = rows[pair]
        where = f"{pair[0]} and {pair[1]} bits, {x.shape}, {x.tokens} tokens"
        errors.append(check("packed attention", x.attend()().reshape(x.q.shape), exact[pair], LIMIT, where))
        layers += [x] * n
    n_bytes = sum(x.n_bytes for x in layers)
    number = cold_copies(n_bytes)
    stores = [x.copies(number) for x in layers]

    def call(i: int) -> Call:
        work = [x.attend(store[i]) for x, store in zip(layers, stores, strict=True)]
        return lambda: [attend() for attend in work]

    x = layers[0]
    products = QUERY_PARTS * x.shape.heads * x.tokens * 2 * x.shape.head_dim
    facts = {"bytes": n_bytes / len(layers), "operations": 2 * products, "error": max(errors), "layers": len(layers)}
    return [call(i) for i in range(number)], facts


def probes(threads: int) -> dict[str, list[Call]]:
    """What the machine can do at this moment: reading memory, and int8 dot products."""
    lib = bench_kernels.library()
    read, rounds = bench_kernels.reader(threads), bench_kernels.INT8_ROUNDS
    sink = torch.tensor([1, 1, 0], dtype=torch.int32)
    return {"read": [read], "int8": [lambda: lib.bench_int8(rounds, threads, sink.data_ptr())]}


def baseline(
    name: str, rows: Packed, bf16: Sequence[Tensor], exact: Tensor, source: Path | None
) -> tuple[list[Call], dict[str, Any]] | None:
    """Checked calls of a baseline; None where the external source does not know the shape."""
    where = f"{rows.shape}, {rows.tokens} tokens"
    if name == "compiled":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.compile(reference.paged_attention, fullgraph=True, dynamic=False)
            out = rows.attend_compiled(compiled)().reshape(exact.shape)
        calls: list[Call] = [rows.attend_compiled(compiled, kv) for kv in rows.copies(cold_copies(rows.n_bytes))]
        return calls, {"bytes": rows.n_bytes, "error": check(name, out, exact, LIMIT, where)}
    make = bf16_method(name, rows, source)
    if make is None:
        return None
    k, v = bf16
    error = check(name, make(k, v)().reshape(exact.shape), exact, BF16_LIMIT, where)
    pairs = [(k, v), *((k.clone(), v.clone()) for _ in range(cold_copies(k.nbytes + v.nbytes) - 1))]
    return [make(*pair) for pair in pairs], {"bytes": k.nbytes + v.nbytes, "error": error}


def bf16_method(name: str, rows: Packed, source: Path | None) -> Callable[[Tensor, Tensor], Call] | None:
    """``(k, v) → call`` for ``[Hkv, T, D]`` bf16 tokens."""
    q, scaling = rows.q, rows.shape.scaling
    if name == "bf16":
        return lambda k, v: bench_kernels.bf16_call(q, k, v, scaling)
    if name == "folded":
        folded = q.bfloat16()[None]
        return lambda k, v: partial(scaled_dot_product_attention, folded, k[None], v[None], scale=scaling)
    if name == "gqa":
        flat = q.bfloat16().reshape(1, rows.shape.heads, 1, -1)
        return lambda k, v: partial(
            scaled_dot_product_attention, flat, k[None], v[None], scale=scaling, enable_gqa=True
        )
    if source is None:
        raise ValueError("the external baseline needs its source: --external PATH")
    make = bench_kernels.external(source, rows.shape.head_dim, rows.shape.group)
    return None if make is None else partial(make, q)


def cell(
    shape: Shape, context: int, threads: int, found: dict[str, list[float]], about: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Medians, rates and ratios of a cell, as plain data."""
    times = {name: [t / facts.get("layers", 1) for t in found[name]] for name, facts in about.items()}
    read = bench_kernels.READ_BYTES / statistics.median(found["read"]) / 1e6
    int8 = 2 * bench_kernels.int8_products(threads) / statistics.median(found["int8"]) / 1e6
    methods = {}
    for name, facts in about.items():
        ms = statistics.median(times[name])
        gbs = facts["bytes"] / ms / 1e6
        methods[name] = {
            "ms": ms, "bytes": facts["bytes"], "gbs": gbs, "read_share": gbs / read, "error": facts["error"],
            "bursts_ms": times[name],
        }  # fmt: skip
        if "operations" in facts:
            gops = facts["operations"] / ms / 1e6
            methods[name] |= {"gops": gops, "int8_share": gops / int8}
    others = [name for name in about if name in BASELINES]
    speedup = {
        name: {b: statistics.median(y / x for x, y in zip(times[name], times[b], strict=True)) for b in others}
        for name in about
        if name not in BASELINES
    }
    place = {"shape": str(shape), "context": context, "threads": threads}
    return {**place, "probes": {"read_gbs": read, "int8_gops": int8}, "methods": methods, "speedup": speedup}


def result_table(result: dict[str, Any]) -> str:
    """The table of a result, numbers of threads side by side.

    Raises:
        ValueError: when the result is not whole.
    """
    check_whole(result)
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for c in result["cells"]:
        groups.setdefault((c["shape"], c["context"]), []).append(c)
    shown = [b for b in BASELINES if any(b in c["methods"] for c in result["cells"])]
    titles = {"bf16": "bf16 C++", "folded": "SDPA folded", "gqa": "SDPA gqa", "compiled": "compiled"}
    head = ["heads", "context", "bits", "ms", "GB/s (of read)", "int8 peak", "bf16 C++ (of read)"]
    head += [f"× {titles.get(b, b)}" for b in shown]
    rows = []
    for (shape, context), cells in groups.items():
        for name in cells[0]["speedup"]:
            of = [c["methods"][name] for c in cells]
            own = [c["methods"].get("bf16") for c in cells]
            rows.append([
                shape, f"{context:,}", label(name), each(of, lambda m: f"{m['ms']:.3g}"),
                each(of, lambda m: f"{m['gbs']:.3g} ({m['read_share']:.0%})"),
                each(of, lambda m: f"{m['int8_share']:.0%}"), each(own, lambda m: f"{m['read_share']:.0%}"),
                *(each([c["speedup"][name].get(b) for c in cells], lambda x: f"{x:.3g}") for b in shown),
            ])  # fmt: skip
    return markdown_table(head, rows) + "\n\n" + notes(result)


def label(setting: str) -> str:
    """A setting's bits of keys and values."""
    return "mix of the default" if setting == MIX else setting[1:].replace("v", " / ")


def notes(result: dict[str, Any]) -> str:
    """The lines below the table."""
    env, real = result["environment"], result.get("real")
    threads = " / ".join(str(n) for n in result["threads"])
    peaks = {n: [c["probes"] for c in result["cells"] if c["threads"] == n] for n in result["threads"]}
    read = " / ".join(f"{statistics.median(p['read_gbs'] for p in x):.3g}" for x in peaks.values())
    int8 = " / ".join(f"{statistics.median(p['int8_gops'] for p in x):,.0f}" for x in peaks.values())
    error = max(m["error"] for c in result["cells"] for name, m in c["methods"].items() if name not in BASELINES)
    note = f". {result['note']}" if "note" in result else ""
    text = (
        f"One layer, one new token, batch 1; query heads/KV heads/head_dim; {threads} threads of {env['cpu']}, which "
        f"reads {read} GB/s and does {int8} int8 GOPS; medians, cold tokens. × : times as fast as{note}. "
        f"Relative error against exact attention over the same tokens: at most {error:.1e}"
    )
    if real:
        text += (
            f"; on q, k, v of {real['model']} ({real['tokens']} tokens, {real['bits']}) {real['mean']:.1e} on average, "
            f"{real['max']:.1e} in the worst layer"
        )
    return text + growth(result) + ". `python -m headq_ao.evals.benchmarks.bench_decode`."


def growth(result: dict[str, Any]) -> str:
    """How time grows with the context, for each shape: a line through the times of one thread; from 3 contexts on."""
    lines = {}
    for shape in dict.fromkeys(c["shape"] for c in result["cells"]):
        cells = [c for c in result["cells"] if c["shape"] == shape and c["threads"] == 1 and MIX in c["methods"]]
        if len(cells) > 2:
            lines[shape] = linear_fit([c["context"] / 1024 for c in cells], [c["methods"][MIX]["ms"] for c in cells])
    fits = (f"{shape} {1e3 * x['at_0']:.0f} + {1e3 * x['slope']:.1f} (R² {x['r2']:.5f})" for shape, x in lines.items())
    return f". µs of one thread and µs per 1024 tokens, {label(MIX)}: {', '.join(fits)}" if lines else ""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m headq_ao.evals.benchmarks.bench_decode",
        description="Time attention of one token over packed tokens against bf16 kernels.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, default = p.add_argument, "(default: %(default)s)"
    add("--shapes", nargs="+", default=list(SHAPES), help=f"query heads/KV heads/head_dim {default}")
    add("--contexts", nargs="+", type=int, default=list(CONTEXTS), help=f"packed tokens per head {default}")
    add("--threads", nargs="+", type=int, default=list(THREADS), help=f"numbers of threads {default}")
    add("--k-bits", nargs="+", type=int, default=[2], help=f"code bits of keys, one per setting {default}")
    add("--v-bits", nargs="+", type=int, default=[2], help=f"code bits of values, one per setting {default}")
    add("--mix", nargs="+", default=list(DEFAULT_MIX), help=f"K/V:HEADS of one more setting, or none {default}")
    usual = [b for b in BASELINES if b != "external"]
    add("--baselines", nargs="+", choices=usual, default=usual, help=f"what to compare with {default}")
    add("--external", type=Path, help="C++ file with dbf_D_G(k, v, q, out, heads, tokens, threads), one more baseline")
    add("--repeats", type=int, default=7, help=f"bursts of each method {default}")
    add("--budget", type=float, default=BUDGET, help=f"seconds of a burst {default}")
    add(
        "--real",
        default=SMOLLM2,
        help=f"model whose q, k, v are checked too, with the default config, or none {default}",
    )
    add("--real-tokens", type=int, default=REAL_TOKENS, help=f"context of that check {default}")
    add_result_options(p)
    return p


def checked(args: argparse.Namespace) -> tuple[list[Shape], dict[str, Bits]]:
    """Shapes and settings of a command line; ValueError on what cannot be measured."""
    if len(args.k_bits) != len(args.v_bits):
        raise ValueError(f"--k-bits and --v-bits must be equally many, got {args.k_bits} and {args.v_bits}")
    settings: dict[str, Bits] = {f"k{k}v{v}": {(k, v): 1} for k, v in zip(args.k_bits, args.v_bits, strict=True)}
    if args.mix != ["none"]:
        settings[MIX] = dict(parse_mix(x) for x in args.mix)
    for k, v in (pair for bits in settings.values() for pair in bits):
        if k not in PIECES or v not in PIECES:
            raise ValueError(f"bits must be 1 to 6 or 8, got {k} and {v}")
    if min(args.threads) < 1 or args.repeats < 1:
        raise ValueError(f"threads and repeats must be at least 1, got {args.threads} and {args.repeats}")
    for context in args.contexts:
        if context < 32 or context % 32:
            raise ValueError(f"contexts must be multiples of 32, got {context}")
    return [Shape.parse(x) for x in args.shapes], settings


def parse_mix(text: str) -> tuple[tuple[int, int], int]:
    """``"3/2:4"`` as ``((3, 2), 4)``."""
    try:
        bits, heads = text.split(":")
        k, v = bits.split("/")
        return (int(k), int(v)), int(heads)
    except ValueError as error:
        raise ValueError(f"a part of the mix is K_BITS/V_BITS:HEADS, like 3/2:4, got {text!r}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    args = parser().parse_args(argv)
    try:
        shapes, settings = checked(args)
        if args.external is not None and not args.external.is_file():
            raise ValueError(f"no file {args.external.name!r} to take the external baseline from")
        baselines = [*args.baselines, *(["external"] if args.external is not None else [])]
        code_path = bench_kernels.code_path()
        real = None if args.real == "none" else real_error(args.real, args.real_tokens)
    except CheckFailedError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "complete": False, "threads": args.threads, "settings": settings_as_text(settings),
        "repeats": args.repeats, "bf16_code_path": code_path, "cache_bytes": cache_bytes(),
        "load_average": load_average(), "real": real, "cells": [],
        "environment": environment(),
    }  # fmt: skip

    def keep() -> None:
        if args.json is not None:
            write_json(args.json, result)

    def report(found: dict[str, Any]) -> None:
        result["cells"].append(found)
        keep()
        tqdm.write(summary(found), file=sys.stdout)
        bar.update()

    try:
        with tqdm(total=len(shapes) * len(args.contexts) * len(args.threads), unit="cell") as bar:
            for shape in shapes:
                torch.compiler.reset()  # beyond a number of recompilations, functions run uncompiled
                for context in args.contexts:
                    measure(
                        shape,
                        context,
                        settings,
                        args.threads,
                        baselines,
                        args.external,
                        args.repeats,
                        args.budget,
                        report,
                    )
    except CheckFailedError as error:
        result["refused"] = str(error)
        keep()
        print(f"refused: {error}", file=sys.stderr)
        return 1
    result["complete"] = True
    keep()
    if args.plot is not None:
        from headq_ao.evals.benchmarks.bench_plot import plot_decode

        plot_decode(result, args.plot)
    return 0


def settings_as_text(settings: Mapping[str, Bits]) -> dict[str, list[str]]:
    """Settings as plain data for JSON."""
    return {name: [f"{k}/{v}:{n}" for (k, v), n in bits.items()] for name, bits in settings.items()}


def summary(found: dict[str, Any]) -> str:
    """One cell in a line or two."""
    probes = found["probes"]
    lines = [
        f"{found['shape']}, {found['context']:,} tokens, {found['threads']} threads; machine: "
        f"{probes['read_gbs']:.1f} GB/s, {probes['int8_gops']:.0f} int8 GOPS"
    ]
    for name, m in found["methods"].items():
        line = f"  {name:9s}{m['ms']:9.3f} ms{m['gbs']:7.1f} GB/s{m['read_share']:7.0%} of read, error {m['error']:.1e}"
        if name in found["speedup"]:
            line += f",{m['int8_share']:4.0%} of int8; " + ", ".join(
                f"{x:.2f} × {b}" for b, x in found["speedup"][name].items()
            )
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
