"""Decode attention on a GPU, packed rows against dense bf16: ``python -m headq_ao.evals.bench_gpu --help``.

Every kernel is held to the reference on the same device first; where one fails, nothing is timed. Without a CUDA or
HIP device the command says that it did not run.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headq_ao.evals.bench_rows import relative_error
from headq_ao.evals.environment import environment, write_json
from headq_ao.evals.triton_table import CASES, Case
from headq_ao.ops import MappedQuery, Rows, decode_attention, feedback_codes
from headq_ao.ops.decode_attention.op import _tiled
from headq_ao.ops.feedback import reference
from headq_ao.ops.feedback.op import PASSES, SPREADS
from headq_ao.ops.layout import key_plane_shapes, value_plane_shapes

RESULT = Path(__file__).resolve().parents[1] / "recipes" / "results" / "triton" / "bench_gpu.json"
OUTPUT_ERROR = 1e-3  # relative, of the output
SAME_ROWS = 0.98  # of feedback_codes: a tie may fall either way


def packed(case: Case, slots: int, device: torch.device, seed: int = 0) -> tuple[Any, ...]:
    """Arguments of ``decode_attention`` for one token over ``slots`` random packed rows.

    Scores are of a few nats: ``query [1, Hq, 1, D]`` fp32, planes uint8, scales fp16.

    Example:
        >>> q, keys, values, start, stop = packed(Case(4, 2, 64, 2, 2), 64, torch.device("cpu"))
        >>> keys.planes[0].shape, values.scale.shape
        (torch.Size([1, 2, 4, 4, 16, 4]), torch.Size([1, 2, 64, 1]))
    """
    g, (hkv, d) = torch.Generator(device).manual_seed(seed), (case.kv_heads, case.head_dim)

    def scale(*shape: int) -> Tensor:
        return (0.5 + torch.rand(*shape, generator=g, device=device)).half()

    def planes(shapes: list[tuple[int, ...]]) -> list[Tensor]:
        return [torch.randint(256, (1, hkv, *s), dtype=torch.uint8, generator=g, device=device) for s in shapes]

    bits = [case.k_bits] * d
    query = torch.randn(1, case.heads, 1, d, generator=g, device=device) / (2**case.k_bits * d**0.5)
    line = query.new_zeros(1, case.heads, 1)
    keys = Rows(planes=planes(key_plane_shapes(bits, slots)), bits=bits, scale=scale(1, hkv, slots))
    values = Rows(
        planes=planes(value_plane_shapes(case.v_bits, slots, d)), bits=(case.v_bits,), scale=scale(1, hkv, slots, 1)
    )
    start = torch.zeros(1, 1, dtype=torch.int64, device=device)
    return MappedQuery(query, line, line, line), keys, values, start, start + slots


def output_error(case: Case, slots: int, device: torch.device) -> float:
    """Relative error of the operator's output against the reference's on the same rows."""
    q, keys, values, start, stop = arguments = packed(case, slots, device)
    out, _ = decode_attention(*arguments)
    expected, _ = _tiled(
        q.codes.double(), q.bias.double(), q.zero.double(), q.gauge.double(), None, keys.planes, list(keys.bits),
        keys.scale, None, None, values.planes, case.v_bits, values.scale, None, start, stop, None,
    )  # fmt: skip
    return relative_error(out, expected)


def same_rows(width: int, device: torch.device) -> float:
    """Share of rows whose codes and scale ``feedback_codes`` gives as the reference does."""
    g = torch.Generator(device).manual_seed(0)
    seen = torch.randn(1, 4, width, width // 2, generator=g, device=device)
    metric = seen @ seen.mT + 0.2 * torch.eye(width, device=device)
    y, step = torch.randn(1, 4, 256, width, generator=g, device=device), metric.new_ones(1, 4, width)
    codes, scale = feedback_codes(y, metric, step, 2)
    factor = reference.unit_factor(metric)
    expected, expected_scale = reference.feedback_codes(y, metric, factor, step, 2, SPREADS, PASSES, True)
    return float(((codes == expected).all(-1) & (scale == expected_scale)).float().mean())


def microseconds(call: Callable[[], Any], repeats: int, flush: Tensor) -> float:
    """Median device time of a call whose operands are not in the cache; ``flush`` is larger than it."""
    times = []
    for i in range(repeats + 5):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        before.record()
        call()
        after.record()
        after.synchronize()
        if i >= 5:
            times.append(1e3 * before.elapsed_time(after))
    return statistics.median(times)


def compare(case: Case, slots: int, device: torch.device, repeats: int, flush: Tensor) -> dict[str, Any]:
    """Median microseconds of one decoded token: packed rows, and bf16 rows through SDPA in two forms."""
    arguments = packed(case, slots, device)
    hkv, d, group = case.kv_heads, case.head_dim, case.heads // case.kv_heads
    k, v = (torch.randn(1, hkv, slots, d, dtype=torch.bfloat16, device=device) for _ in range(2))
    q = torch.randn(1, case.heads, 1, d, dtype=torch.bfloat16, device=device)
    folded = q.view(1, hkv, group, d)
    times = {
        "packed": microseconds(lambda: decode_attention(*arguments), repeats, flush),
        "sdpa_enable_gqa": microseconds(lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True), repeats, flush),
        "sdpa_folded": microseconds(lambda: scaled_dot_product_attention(folded, k, v), repeats, flush),
    }
    moved = hkv * slots * case.bytes_per_token
    return {**vars(case), "slots": slots, "microseconds": times, "packed_gb_per_s": moved / times["packed"] / 1e3}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description="Time decode attention over packed rows against SDPA in bf16 on a GPU, after checking its results.",
        epilog="example: python -m headq_ao.evals.bench_gpu --slots 16384 131072",
    )
    p.add_argument("--slots", type=int, nargs="+", default=[4096, 32768, 131072], help="lengths (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=50, help="calls of which the median counts (default: %(default)s)")
    p.add_argument("--json", type=Path, default=RESULT, help="the result (default: %(default)s)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when it ran or there is no GPU, 2 for wrong arguments, 1 when a kernel's results are wrong."""
    args = parser().parse_args(argv)
    if any(slots < 32 or slots % 32 for slots in args.slots) or args.repeats < 1:
        print(f"error: slots must be multiples of 32 and repeats positive, got {args.slots}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("bench_gpu did not run: PyTorch finds no CUDA or HIP device here; nothing was timed")
        return 0
    device = torch.device("cuda")
    errors = {
        f"{c.heads}/{c.kv_heads}/{c.head_dim} {c.k_bits}/{c.v_bits}": output_error(c, 4000, device) for c in CASES
    }
    same = {str(width): same_rows(width, device) for width in (64, 128)}
    print(f"relative output errors: {errors}; rows coded as by the reference: {same}")
    if not (max(errors.values()) <= OUTPUT_ERROR and min(same.values()) >= SAME_ROWS):
        print("error: the kernels do not agree with the reference; nothing was timed", file=sys.stderr)
        return 1
    flush = torch.empty(1 << 29, dtype=torch.uint8, device=device)
    rows = []
    for case in CASES:
        for slots in args.slots:
            rows.append(compare(case, slots, device, args.repeats, flush))
            print(rows[-1])
    result = {"errors": errors, "same_rows": same, "rows": rows, "environment": environment(device)}
    write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
