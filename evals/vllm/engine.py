"""An engine in this process, with one of the caches that are compared, and what a run of it shows step by step."""

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

GIB = 1 << 30
CACHES = ("bf16", "fp8", "headq")
DECODE_ONLY = {"kv_connector": "DecodeBenchConnector", "kv_role": "kv_both", "kv_connector_extra_config": {}}


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is started with; plain data, so that a child process can be told.

    Args:
        model: checkpoint folder.
        cache: ``"bf16"``, ``"fp8"`` or ``"headq"``.
        max_model_len: vLLM's.
        batched_tokens, sequences: vLLM's ``max_num_batched_tokens`` and ``max_num_seqs``.
        block_size: tokens of a page; None: vLLM's own 128, the plug-in's own for headq.
        cache_bytes: of all pages together.
        headq: the plug-in's settings (``calibration``, ``preset``, ``window``), used where ``cache`` is ``"headq"``.
        prefix_caching: whether pages of finished requests are found again.
        filled: prompts are not computed, their pages are filled by vLLM's ``DecodeBenchConnector``: for decode steps.
        compiled: whether the model goes through torch.compile, as vLLM's default is.
        dtype: of the model.
        dummy: random weights, for what does not depend on them.
        adapter: folder of an adapter (LoRA) that all requests use.
    """

    model: str
    cache: str = "bf16"
    max_model_len: int = 8192
    batched_tokens: int = 2048
    sequences: int = 64
    block_size: int | None = None
    cache_bytes: int = GIB
    headq: dict[str, Any] = field(default_factory=dict)
    prefix_caching: bool = False
    filled: bool = False
    compiled: bool = False
    dtype: str = "bfloat16"
    dummy: bool = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.cache not in CACHES:
            raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {self.cache!r}")

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``vllm.LLM``."""
        options: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": self.batched_tokens,
            "max_num_seqs": self.sequences,
            "kv_cache_memory_bytes": self.cache_bytes,
            "enable_chunked_prefill": True,
            "enable_prefix_caching": self.prefix_caching,
            "enforce_eager": not self.compiled,
            "seed": 0,
        }
        if self.block_size is not None:
            options["block_size"] = self.block_size
        if self.cache == "fp8":
            options["kv_cache_dtype"] = "fp8"
        if self.cache == "headq":
            options |= {"attention_backend": "CUSTOM", "additional_config": {"headq": self.headq}}
        if self.filled:
            options |= {"kv_transfer_config": DECODE_ONLY, "disable_hybrid_kv_cache_manager": False}
        if self.dummy:
            options["load_format"] = "dummy"
        if self.adapter is not None:
            options |= {"enable_lora": True, "max_lora_rank": 64, "max_loras": 1}
        return options

    def describe(self) -> dict[str, Any]:
        """Plain data for a result: without folders that only this machine has."""
        data = dataclasses.asdict(self)
        data["model"] = self.model.rstrip("/").rpartition("/")[2]
        data["adapter"] = self.adapter and self.adapter.rstrip("/").rpartition("/")[2]
        data["headq"] = {k: v.rpartition("/")[2] if isinstance(v, str) else v for k, v in self.headq.items()}
        return data if self.cache == "headq" else {k: v for k, v in data.items() if k != "headq"}


def start(spec: EngineSpec) -> Any:
    """A ``vllm.LLM``; in this process where ``VLLM_ENABLE_V1_MULTIPROCESSING=0``."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    options = spec.arguments()
    if "kv_transfer_config" in options:
        options["kv_transfer_config"] = KVTransferConfig(**options["kv_transfer_config"])
    return LLM(**options)


def pages(llm: Any) -> dict[str, Any]:
    """What vLLM itself says about the cache: pages, tokens that fit, and for how many requests of the longest kind."""
    config = llm.llm_engine.vllm_config.cache_config
    return {
        "pages": config.num_gpu_blocks,
        "page_tokens": page_tokens(llm),
        "tokens": config.kv_cache_size_tokens,
        "requests_of_max_model_len": config.kv_cache_max_concurrency,
    }


def page_tokens(llm: Any) -> int:
    """Tokens of a page of the first KV cache group, the one that holds whole requests."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    size: int = scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    return size


@dataclass(frozen=True)
class Step:
    """One engine step.

    Args:
        wall, cpu: seconds, the CPU's of the whole process.
        prompt_tokens: of prompts, and of requests that are computed again after a preemption.
        decode_tokens: requests that went one token on.
        preempted: requests that lost their pages.
    """

    wall: float
    cpu: float
    prompt_tokens: int
    decode_tokens: int
    preempted: int = 0


@dataclass(frozen=True)
class Ask:
    """A request: an id, a prompt as token ids, and vLLM's sampling parameters."""

    name: str
    prompt: list[int]
    sampling: Any


@dataclass
class Run:
    """A whole run: its steps, and the finished outputs in the order in which they finished."""

    steps: list[Step]
    outputs: list[Any]

    def total(self, name: str, decode_only: bool | None = None) -> float:
        """Sum of a field over the steps: all, those without prompt tokens, or those with some."""
        kept = (s for s in self.steps if decode_only is None or decode_only == (s.prompt_tokens == 0))
        return float(sum(getattr(s, name) for s in kept))

    def summary(self) -> dict[str, Any]:
        """Wall and CPU of the run, what share went into steps with prompt tokens, and the decode phase's speed."""
        out: dict[str, Any] = {"steps": len(self.steps)}
        for clock in ("wall", "cpu"):
            whole, decode = self.total(clock), self.total(clock, True)
            tokens = self.total("decode_tokens", True)
            out[clock] = {
                "seconds": whole,
                "prefill_share": 1 - decode / whole if whole else None,
                "decode_tokens_per_second": tokens / decode if decode else None,
            }
        for name in ("prompt_tokens", "decode_tokens", "preempted"):
            out[name] = int(self.total(name))
        out["largest_batch"] = max((s.decode_tokens for s in self.steps), default=0)
        return out


class Driver:
    """Runs requests through an engine in this process, one step at a time.

    Raises:
        RuntimeError: when the engine is in another process, where its scheduler cannot be read.
    """

    def __init__(self, llm: Any, adapter: str | None = None) -> None:
        self.engine, self.adapter = llm.llm_engine, None
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            self.adapter = LoRARequest("adapter", 1, adapter)
        core = getattr(self.engine.engine_core, "engine_core", None)
        if core is None:
            raise RuntimeError("steps are timed in one process: set VLLM_ENABLE_V1_MULTIPROCESSING=0")
        self.scheduler = core.scheduler
        self.counts = (0, 0, 0)
        schedule = self.scheduler.schedule

        def counted(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.counts = (*self.count(output.num_scheduled_tokens), len(output.preempted_req_ids or ()))
            return output

        self.scheduler.schedule = counted

    def add(self, ask: Ask) -> None:
        """A request, to be run."""
        self.engine.add_request(
            ask.name, {"prompt_token_ids": ask.prompt}, ask.sampling, lora_request=self.adapter
        )  # fmt: skip

    def count(self, scheduled: dict[str, int]) -> tuple[int, int]:
        """Prompt tokens and decode tokens of a step, from the tokens scheduled for each request."""
        prompt = decode = 0
        for name, n in scheduled.items():
            request = self.scheduler.requests[name]
            before = request.num_computed_tokens - n  # the scheduler has counted them already
            if before >= request.num_prompt_tokens and n == 1:
                decode += 1
            else:
                prompt += n
        return prompt, decode

    def run(
        self,
        asks: Iterable[Ask],
        then: Callable[[Any], Ask | None] = lambda output: None,
        on_step: Callable[[Step], None] = lambda step: None,
    ) -> Run:
        """Everything in ``asks`` at once, and what ``then`` asks when a request has finished."""
        run = Run([], [])
        for ask in asks:
            self.add(ask)
        while self.engine.has_unfinished_requests():
            wall, cpu = time.perf_counter(), time.process_time()
            outputs = self.engine.step()
            step = Step(time.perf_counter() - wall, time.process_time() - cpu, *self.counts)
            run.steps.append(step)
            on_step(step)
            for output in outputs:
                if output.finished:
                    run.outputs.append(output)
                    if (follow := then(output)) is not None:
                        self.add(follow)
        return run
