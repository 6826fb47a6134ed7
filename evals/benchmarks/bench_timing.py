"""Timing: a clock that other work disturbs least, buffers that are not in the caches, methods in turn."""

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

COLD_CACHES = 3  # buffers of this many last-level caches are rotated over
FALLBACK_CACHE = 32 * 2**20
BUSY = 0.7
BUDGET = 0.1  # seconds of one burst of calls, at least one call

Call = Callable[[], Any]


def clock(threads: int) -> Callable[[], float]:
    """Seconds: this thread's CPU time where one thread works, which other processes do not add to; else wall time."""
    return time.thread_time if threads == 1 else time.perf_counter


def cache_bytes() -> int:
    """Size of the last-level cache as the system tells it, else 32 MiB."""
    units = {"K": 2**10, "M": 2**20}
    found = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        if text[:-1].isdigit() and text[-1] in units:
            found.append(int(text[:-1]) * units[text[-1]])
    return max(found) or FALLBACK_CACHE


def load_average() -> float:
    """Processes that want a core, over the last minute; says so when others than this one do."""
    load = os.getloadavg()[0]
    if load > BUSY:
        print(f"warning: the machine is busy (load {load:.1f}): wall times will be those of waiting", file=sys.stderr)
    return load


def cold_copies(n_bytes: int) -> int:
    """How many buffers of that size to rotate over, so that none is in a cache when its turn comes."""
    return max(1, -(-COLD_CACHES * cache_bytes() // max(n_bytes, 1)))


def median_ms(calls: Sequence[Call], threads: int, repeats: int = 7, budget: float = BUDGET) -> float:
    """Median milliseconds of one call; see :func:`bursts`."""
    return statistics.median(bursts({"it": calls}, threads, repeats, budget)["it"])


def bursts(
    methods: Mapping[str, Sequence[Call]], threads: int, repeats: int = 7, budget: float = BUDGET
) -> dict[str, list[float]]:
    """Milliseconds per call of several methods, burst by burst in turn (A B C A B C …), so that drift hits all alike.

    Args:
        methods: for each, calls that do the same work on different buffers; they are gone through in turn.
        threads: that the calls use, which selects the :func:`clock`.
        repeats: bursts of each method.
        budget: seconds of a burst; a longer call is made once.

    Example:
        >>> from headq_ao.evals.benchmarks.bench_timing import bursts
        >>> found = bursts({"sum": [lambda: sum(range(1000))]}, threads=1, repeats=3, budget=0.001)
        >>> len(found["sum"]), 0 < min(found["sum"]) < 10
        (3, True)
    """
    now = clock(threads)
    turns = {name: itertools.cycle(calls) for name, calls in methods.items()}
    numbers = {}
    for name, turn in turns.items():
        next(turn)()  # compiles, allocates
        start = now()
        next(turn)()
        numbers[name] = max(1, int(budget / max(now() - start, 1e-7)))
    found: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, turn in turns.items():
            start = now()
            for _ in range(numbers[name]):
                next(turn)()
            found[name].append(1e3 * (now() - start) / numbers[name])
    return found


def linear_fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least squares ``y = at_0 + slope · x`` and its R².

    Example:
        >>> from headq_ao.evals.benchmarks.bench_timing import linear_fit
        >>> linear_fit([1, 2, 3], [3, 5, 7])
        {'at_0': 1.0, 'slope': 2.0, 'r2': 1.0}
    """
    slope, at_0 = statistics.linear_regression(x, y)
    mean = statistics.fmean(y)
    left = sum((b - at_0 - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((b - mean) ** 2 for b in y)
    return {"at_0": at_0, "slope": slope, "r2": 1 - left / spread if spread else 1.0}
