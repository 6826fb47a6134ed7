"""The time of a decode step over full pages."""

import random
import statistics
from typing import Any

from headq_ao.evals.vllm.engine import Ask, Driver, EngineSpec, Run, start

WARM_UP = 3  # steps that are not counted


def prompts(count: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random token ids; no two prompts share a page."""
    rng = random.Random(seed)
    return [[rng.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]


def fixed(tokens: int) -> Any:
    """Greedy sampling of exactly ``tokens`` tokens, as ids alone and all at once."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )


def measure(spec: EngineSpec, cells: list[tuple[int, int]], steps: int, progress: Any) -> list[dict[str, Any]]:
    """Milliseconds of a step for each ``(context, batch)``: median over ``steps`` steps that had the whole batch.

    The pages are filled by vLLM's own DecodeBenchConnector, so that no prefill is waited for.
    """
    driver = Driver(start(spec))
    vocabulary = driver.engine.model_config.get_vocab_size()
    found = []
    for context, batch in cells:
        asks = [
            Ask(f"{context}-{batch}-{i}", ids, fixed(steps + WARM_UP + 2))
            for i, ids in enumerate(prompts(batch, context, vocabulary))
        ]
        run = driver.run(asks, on_step=progress)
        found.append({"context": context, "batch": batch, **step_times(run, batch)})
    return found


def step_times(run: Run, batch: int) -> dict[str, Any]:
    """Median and quartiles of the wall time, and the CPU's median, of steps that decoded ``batch`` requests.

    Raises:
        RuntimeError: when no step did: the cache did not hold the batch.
    """
    kept = [s for s in run.steps if s.prompt_tokens == 0 and s.decode_tokens == batch][WARM_UP:]
    if not kept:
        raise RuntimeError(f"no step decoded {batch} requests at once: the cache does not hold them")
    wall = sorted(1e3 * s.wall for s in kept)
    return {
        "steps": len(kept),
        "wall_ms": statistics.median(wall),
        "wall_ms_quartiles": [wall[len(wall) // 4], wall[3 * len(wall) // 4]],
        "cpu_ms": statistics.median(1e3 * s.cpu for s in kept),
    }
