"""Where the device's time goes in a whole model: the kernels of a prompt, of a chunk behind it and of a decoding step,
by name, of the packed cache and of a dense one."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import StaticCache

from headq_ao import HeadQCache, calibrate, headq_config
from headq_ao.evals.benchmarks.bench_generate import both
from headq_ao.evals.gpu import steps
from headq_ao.evals.gpu.timing import Result

# what the profiler says of a kernel, and what it is called here
COUNTERS = {
    "registers per thread": "registers",
    "shared memory": "shared_bytes",
    "est. achieved occupancy %": "occupancy_percent",
}
PHASES = ("prompt", "chunk", "step")


@torch.no_grad()
def measure(context: int, new: int, layers: int, device: torch.device, result: Result, head_dim: int = 128) -> None:
    """A row for each cache and phase: a prompt of ``context`` tokens, ``new`` more at once, one more."""
    model = steps.random_model(layers, context + new + steps.SPARE, device, head_dim)
    g = torch.Generator().manual_seed(1)
    rows = list(torch.randint(steps.VOCABULARY, (2, 512), generator=g))
    models = both(model, headq_config(calibration=calibrate(model, rows, progress=False, gradients=False)))
    ids = torch.randint(steps.VOCABULARY, (1, context + new + 1), generator=g).to(device)
    for kind, each in models.items():
        for call in phases(kind, each, ids, context, new).values():
            call()  # compiles
        for phase, call in phases(kind, each, ids, context, new).items():
            found = kernels(call, device)
            microseconds = sum(of["microseconds"] for of in found.values())
            result.add(cache=kind, phase=phase, layers=layers, context=context, new=new,
                       microseconds=microseconds, kernels=found)  # fmt: skip


def phases(kind: str, model: Any, ids: Tensor, context: int, new: int) -> dict[str, Callable[[], Any]]:
    """The calls of :data:`PHASES`, to be made in order, over a cache of their own."""
    length = ids.shape[1] + steps.SPARE
    if kind == "dense":
        cache: Any = StaticCache(model.config, max_cache_len=length)
    else:
        cache = HeadQCache(model, max_length=length)
    cuts = (0, context, context + new, context + new + 1)

    def part(i: int) -> Callable[[], Any]:
        return lambda: model(ids[:, cuts[i] : cuts[i + 1]], cache=cache, logits_to_keep=1)

    return {phase: part(i) for i, phase in enumerate(PHASES)}


def kernels(call: Callable[[], Any], device: torch.device) -> dict[str, dict[str, float]]:
    """The kernels that a call runs, by :func:`by_name`; on a CPU, where a stage is only tried, its operators, nested in
    each other."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as found:
        call()
        steps.wait(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        return by_name(json.loads(path.read_text(encoding="utf-8")), "kernel" if cuda else "cpu_op")


def by_name(trace: dict[str, Any], category: str) -> dict[str, dict[str, float]]:
    """Events of a category in a trace of the profiler: launches and microseconds of each name, longest first, and the
    most of each of :data:`COUNTERS`.

    Example:
        >>> event = {"cat": "kernel", "name": "f", "dur": 2.5, "args": {"registers per thread": 40}}
        >>> by_name({"traceEvents": [event, event]}, "kernel")
        {'f': {'launches': 2, 'microseconds': 5.0, 'registers': 40}}
    """
    found: dict[str, dict[str, float]] = {}
    for event in trace["traceEvents"]:
        if event.get("cat") != category:
            continue
        of = found.setdefault(event["name"], {"launches": 0, "microseconds": 0.0})
        of["launches"] += 1
        of["microseconds"] += event["dur"]
        for told, name in COUNTERS.items():
            if told in event.get("args", {}):
                of[name] = max(of.get(name, 0), event["args"][told])
    return dict(sorted(found.items(), key=lambda item: -item[1]["microseconds"]))
