"""Many random requests on an engine whose cache is too small for them, each checked against a run of its own."""

import random
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from headq_ao.evals.vllm.engine import Ask, Driver, EngineSpec, page_tokens, start

IN_FLIGHT = 12
PREFIXES = 8  # that half of the requests begin with


def prompts(count: int, longest: int, rng: random.Random, vocabulary: int) -> list[list[int]]:
    """Lengths from 1, evenly in their logarithm; half begin with one of a few prefixes."""

    def ids(n: int) -> list[int]:
        return [rng.randrange(3, vocabulary) for _ in range(n)]

    shared = [ids(longest * 3 // 4) for _ in range(PREFIXES)]
    out = []
    for _ in range(count):
        length = max(1, round(longest ** rng.random()))
        prefix = rng.choice(shared)[: rng.randrange(length)] if rng.random() < 0.5 else []
        out.append(prefix + ids(length - len(prefix)))
    return out


class Soak:
    """One engine, its requests, and what they gave."""

    def __init__(self, spec: EngineSpec, requests: int, longest: int) -> None:
        self.llm = start(spec)
        self.driver = Driver(self.llm)
        self.engine, self.scheduler = self.driver.engine, self.driver.scheduler
        self.block = page_tokens(self.llm)
        self.rng = random.Random(0)
        self.prompts = prompts(requests, longest, self.rng, self.engine.model_config.get_vocab_size())
        self.lengths = [self.rng.randrange(1, 100) for _ in range(requests)]
        layers = self.engine.vllm_config.compilation_config.static_forward_context
        self.layer = min((name for name in layers if name.endswith(".attn")), key=len)
        self.pages_of_layer = layers[self.layer].kv_cache
        codec = getattr(layers[self.layer].impl, "codec", None)
        self.coded = codec and codec.layout(self.block).bytes_of_page(0, torch.float32)  # without the room for sinks
        self.blocks: dict[str, tuple[list[int], int]] = {}

    def ask(self, i: int, name: str) -> Ask:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0, max_tokens=self.lengths[i], ignore_eos=True, logprobs=2, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        return Ask(name, self.prompts[i], sampling)

    def watch(self) -> None:
        """Note where each running request's pages are."""
        for name, request in self.scheduler.requests.items():
            blocks = self.scheduler.kv_cache_manager.get_block_ids(name)[0]
            self.blocks[name.rpartition("-")[0] or name] = (list(blocks), request.num_computed_tokens)

    def pages(self, name: str) -> torch.Tensor:
        """Bytes ``[pages, n]`` of a request that has just finished, full pages only; they are not used again yet."""
        found = self.blocks.get(name) or self.blocks[name.rpartition("-")[0]]
        full = torch.tensor(found[0][: found[1] // self.block], dtype=torch.long)
        held: torch.Tensor = self.pages_of_layer[full].flatten(1).contiguous().view(torch.uint8)
        return held[:, : self.coded]

    def together(self, progress: Any) -> tuple[dict[int, tuple[Any, torch.Tensor]], int, int]:
        """All requests, a dozen in flight, one in ten aborted: outputs and pages, preemptions, aborts."""
        out: dict[int, tuple[Any, torch.Tensor]] = {}
        waiting, aborted, preempted = list(range(len(self.prompts))), 0, 0
        while waiting or self.engine.has_unfinished_requests():
            while waiting and len(self.scheduler.requests) < IN_FLIGHT:
                i = waiting.pop(0)
                ask = self.ask(i, f"r{i}")
                self.driver.add(ask)
                if i % 10 == 9:
                    for _ in range(self.rng.randrange(1, 6)):
                        self.collect(out)
                    self.engine.abort_request([f"r{i}"])
                    aborted += 1
            self.collect(out)
            preempted += self.driver.counts[2]
            progress(None)
        return out, preempted, aborted

    def collect(self, out: dict[int, tuple[Any, torch.Tensor]]) -> None:
        """One step; what finished goes to ``out``."""
        self.watch()
        for output in self.engine.step():
            if output.finished and output.outputs[0].finish_reason == "length":
                out[int(output.request_id[1:])] = (output, self.pages(output.request_id))

    def alone(self, i: int) -> tuple[Any, torch.Tensor]:
        """One request by itself, with no page to find."""
        assert self.llm.reset_prefix_cache()
        ask = self.ask(i, f"a{i}")
        self.driver.add(ask)
        while self.engine.has_unfinished_requests():
            self.watch()
            for output in self.engine.step():
                if output.finished:
                    return output, self.pages(output.request_id)
        raise RuntimeError(f"request {i} did not finish")


def measure(spec: EngineSpec, requests: int, longest: int, recheck: int, progress: Any) -> dict[str, Any]:
    """Run the soak, then ``recheck`` of its requests alone.

    Returns:
        ``finished``, ``aborted``, ``preempted``; of those run again: how many differ in a token, the largest gap in
        nats between the two likeliest tokens where they first do, and the share of layer 0's page bytes that differ;
        resident memory in MiB at the first and the second half's end.
    """
    soak = Soak(spec, requests, longest)
    before = resident()
    out, preempted, aborted = soak.together(progress)
    after = resident()
    gaps, differing, total = [], 0, 0
    for i in tqdm(soak.rng.sample(sorted(out), min(recheck, len(out))), desc="alone", unit="request"):
        (output, pages), (again, expected) = out[i], soak.alone(i)
        gap = first_gap(again.outputs[0], output.outputs[0])
        gaps += [] if gap is None else [gap]
        n = min(len(pages), len(soak.prompts[i]) // soak.block)
        differing += int((pages[:n] != expected[:n]).sum())
        total += expected[:n].numel()
    return {
        "finished": len(out), "aborted": aborted, "preempted": preempted, "rechecked": min(recheck, len(out)),
        "different": len(gaps), "largest_gap": max(gaps, default=0.0), "page_bytes": total,
        "page_bytes_differing": differing / total if total else 0.0, "resident_mib": [before, after],
    }  # fmt: skip


def first_gap(expected: Any, found: Any) -> float | None:
    """Nats between the two likeliest tokens where two outputs first differ; None where they do not."""
    for i, (a, b) in enumerate(zip(expected.token_ids, found.token_ids, strict=True)):
        if a != b:
            best = sorted((x.logprob for x in expected.logprobs[i].values()), reverse=True)
            return float(best[0] - best[1])
    return None


def resident() -> float:
    """MiB of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / (1 << 20)
