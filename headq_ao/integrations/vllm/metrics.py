"""Counters of a serving engine, beside vLLM's own: what was packed, and what was turned away."""

import functools
from typing import Any

from prometheus_client import Counter
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from headq_ao.integrations.vllm.settings import settings


@functools.cache
def _metrics() -> dict[str, Any]:
    """Of this process; Prometheus takes each name once."""
    return {
        "tokens": Counter(
            "headq:packed_tokens", "Tokens coded into packed pages, each once in all layers.", ["engine"]
        ),
        "bytes": Counter("headq:packed_bytes", "Bytes of those codes and their scales.", ["engine"]),
        "rejections": Counter("headq:refused_requests", "Requests that were turned away.", ["engine", "reason"]),
    }


class PackedCounters(AggregateStatLoggerBase):
    """vLLM makes one in each serving process; it counts where HeadQ is the attention backend.

    A token is counted when its output is: a prompt's tokens with its first token, those found in the prefix cache left
    out; rejected drafts are not counted.
    """

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        self.on = vllm_config.attention_config.backend == AttentionBackendEnum.CUSTOM
        self.config, self.engines, self.bytes_of_token = vllm_config, [str(i) for i in engine_indexes], 0.0

    def log_engine_initialized(self) -> None:
        """See :class:`StatLoggerBase`."""
        if self.on:
            self.bytes_of_token = settings(self.config).bytes_of_token()

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """See :class:`StatLoggerBase`."""
        if self.on and iteration_stats is not None:
            tokens, engine = (
                iteration_stats.prompt_token_stats.computed + iteration_stats.num_generation_tokens,
                str(engine_idx),
            )
            _metrics()["tokens"].labels(engine).inc(tokens)
            _metrics()["bytes"].labels(engine).inc(tokens * self.bytes_of_token)

    def record_admission_rejection(self, reason: str) -> None:
        """See :class:`AggregateStatLoggerBase`."""
        if self.on:
            for engine in self.engines:
                _metrics()["rejections"].labels(engine, reason).inc()
