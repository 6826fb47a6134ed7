"""Decoding on a GPU, packed tokens against dense bf16: ``python -m headq_ao.evals.benchmarks.bench_gpu --help``.

Every kernel is held to the reference on the same device first; where one fails, nothing is timed. Without a CUDA or
HIP device the command says that it did not run.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm.auto import tqdm

from headq_ao.evals.benchmarks.bench_gpu_model import measure_steps, step_cells
from headq_ao.evals.benchmarks.bench_result import add_result_options, check_whole, speedup
from headq_ao.evals.benchmarks.bench_rows import relative_error
from headq_ao.evals.benchmarks.triton_table import CASES, Case
from headq_ao.evals.harness.environment import environment, write_json
from headq_ao.evals.harness.table import fill_readme, markdown_table
from headq_ao.ops import feedback_codes, paged_attention
from headq_ao.ops.error_feedback import reference
from headq_ao.ops.error_feedback.reference import PASSES, SPREADS
from headq_ao.ops.page_layout import GroupLayout, PageLayout, Side
from headq_ao.ops.paged_attention import reference as attention_reference
from headq_ao.ops.types import PagedKV, Readers

RESULT = Path(__file__).resolve().parents[2] / "recipes" / "results" / "triton" / "bench_gpu.json"
OUTPUT_ERROR = 1e-3  # relative, of the output
BF16_ERROR = 1e-2  # of a dense kernel, which rounds its output
SAME_ROWS = 0.98  # of feedback_codes: a tie may fall either way
PAGE, SINKS, WINDOW, RING = 32, 4, 80, 96  # tokens, as caches have them by default
COLD_BYTES = 200e6  # rotated over, so that rows come from memory and not from the cache
BASELINES = {"bf16": "bf16 Triton", "gqa": "SDPA enable_gqa", "folded": "SDPA folded"}
EPILOG = """\
Times are device times of one decoded token in one layer: calls on different tokens, more than the caches hold, are
captured as one CUDA graph, and the median of its replays counts. The operator maps the query, attends and goes back
to the values' basis. Baselines read bf16 keys and values: a split-KV kernel of our own, SDPA with enable_gqa, and SDPA
with the query group folded into the query length. "And exact rows" attends over sinks and window besides: that is
compared with the baselines. What a layer does around attention is not timed. "Steps" decode with a model of random
weights, eagerly, its packed cache and a DynamicCache in turns: wall time with the device idle at both ends.

examples:
  python -m headq_ao.evals.benchmarks.bench_gpu --json bench_gpu.json
  python -m headq_ao.evals.benchmarks.bench_gpu --cells 1x131072 --steps none     one length, kernels alone
  python -m headq_ao.evals.benchmarks.bench_gpu --readme README.md --plot gpu.png  only the table and the figure
"""


def packed(
    case: Case, tokens: int, device: torch.device, seed: int = 0, batch: int = 1, window: bool = False
) -> tuple[Tensor, float, PagedKV, Readers]:
    """Arguments of ``paged_attention`` for one query over ``tokens`` random packed ones, all in pages.

    Scores are of a few nats. With ``window``, sinks and window are full, in bf16; else they are empty.

    Example:
        >>> q, scaling, kv, readers = packed(Case(4, 2, 64, 2, 2), 64, torch.device("cpu"))
        >>> kv.pages[0].shape, kv.table.tolist(), readers.query_map.shape
        (torch.Size([3, 2, 2, 4, 16, 4]), [[1, 2]], torch.Size([1, 1, 2, 64, 67]))
    """
    g, (hkv, d) = torch.Generator(device).manual_seed(seed), (case.kv_heads, case.head_dim)
    draw = lambda *size: torch.randn(*size, generator=g, device=device)  # noqa: E731
    layout = PageLayout(PAGE, d, d, (GroupLayout(0, hkv, Side((case.k_bits,) * d), Side((case.v_bits,))),))
    columns = -(-tokens // PAGE)
    pages = layout.allocate(batch * columns + 1, torch.bfloat16, device)
    for x in pages:
        if x.dtype == torch.uint8:
            x.copy_(torch.randint(256, x.shape, dtype=torch.uint8, generator=g, device=device))
        else:
            x.copy_(0.5 + torch.rand(x.shape, generator=g, device=device))
    table = torch.arange(1, batch * columns + 1, dtype=torch.int32, device=device).view(batch, columns)
    sinks, beside = (SINKS, SINKS + WINDOW) if window else (0, 0)
    length = torch.full((batch,), tokens, device=device)
    k, v = (draw(batch, hkv, sinks + RING, d).bfloat16() for _ in range(2))
    kv = PagedKV(pages, layout.spec, table, None, length, length + beside, length + beside, k, v, sinks)
    query_map = torch.zeros(1, 1, hkv, d, d + 3, device=device)
    query_map[..., :d] = draw(hkv, d, d) / (2**case.k_bits * d**0.5)
    readers = Readers(query_map, draw(1, hkv, d, d) / d**0.5, draw(1, hkv, d))
    return draw(batch, case.heads, 1, d).bfloat16(), d**-0.5, kv, readers


def output_errors(case: Case, batch: int, tokens: int, device: torch.device) -> tuple[float, ...]:
    """Relative errors of ``paged_attention`` against the reference in fp64 on the same tokens, without and with a
    window."""
    errors = []
    for window in (False, True):
        q, scaling, kv, readers = packed(case, tokens, device, batch=batch, window=window)
        expected, _ = attention_reference.paged_attention(q.double(), scaling, kv, readers)
        errors.append(relative_error(paged_attention(q, scaling, kv, readers)[0], expected))
    return tuple(errors)


def coding(width: int, device: torch.device, rows: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens ``[1, 4, rows, width]``, a metric and steps, for ``feedback_codes``."""
    g = torch.Generator(device).manual_seed(0)
    seen = torch.randn(1, 4, width, width // 2, generator=g, device=device)
    metric = seen @ seen.mT + 0.2 * torch.eye(width, device=device)
    return torch.randn(1, 4, rows, width, generator=g, device=device), metric, metric.new_ones(1, 4, width)


def same_rows(width: int, device: torch.device) -> float:
    """Share of rows whose codes and scale ``feedback_codes`` gives as the reference does."""
    y, metric, step = coding(width, device)
    codes, scale = feedback_codes(y, metric, step, 2)
    factor = reference.unit_factor(metric)
    expected, expected_scale = reference.feedback_codes(y, metric, factor, step, 2, SPREADS, PASSES, True)
    return float(((codes == expected).all(-1) & (scale == expected_scale)).float().mean())


def microseconds(calls: Sequence[Callable[[], Any]], repeats: int) -> float:
    """Median device time of one call, from a CUDA graph of all of them in turn: no launch is waited for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 2):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(1e3 * before.elapsed_time(after) / len(calls))
    return statistics.median(times[2:])


def cold(n_bytes: float) -> int:
    """Copies of rows of that size to rotate over."""
    return max(2, round(COLD_BYTES / n_bytes + 0.5))


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """GB/s of a large copy, bytes read and bytes written."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / microseconds([lambda: y.copy_(x)], repeats) / 1e3


def dense_times(case: Case, batch: int, slots: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Median microseconds of one decoded token over bf16 rows, by baseline.

    Raises:
        RuntimeError: when they disagree.
    """
    from headq_ao.evals.benchmarks.bench_gpu_dense import bf16_attention

    hkv, d = case.kv_heads, case.head_dim
    q = torch.randn(batch, case.heads, 1, d, dtype=torch.bfloat16, device=device)
    folded = q.view(batch, hkv, -1, d)
    rows = [
        tuple(torch.randn(batch, hkv, slots, d, dtype=torch.bfloat16, device=device) for _ in range(2))
        for _ in range(cold(4 * batch * hkv * slots * d))
    ]
    methods: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "bf16": lambda k, v: bf16_attention(q, k, v),
        "gqa": lambda k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "folded": lambda k, v: scaled_dot_product_attention(folded, k, v),
    }
    expected = methods["gqa"](*rows[0])
    for name, method in methods.items():
        error = relative_error(method(*rows[0]).reshape(expected.shape), expected)
        if not error <= BF16_ERROR:
            raise RuntimeError(f"{name} differs from SDPA by {error:.2g}, more than {BF16_ERROR}")
    return {name: microseconds([partial(method, k, v) for k, v in rows], repeats) for name, method in methods.items()}


def compare(case: Case, batch: int, slots: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Median microseconds of one decoded token: packed tokens, alone and beside a window, and bf16 in three ways."""
    moved, times = batch * case.kv_heads * slots * case.bytes_per_token, {}
    for name, window in (("packed", False), ("attend", True)):
        calls = [
            partial(paged_attention, *packed(case, slots, device, seed, batch, window)) for seed in range(cold(moved))
        ]
        times[name] = microseconds(calls, repeats)
        del calls
    times |= dense_times(case, batch, slots, device, repeats)
    torch.cuda.empty_cache()
    dense = 4e-3 * batch * case.kv_heads * slots * case.head_dim
    return {
        **dataclasses.asdict(case), "batch": batch, "slots": slots, "microseconds": times,
        "packed_gb_per_s": 1e-3 * moved / times["packed"], "bf16_gb_per_s": dense / times["bf16"],
    }  # fmt: skip


def encode_times(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Device time of ``feedback_codes`` at 2 bits, by width, for 4 heads of 4096 rows."""
    found = []
    for width in (64, 128):
        y, metric, step = coding(width, device, 4096)
        factor = reference.unit_factor(metric)  # which a codec keeps
        took = microseconds([partial(feedback_codes, y, metric, step, 2, cholesky=factor)], min(repeats, 10))
        found.append({"width": width, "rows": 4 * 4096, "microseconds": took})
    return found


def readme_table(result: dict[str, Any]) -> str:
    """The README's lines about a result.

    Raises:
        ValueError: when the result is not whole and no note in it says so.
    """
    if "note" not in result:
        check_whole(result)
    head = [
        "heads, bits", "batch × rows", "packed, µs", "and exact rows", *(f"{x}, µs" for x in BASELINES.values()),
        "times as fast", "packed / bf16 GB/s",
    ]  # fmt: skip
    rows = []
    for r in result["rows"]:
        us = r["microseconds"]
        rows.append([
            f"{r['heads']}/{r['kv_heads']}/{r['head_dim']}, {r['k_bits']}/{r['v_bits']}",
            f"{r['batch']} × {r['slots']:,}", *(f"{us[name]:.1f}" for name in ("packed", "attend", *BASELINES)),
            " / ".join(f"{speedup(r)[name]:.2f}" for name in BASELINES),
            f"{r['packed_gb_per_s']:.0f} / {r['bf16_gb_per_s']:.0f}",
        ])  # fmt: skip
    text = [markdown_table(head, rows)]
    if result["steps"]:
        head = ["model, batch × context", "DynamicCache, ms", "HeadQ, ms", "times as fast", "means", "cache, MB",
                "peak while decoding, MB"]  # fmt: skip
        rows = []
        for c in result["steps"]:
            dense, ours = c["dense"], c["packed"]
            rows.append([
                f"{c['model']}, {c['batch']} × {c['context']:,}", f"{dense['ms']:.1f}", f"{ours['ms']:.1f}",
                f"{dense['ms'] / ours['ms']:.2f}", f"{dense['ms_mean']:.1f} / {ours['ms_mean']:.1f}",
                f"{dense['cache_bytes'] / 1e6:.0f} → {ours['cache_bytes'] / 1e6:.0f}",
                f"{dense['peak_bytes'] / 1e6:.0f} → {ours['peak_bytes'] / 1e6:.0f}",
            ])  # fmt: skip
        text.append(markdown_table(head, rows))
    return "\n\n".join([*text, readme_notes(result)])


def readme_notes(result: dict[str, Any]) -> str:
    """The lines below the tables."""
    env = result["environment"]
    versions = env["versions"]
    text = (
        f"{env['device']}, torch {versions['torch']}, Triton {versions['triton']}; a copy moves "
        f"{result['copy_gb_per_s']:.0f} GB/s, read and written. Relative output error at most "
        f"{max(result['errors'].values()):.1e}; rows coded as by the reference {min(result['same_rows'].values()):.1%}"
    )
    for e in result["encode"]:
        text += f". Coding {e['rows']:,} rows of {e['width']} takes {e['microseconds']:.0f} µs"
    for c in result["steps"]:
        text += (
            f". Prefill of {c['context']:,} tokens, {c['model']}: {c['dense']['prefill_s']:.2f} s, with HeadQ "
            f"{c['packed']['prefill_s']:.2f} s"
        )
    note = f". {result['note']}" if "note" in result else ""
    return f"{text}{note}. `python -m headq_ao.evals.benchmarks.bench_gpu`."


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m headq_ao.evals.benchmarks.bench_gpu",
        description="Time decoding from packed tokens against bf16 ones on a GPU, after checking its results.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = "(default: %(default)s)"
    p.add_argument(
        "--cells", nargs="+", default=["1x4096", "1x32768", "1x131072", "16x32768"],
        help=f"BATCHxROWS of the kernels {default}",
    )  # fmt: skip
    p.add_argument(
        "--steps", nargs="+", default=["1x32768", "16x32768"],
        help=f"BATCHxCONTEXT of the model's decoding steps, or none {default}",
    )  # fmt: skip
    p.add_argument("--layers", type=int, default=8, help=f"of the model, Llama-3.1-8B's in shape {default}")
    p.add_argument("--repeats", type=int, default=20, help=f"replays of which the median counts {default}")
    add_result_options(p)
    return p


def parsed(cells: Sequence[str], unit: int) -> list[tuple[int, int]]:
    """``BATCHxROWS`` as numbers; ValueError on anything else.

    Example:
        >>> parsed(["1x64", "8x4096"], 32)
        [(1, 64), (8, 4096)]
    """
    found = []
    for text in cells:
        batch, x, rows = text.partition("x")
        if not (x and batch.isdigit() and rows.isdigit() and int(batch) and int(rows) and int(rows) % unit == 0):
            raise ValueError(f"cells are BATCHxROWS, rows a multiple of {unit}, like 1x32768, got {text!r}")
        found.append((int(batch), int(rows)))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when it ran or there is no GPU, 2 for wrong arguments, 1 when a kernel's results are wrong."""
    args = parser().parse_args(argv)
    try:
        if args.readme is not None:
            args.json = args.json or RESULT
            fill_readme(args, "bench_gpu", readme_table)
            if args.plot is not None:
                draw(json.loads(args.json.read_text(encoding="utf-8")), args.plot)
            return 0
        cells = parsed(args.cells, 64)
        steps = [] if args.steps == ["none"] else parsed(args.steps, 1)
        if min(args.repeats, args.layers) < 1:
            raise ValueError(f"repeats and layers must be positive, got {args.repeats} and {args.layers}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("bench_gpu did not run: PyTorch finds no CUDA or HIP device here; nothing was timed")
        return 0
    device = torch.device("cuda")
    errors = {
        f"{c.heads}/{c.kv_heads}/{c.head_dim} {c.k_bits}/{c.v_bits}, batch {b}": max(output_errors(c, b, 4000, device))
        for c in CASES
        for b in (1, 3)
    }
    same = {str(width): same_rows(width, device) for width in (64, 128)}
    print(f"relative output errors: {errors}; rows coded as by the reference: {same}")
    if not (max(errors.values()) <= OUTPUT_ERROR and min(same.values()) >= SAME_ROWS):
        print("error: the kernels do not agree with the reference; nothing was timed", file=sys.stderr)
        return 1
    result: dict[str, Any] = {
        "complete": False, "errors": errors, "same_rows": same, "copy_gb_per_s": copy_bandwidth(device, args.repeats),
        "encode": encode_times(device, args.repeats), "rows": [], "steps": [], "environment": environment(device),
    }  # fmt: skip
    import triton

    result["environment"]["versions"]["triton"] = triton.__version__

    def keep(part: str, found: dict[str, Any]) -> None:
        result[part].append(found)
        tqdm.write(str(found), file=sys.stdout)
        if args.json is not None:
            write_json(args.json, result)

    for case, (batch, slots) in tqdm([(c, cell) for c in CASES for cell in cells], unit="cell"):
        keep("rows", compare(case, batch, slots, device, args.repeats))
    for batch, context, found in step_cells(measure_steps, args.layers, steps, device):
        keep("steps", {"batch": batch, "context": context, **found})
    result["complete"] = True
    if args.json is not None:
        write_json(args.json, result)
    if args.plot is not None:
        draw(result, args.plot)
    return 0


def draw(result: dict[str, Any], path: Path) -> None:
    """The figure; needs matplotlib."""
    from headq_ao.evals.benchmarks.bench_plot import plot_gpu

    plot_gpu(result, path)


if __name__ == "__main__":
    sys.exit(main())
