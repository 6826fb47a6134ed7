"""Many random requests on an engine whose cache is too small for them, each checked against a run of its own."""

import random
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from headq_ao.evals.vllm.engine import Ask, Driver, EngineSpec, page_tokens, start

IN_FLIGHT = 12
PREFIXES = 8  # that half of the requests begin with
ABORTED = 10  # one in so many
CHANGE = 1e-3  # nats; fp32 sums in another order change less


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
    """One engine, its requests, and what those gave that are run again, ``recheck`` of them; of the others nothing is
    kept."""

    def __init__(self, spec: EngineSpec, requests: int, longest: int, recheck: int) -> None:
        self.llm = start(spec)
        self.driver = Driver(self.llm)
        self.engine, self.scheduler = self.driver.engine, self.driver.scheduler
        self.block = page_tokens(self.llm)
        self.rng = random.Random(0)
        self.prompts = prompts(requests, longest, self.rng, self.engine.model_config.get_vocab_size())
        self.lengths = [self.rng.randrange(1, 100) for _ in range(requests)]
        stay = [i for i in range(requests) if i % ABORTED != ABORTED - 1]
        self.again = set(self.rng.sample(stay, min(recheck, len(stay))))
        self.finished, self.resident = 0, [resident()]
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
        found = self.blocks.pop(name, None) or self.blocks.pop(name.rpartition("-")[0])
        full = torch.tensor(found[0][: found[1] // self.block], dtype=torch.long)
        held: torch.Tensor = self.pages_of_layer[full].flatten(1).contiguous().view(torch.uint8)
        return held[:, : self.coded]

    def together(self, progress: Any) -> tuple[dict[int, tuple[Any, torch.Tensor]], int]:
        """All requests, a dozen in flight, one in ten aborted: outputs and pages of those that are run again,
        preemptions, aborts."""
        out: dict[int, tuple[Any, torch.Tensor]] = {}
        waiting, aborted, self.preempted = list(range(len(self.prompts))), 0, 0
        while waiting or self.engine.has_unfinished_requests():
            while waiting and len(self.scheduler.requests) < IN_FLIGHT:
                i = waiting.pop(0)
                ask = self.ask(i, f"r{i}")
                self.driver.add(ask)
                if i % ABORTED == ABORTED - 1:
                    for _ in range(self.rng.randrange(1, 6)):
                        self.collect(out)
                    self.engine.abort_request([f"r{i}"])
                    self.blocks.pop(f"r{i}", None)
                    aborted += 1
            self.collect(out)
            if 10 * (len(self.prompts) - len(waiting)) >= len(self.resident) * len(self.prompts):
                self.resident.append(resident())
            progress(None)
        return out, aborted

    def collect(self, out: dict[int, tuple[Any, torch.Tensor]]) -> None:
        """One step; what finished and is run again goes to ``out``."""
        self.watch()
        outputs = self.engine.step()
        self.preempted += self.driver.counts[2]
        for output in outputs:
            if output.finished and output.outputs[0].finish_reason == "length":
                self.finished += 1
                i, pages = int(output.request_id[1:]), self.pages(output.request_id)
                if i in self.again:
                    out[i] = (output, pages)

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
        nats between the two likeliest tokens where they first do, the largest change of a chosen token's
        log-probability up to there and how many requests have one of :data:`CHANGE`, and the share of layer 0's page
        bytes that differ;
        resident memory in MiB at first and after each tenth of the requests.
    """
    soak = Soak(spec, requests, longest, recheck)
    out, aborted = soak.together(progress)
    gaps, changes, differing, total = [], [], 0, 0
    for i in tqdm(sorted(out), desc="alone", unit="request"):
        (output, pages), (again, expected) = out[i], soak.alone(i)
        gap = first_gap(again.outputs[0], output.outputs[0])
        gaps += [] if gap is None else [gap]
        changes.append(largest_change(again.outputs[0], output.outputs[0]))
        n = min(len(pages), len(soak.prompts[i]) // soak.block)
        differing += int((pages[:n] != expected[:n]).sum())
        total += expected[:n].numel()
    return {
        "finished": soak.finished, "aborted": aborted, "preempted": soak.preempted, "rechecked": len(out),
        "different": len(gaps), "largest_gap": max(gaps, default=0.0), "largest_change": max(changes),
        "requests_changed": sum(change > CHANGE for change in changes), "page_bytes": total,
        "page_bytes_differing": differing / total if total else 0.0, "resident_mib": soak.resident,
    }  # fmt: skip


def first_gap(expected: Any, found: Any) -> float | None:
    """Nats between the two likeliest tokens where two outputs first differ; None where they do not."""
    for i, (a, b) in enumerate(zip(expected.token_ids, found.token_ids, strict=True)):
        if a != b:
            best = sorted((x.logprob for x in expected.logprobs[i].values()), reverse=True)
            return float(best[0] - best[1])
    return None


def largest_change(expected: Any, found: Any) -> float:
    """Nats by which the log-probability of a chosen token differs, as long as the outputs are the same."""
    most = 0.0
    for i, (a, b) in enumerate(zip(expected.token_ids, found.token_ids, strict=True)):
        if a != b:
            break
        most = max(most, abs(expected.logprobs[i][a].logprob - found.logprobs[i][b].logprob))
    return most


def resident() -> float:
    """MiB of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / (1 << 20)
