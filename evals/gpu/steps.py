"""Decoding steps of a whole model under CUDA graphs: its packed cache against a StaticCache with SDPA."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from headq_ao import HeadQCache, calibrate, headq_config
from headq_ao.evals.benchmarks.bench_generate import both
from headq_ao.evals.gpu.timing import Result, captured, kernel_times, replays

VOCABULARY = 32000
INITIAL = 0.01  # standard deviation of the weights: scores of about half a nat, as nothing that was learned draws them
SPARE = 64  # tokens that a cache has room for behind its context


def random_model(layers: int, length: int, device: torch.device, head_dim: int = 128) -> nn.Module:
    """A Llama of random bf16 weights, each layer of Llama-3.1-8B's shape (32/8/128); for trying it, with smaller heads
    and four of them."""
    heads = 32 if head_dim == 128 else 4
    width = heads * head_dim
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 7 // 2, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 4, head_dim=head_dim,
        max_position_embeddings=length, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        initializer_range=INITIAL,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return model


@torch.no_grad()
def measure(
    cells: Sequence[tuple[int, int]],
    layers: int,
    repeats: int,
    device: torch.device,
    result: Result,
    head_dim: int = 128,
) -> None:
    """A row for each batch and context: milliseconds of a step, prefill and bytes of each cache."""
    model = random_model(layers, max(context for _, context in cells) + SPARE, device, head_dim)
    g = torch.Generator().manual_seed(1)
    start = time.perf_counter()
    calibration = calibrate(
        model, list(torch.randint(VOCABULARY, (2, 512), generator=g)), progress=False, gradients=False
    )
    models = both(model, headq_config(calibration=calibration))
    calibrated = time.perf_counter() - start
    ids = torch.randint(VOCABULARY, (1, max(context for _, context in cells)), generator=g).to(device)
    for batch, context in cells:
        row: dict[str, Any] = {"layers": layers, "batch": batch, "context": context, "calibrate_s": calibrated}
        logits = {}
        for kind, model in models.items():
            cache, seconds = filled(kind, model, ids[:, :context], batch)
            step, out = one_step(model, cache, ids[:, -1:].repeat(batch, 1), context)
            row[kind] = timed(step, repeats, device) | {"prefill_s": seconds, "cache_bytes": cache_bytes(cache)}
            logits[kind] = out[0].double().log_softmax(-1)
            del cache, step
        row["kl"] = float((logits["dense"].exp() * (logits["dense"] - logits["packed"])).sum(-1).mean())
        row["over_dense"] = row["packed"]["ms"] / row["dense"]["ms"]
        result.add(**row)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def filled(kind: str, model: Any, ids: Tensor, batch: int) -> tuple[Any, float]:
    """A cache of ``batch`` sequences that hold ``ids [1, T]``, each in memory of its own, and how long one prefill
    took."""
    length = ids.shape[1] + SPARE
    new = (lambda: StaticCache(model.config, max_cache_len=length)) if kind == "dense" else (
        lambda: HeadQCache(model, max_length=length)
    )  # fmt: skip
    model(ids[:, :512], cache=new(), logits_to_keep=1)  # compiles
    cache = new()
    wait(ids.device)
    start = time.perf_counter()
    model(ids, cache=cache, logits_to_keep=1)
    wait(ids.device)
    seconds = time.perf_counter() - start
    if batch > 1 and kind == "dense":
        one, cache = cache, new()
        for to, source in zip(cache.layers, one.layers, strict=True):
            wide = [x.expand(batch, -1, -1, -1) for x in (source.keys, source.values)]
            to.lazy_initialization(*wide)
            to.keys.copy_(wide[0])
            to.values.copy_(wide[1])
            to.cumulative_length.copy_(source.cumulative_length)
    elif batch > 1:
        cache.batch_repeat_interleave(batch)
        cache.batch.begin(batch, 1)  # room for its whole length
        cache.batch.take_back()
        own_pages(cache)
    return cache, seconds


def own_pages(cache: Any) -> None:
    """Give each sequence copies of the pages that it shares with others: what is read is as much as without sharing."""
    for key, table in cache.batch.tables.items():
        rows, pairs, taken = table.host.tolist(), [], set()
        for row in rows:
            for i, page in enumerate(row):
                if page in taken:
                    row[i] = table.pages
                    table.pages += 1
                    pairs.append((page, row[i]))
                taken.add(row[i])
        table._set(torch.tensor(rows, dtype=torch.int32))
        for layer in cache.layers:
            if layer.table_key == key:
                layer.fit()
                layer.pool.copy(pairs)


def one_step(model: Any, cache: Any, token: Tensor, context: int) -> tuple[Callable[[], None], list[Tensor]]:
    """A step that can be captured, of ``token [B, 1]``, and where it leaves the logits ``[B, V]`` of its last run."""
    position = torch.full((1, 1), context, device=token.device)
    out = [torch.empty(0)]

    def step() -> None:
        out[0] = model(token, cache=cache, position_ids=position, logits_to_keep=1).logits[:, -1]
        position.add_(1)

    step()
    out[0] = out[0].clone()
    first = list(out)
    return step, first


def timed(step: Callable[[], None], repeats: int, device: torch.device) -> dict[str, Any]:
    """``ms`` of a captured step and ``eager_ms`` of one that is launched from Python, medians; its slowest kernels."""
    eager = []
    for _ in range(4):
        wait(device)
        start = time.perf_counter()
        step()
        wait(device)
        eager.append(1e3 * (time.perf_counter() - start))
    found: dict[str, Any] = {"eager_ms": statistics.median(eager[1:])}
    if device.type != "cuda":
        return found | {"ms": found["eager_ms"]}
    graph = captured(step)
    found |= {"ms": statistics.median(replays(graph, repeats)), "kernels": kernel_times(graph.replay)}
    return found


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors that a cache holds."""
    if isinstance(cache, HeadQCache):
        return cache.get_memory_footprint()
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def wait(device: torch.device) -> None:
    """For the device to be idle."""
    if device.type == "cuda":
        torch.cuda.synchronize()
