"""One layer's decode attention on a GPU, packed tokens against dense bf16.

Every kernel is held to the reference on the same device first; where one fails, nothing is timed. Times are device
times of one decoded token: calls on different tokens, more than the caches hold, are captured as one CUDA graph, and
the median of its replays counts. The operator maps the query, attends over packed tokens, sinks and window, and goes
back to the values' basis. Baselines read bf16 keys and values: a split-KV kernel of our own, SDPA with enable_gqa, and
SDPA with the query group folded into the query length.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm.auto import tqdm

from headq_ao.evals.benchmarks.bench_rows import relative_error
from headq_ao.evals.benchmarks.triton_table import Case
from headq_ao.evals.gpu.timing import Result, microseconds
from headq_ao.ops import paged_attention
from headq_ao.ops.page_layout import GroupLayout, PageLayout, Side
from headq_ao.ops.paged_attention import reference as attention_reference
from headq_ao.ops.types import PagedKV, Readers

OUTPUT_ERROR = 1e-3  # relative, of the output
BF16_ERROR = 1e-2  # of a dense kernel, which rounds its output
PAGE, SINKS, WINDOW, RING = 32, 4, 80, 96  # tokens, as caches have them by default
COLD_BYTES = 200e6  # rotated over, so that rows come from memory and not from the cache
BASELINES = {"bf16": "bf16 Triton", "gqa": "SDPA enable_gqa"}
MIX = (2, 3, 2, 2, 3, 2, 4, 2)  # bits of keys by head, as a calibration shares a mean of 2.5 between them


def packed(
    case: Case,
    tokens: int,
    device: torch.device,
    seed: int = 0,
    batch: int = 1,
    window: bool = False,
    bits: Sequence[int] = (),
) -> tuple[Tensor, float, PagedKV, Readers]:
    """Arguments of ``paged_attention`` for one query over ``tokens`` random packed ones, all in pages.

    Scores are of a few nats. With ``window``, sinks and window are full, in bf16; else they are empty. ``bits``: of
    each head's keys, () the case's.

    Example:
        >>> q, scaling, kv, readers = packed(Case(4, 2, 64, 2, 2), 64, torch.device("cpu"))
        >>> kv.pages[0].shape, kv.table.tolist(), readers.query_map.shape
        (torch.Size([3, 2, 2, 4, 16, 4]), [[1, 2]], torch.Size([1, 1, 2, 64, 67]))
    """
    g, (hkv, d) = torch.Generator(device).manual_seed(seed), (case.kv_heads, case.head_dim)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    runs = [(b, len(list(run))) for b, run in groupby(bits or [case.k_bits] * hkv)]
    first, groups = 0, []
    for b, n in runs:
        groups.append(GroupLayout(first, n, Side((b,) * d), Side((case.v_bits,))))
        first += n
    layout = PageLayout(PAGE, d, d, tuple(groups))
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


def cold(n_bytes: float, device: torch.device) -> int:
    """Copies of tokens of that size to rotate over; on a CPU, where nothing is timed, one."""
    return 1 if device.type == "cpu" else max(2, round(COLD_BYTES / n_bytes + 0.5))


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """GB/s of a large copy, bytes read and bytes written."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / microseconds([lambda: y.copy_(x)], repeats, device) / 1e3


def dense_times(case: Case, batch: int, slots: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Median microseconds of one decoded token over bf16 rows, by baseline.

    Raises:
        RuntimeError: when they disagree.
    """
    hkv, d = case.kv_heads, case.head_dim
    q = torch.randn(batch, case.heads, 1, d, dtype=torch.bfloat16, device=device)
    rows = [
        tuple(torch.randn(batch, hkv, slots, d, dtype=torch.bfloat16, device=device) for _ in range(2))
        for _ in range(cold(4 * batch * hkv * slots * d, device))
    ]
    methods: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "gqa": lambda k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True),
    }
    if device.type == "cuda":
        from headq_ao.evals.gpu.dense import bf16_attention

        methods["bf16"] = lambda k, v: bf16_attention(q, k, v)
    expected = methods["gqa"](*rows[0])
    for name, method in methods.items():
        error = relative_error(method(*rows[0]).reshape(expected.shape), expected)
        if not error <= BF16_ERROR:
            raise RuntimeError(f"{name} differs from SDPA by {error:.2g}, more than {BF16_ERROR}")
    return {
        name: microseconds([partial(method, k, v) for k, v in rows], repeats, device)
        for name, method in methods.items()
    }


def compare(case: Case, batch: int, slots: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Median microseconds of one decoded token: packed tokens, sinks and window, and bf16 in two ways."""
    moved = batch * case.kv_heads * slots * case.bytes_per_token
    times = {"attend": packed_time(case, batch, slots, device, repeats)}
    times |= dense_times(case, batch, slots, device, repeats)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    best = min(x for name, x in times.items() if name != "attend")
    return {
        **dataclasses.asdict(case), "batch": batch, "slots": slots, "microseconds": times,
        "times_as_fast": best / times["attend"], "packed_gb_per_s": 1e-3 * moved / times["attend"],
        "dense_gb_per_s": 4e-3 * batch * case.kv_heads * slots * case.head_dim / best,
    }  # fmt: skip


def packed_time(
    case: Case, batch: int, slots: int, device: torch.device, repeats: int, bits: Sequence[int] = ()
) -> float:
    """Median microseconds of ``paged_attention`` for one decoded token."""
    copies = cold(batch * case.kv_heads * slots * case.bytes_per_token, device)
    calls = [partial(paged_attention, *packed(case, slots, device, seed, batch, True, bits)) for seed in range(copies)]
    return microseconds(calls, repeats, device)


def measure(
    cases: Sequence[Case], cells: Sequence[tuple[int, int]], repeats: int, device: torch.device, result: Result
) -> None:
    """A row for each case, batch and length, and rows of the default's mix of bits.

    Raises:
        RuntimeError: where a kernel differs from the reference; nothing is timed then.
    """
    for case in cases:
        error = max(output_errors(case, 2, min(4000, cells[0][1]), device))
        if not error <= OUTPUT_ERROR:
            raise RuntimeError(f"paged_attention differs from the reference by {error:.2g} on {case}")
        result.data.setdefault("errors", {})[str(case)] = error
    if device.type == "cuda":
        result.data["copy_gb_per_s"] = copy_bandwidth(device, repeats)
    for case, (batch, slots) in tqdm([(c, cell) for c in cases for cell in cells], unit="cell"):
        result.add(**compare(case, batch, slots, device, repeats))
    case = cases[0]
    bits = MIX[: case.kv_heads]
    for batch, slots in cells:
        uniform, mixed = (packed_time(case, batch, slots, device, repeats, b) for b in ((), bits))
        result.add(batch=batch, slots=slots, mix=bits, uniform_us=uniform, mixed_us=mixed, over_uniform=mixed / uniform)
