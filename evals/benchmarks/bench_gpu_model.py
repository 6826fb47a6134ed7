"""Decoding steps of a whole model on a GPU, its packed cache against a DynamicCache: part of ``bench_gpu``."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from headq_ao import calibrate, headq_config
from headq_ao.evals.benchmarks.bench_generate import agreement, both
from headq_ao.evals.benchmarks.bench_memory import CACHES, held_bytes, new_cache

VOCABULARY = 32000
INITIAL = 0.01  # standard deviation of the weights: scores of about half a nat, as nothing that was learned draws them
STEPS = 32
WARM_UP = 3

Step = Callable[..., dict[str, Any]]


def random_model(layers: int, length: int, device: torch.device) -> nn.Module:
    """A Llama of random bf16 weights with as many layers as asked for, each of Llama-3.1-8B's shape (32/8/128)."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, initializer_range=INITIAL,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return model


def step_cells(
    measure: Step, layers: int, cells: Sequence[tuple[int, int]], device: torch.device
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Batch, context and what ``measure`` found, cell by cell, for one model and its packed copy."""
    if not cells:
        return
    model = random_model(layers, max(context for _, context in cells) + 4096, device)
    g = torch.Generator().manual_seed(1)
    rows = torch.randint(VOCABULARY, (2, 1024), generator=g)
    models = both(model, headq_config(calibration=calibrate(model, list(rows), progress=False)))
    ids = torch.randint(VOCABULARY, (1, max(context for _, context in cells)), generator=g).to(device)
    for batch, context in cells:
        found = measure(models, ids[:, :context], batch)
        yield batch, context, {"model": f"{layers} layers of 32/8/128", **found}
        torch.cuda.empty_cache()


@torch.no_grad()
def measure_steps(models: dict[str, Any], ids: Tensor, batch: int) -> dict[str, Any]:
    """Prefill ``ids [1, T]`` into a cache of each kind, repeat it ``batch`` times, and time steps in turns.

    Returns:
        By kind ``ms`` (median), ``ms_mean``, ``prefill_s``, ``cache_bytes``, ``peak_bytes`` (of a step above the
        model, the cache included); ``kl`` between the next tokens.

    Raises:
        CheckFailedError: when the two disagree.
    """
    caches: dict[str, Any] = {}
    result: dict[str, Any] = {}
    for kind, model in models.items():
        model(ids[:, :512], cache=new_cache(kind, model), logits_to_keep=1)  # compiles
        caches[kind] = new_cache(kind, model)
        seconds = synchronized(partial(model, ids, cache=caches[kind], logits_to_keep=1))
        result[kind] = {"prefill_s": seconds}
    if batch > 1:
        for cache in caches.values():
            cache.batch_repeat_interleave(batch)
    token = ids[:, -1:].repeat(batch, 1)
    result["kl"] = agreement(models, caches, token)
    times: dict[str, list[float]] = {kind: [] for kind in models}
    peaks = dict.fromkeys(models, 0)
    for _ in range(WARM_UP + STEPS):
        for kind, model in models.items():
            others = torch.cuda.memory_allocated() - held_bytes(caches[kind])
            torch.cuda.reset_peak_memory_stats()
            times[kind].append(1e3 * synchronized(partial(model, token, cache=caches[kind], logits_to_keep=1)))
            peaks[kind] = max(peaks[kind], torch.cuda.max_memory_allocated() - others)
    for kind in CACHES:
        steps = times[kind][WARM_UP:]
        result[kind] |= {
            "ms": statistics.median(steps), "ms_mean": statistics.fmean(steps), "steps_ms": steps,
            "cache_bytes": held_bytes(caches[kind]), "peak_bytes": peaks[kind],
        }  # fmt: skip
    return result


def synchronized(call: Callable[[], Any]) -> float:
    """Seconds of a call, the device idle before and after."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start
