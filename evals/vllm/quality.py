"""Perplexity and KL inside the engine: prompts in chunks that read the pages, with and without a prefix hit."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headq_ao.evals.vllm.engine import Ask, Driver, EngineSpec, start


class Recorder:
    """Keeps the log-probabilities ``[n, vocab]`` that the engine computes for prompt tokens, over the whole vocabulary.

    ``prompt_logprobs`` goes through ``sampler.compute_logprobs`` chunk by chunk; that is what is recorded, and nothing
    else passes there when no sampled token's log-probability is asked for.
    """

    def __init__(self, llm: Any) -> None:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        sampler = worker.model_runner.sampler
        compute = sampler.compute_logprobs
        self.chunks: list[Tensor] = []

        def recorded(logits: Tensor) -> Tensor:
            out: Tensor = compute(logits)
            self.chunks.append(out.clone())
            return out

        sampler.compute_logprobs = recorded

    def take(self) -> Tensor:
        """What came since the last call, in order."""
        out = torch.cat(self.chunks)
        self.chunks.clear()
        return out


def measure(
    spec: EngineSpec, rows: list[list[int]], first: int, hit: bool, reference: str, progress: Any
) -> dict[str, Any]:
    """Score tokens ``first + 1 …`` of each row, given all before them.

    Args:
        rows: token ids.
        first: tokens before the first whose prediction counts; a multiple of the page size where ``hit``.
        hit: whether the pages of these tokens are there already, from another request.
        reference: a file of the same rows' log-probabilities; written by ``bf16`` without a hit, read by all others.

    Returns:
        ``perplexity``, ``nll`` of each row, ``kl`` to the reference in nats (None for the reference itself),
        ``tokens`` scored, ``cached_tokens`` of each row.
    """
    llm = start(spec)
    driver, recorder = Driver(llm, spec.adapter), Recorder(llm)
    written = spec.cache == "bf16" and not hit
    known = [] if written else torch.load(reference, mmap=True)
    nll, kl, cached, kept = [], [], [], []
    for i, row in enumerate(rows):
        if hit:
            driver.run([Ask(f"prefix-{i}", row[: first + 1], sampling(None))], on_step=progress)
        run = driver.run([Ask(str(i), row, sampling(0))], on_step=progress)
        cached.append(run.outputs[0].num_cached_tokens or 0)
        scores = recorder.take()
        scores = scores[first - cached[-1] :] if hit else scores[first:]
        if len(scores) != len(row) - 1 - first:
            raise RuntimeError(f"row {i}: the engine gave {len(scores)} scores, {len(row) - 1 - first} were expected")
        nll.append(-scores.gather(1, torch.tensor(row[first + 1 :])[:, None]).double().mean().item())
        if written:
            kept.append(scores)
        else:
            kl.append(divergence(known[i], scores))
    if written:
        Path(reference).parent.mkdir(parents=True, exist_ok=True)
        torch.save(kept, reference)
    mean = sum(nll) / len(nll)
    return {
        "perplexity": math.exp(mean), "nll": nll, "kl": sum(kl) / len(kl) if kl else None, "kl_rows": kl,
        "tokens": sum(len(row) - 1 - first for row in rows), "cached_tokens": cached,
        "chunk": spec.batched_tokens, "hit": hit,
    }  # fmt: skip


def sampling(prompt_logprobs: int | None) -> Any:
    """One greedy token, with the prompt's log-probabilities or without; pages of other requests are read."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=1, prompt_logprobs=prompt_logprobs, detokenize=False, skip_reading_prefix_cache=False
    )


def divergence(exact: Tensor, other: Tensor) -> float:
    """Mean over tokens of $\\sum_v p_v (\\log p_v - \\log q_v)$ in nats, ``exact`` and ``other`` ``[n, vocab]``."""
    total = 0.0
    for p, q in zip(exact.split(64), other.split(64), strict=True):
        total += (p.double().exp() * (p.double() - q.double())).sum().item()
    return total / len(exact)
