"""What packing a token costs on the CPU: ``python -m headq_ao.evals.benchmarks.bench_update``.

Processor time of one thread, of one layer: all KV heads, keys and values of 2 bits with error feedback. A decoding step
packs one token, by the planned call and by the operator; and tokens that are packed in bulk.
"""

import argparse
import time
from collections.abc import Callable

import torch

from headq_ao.ops import Encoder, cache_update, plan_update
from headq_ao.ops.page_layout import GroupLayout, PageLayout, Side
from headq_ao.ops.types import PagedKV

SINKS, RING, PAGE, STEP = 4, 96, 32, 0.9957


def encoder(heads: int, dim: int) -> Encoder:
    """Of random matrices of the form that a calibration gives."""
    seen = torch.randn(1, heads, dim, dim // 4)
    hessian = seen @ seen.mT + 0.2 * torch.eye(dim)
    mean, encode = torch.randn(1, heads, dim), torch.linalg.qr(torch.randn(1, heads, dim, dim))[0]
    return Encoder(encode, (2,), torch.full((1, 1, dim), STEP), mean=mean, hessian=hessian)


def cache(heads: int, dim: int, tokens: int) -> PagedKV:
    """An empty cache with room for them."""
    group = GroupLayout(0, heads, Side((2,) * dim), Side((2,)))
    layout, columns = PageLayout(PAGE, dim, dim, (group,)), -(-tokens // PAGE)
    table = torch.arange(1, columns + 1, dtype=torch.int32)[None]
    packed, held, total = (torch.zeros(1, dtype=torch.int64) for _ in range(3))
    windows = [torch.randn(1, heads, SINKS + RING, dim) for _ in range(2)]
    pages = layout.allocate(columns + 1, torch.float32, torch.device("cpu"))
    return PagedKV(pages, layout.spec, table, None, packed, held, total, windows[0], windows[1], SINKS)


def microseconds(call: Callable[[], object], repeats: int) -> float:
    """Of one call, the best of nine rounds."""
    rounds = []
    for _ in range(9):
        start = time.thread_time()
        for _ in range(repeats):
            call()
        rounds.append((time.thread_time() - start) / repeats)
    return 1e6 * min(rounds)


def main() -> None:
    """Print one line for each head dimension."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=3, help="KV heads")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--bulk", type=int, default=1024, help="tokens packed at once")
    options = parser.parse_args()
    torch.set_num_threads(1)
    heads, bulk = options.heads, options.bulk
    for dim in options.dims:
        kv, packed, encoders = cache(heads, dim, bulk), torch.zeros(1, dtype=torch.int64), [encoder(heads, dim)]
        values = [Encoder(encoders[0].encode, (2,), STEP, mean=encoders[0].mean, hessian=encoders[0].hessian)]
        plan = plan_update(kv, packed, encoders, values)
        if plan is None:
            raise SystemExit("there is no compiled kernel here")
        kv.held.fill_(100)
        kv.total.fill_(101)
        k, v = (torch.randn(1, heads, 1, dim) for _ in range(2))
        nothing = microseconds(lambda plan=plan, k=k, v=v: plan(k, v), 200)  # type: ignore[misc]
        packed.fill_(1)
        planned = microseconds(lambda plan=plan, k=k, v=v: plan(k, v), 50)  # type: ignore[misc]
        operator = microseconds(lambda: cache_update(kv, k, v, packed, 1, encoders, values), 50)  # noqa: B023
        kv.held.fill_(0)
        kv.total.fill_(bulk + 1)
        packed.fill_(bulk)
        many = [torch.randn(1, heads, bulk + SINKS, dim) for _ in range(2)]
        all_at_once = microseconds(lambda plan=plan, many=many: plan(*many), 1)  # type: ignore[misc]
        print(
            f"D {dim}, {heads} KV heads: a step {planned:.1f} us planned ({(planned - nothing) / heads / 2:.2f} us "
            f"a head and side, {nothing:.1f} us without a token to pack), {operator:.1f} us by the operator; "
            f"in bulk {all_at_once / bulk / heads / 2:.2f} us a token, head and side"
        )


if __name__ == "__main__":
    main()
