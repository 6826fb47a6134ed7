"""Device time of calls, and what a stage writes while it runs."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from headq_ao.evals.harness.environment import environment, write_json


class Result:
    """A stage's result file, written again after each row: a cut loses the row under way.

    Args:
        path: of the JSON file; None: it is not written.
        device: what is measured on.
    """

    def __init__(self, path: Path | None, device: torch.device) -> None:
        import triton

        self.path, self.data = path, dict[str, Any](complete=False, rows=[], environment=environment(device))
        self.data["environment"]["versions"]["triton"] = triton.__version__
        if self.data["environment"]["git"] is None and "HEADQ_COMMIT" in os.environ:  # a copy without its history
            self.data["environment"]["git"] = {"commit": os.environ["HEADQ_COMMIT"], "dirty": None}

    def add(self, **row: Any) -> None:
        """Keep a row, and show it."""
        self.data["rows"].append(row)
        print(row, flush=True)
        self.write()

    def finish(self, **more: Any) -> dict[str, Any]:
        """The whole result."""
        self.data |= {"complete": True, **more}
        self.write()
        return self.data

    def write(self) -> None:
        """Write what there is."""
        if self.path is not None:
            write_json(self.path, self.data)


def microseconds(calls: Sequence[Callable[[], Any]], repeats: int, device: torch.device) -> float:
    """Median device time of one call, from a CUDA graph of all of them in turn: no launch is waited for.

    On a CPU, where a stage is only tried, wall time.
    """
    calls[0]()  # compiles
    if device.type == "cpu":
        start = time.perf_counter()
        for call in calls:
            call()
        return 1e6 * (time.perf_counter() - start) / len(calls)

    def every() -> None:
        for call in calls:
            call()

    return 1e3 * statistics.median(replays(captured(every), repeats)) / len(calls)


def captured(call: Callable[[], Any]) -> "torch.cuda.CUDAGraph":
    """A call as a CUDA graph, after two calls outside it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def replays(graph: "torch.cuda.CUDAGraph", repeats: int) -> list[float]:
    """Milliseconds of each replay, after two that do not count."""
    times = []
    for _ in range(repeats + 2):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after))
    return times[2:]


def kernel_times(call: Callable[[], Any], most: int = 12) -> list[tuple[str, int, float]]:
    """The kernels of a call that take longest: name, launches, microseconds of all of them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        call()
        torch.cuda.synchronize()
    rows = [(e.key[:60], e.count, round(e.self_device_time_total, 1)) for e in found.key_averages()]
    return sorted((r for r in rows if r[2]), key=lambda r: -r[2])[:most]
