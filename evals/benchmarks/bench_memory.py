"""Peak memory of one long context, in a process of its own: ``python -m headq_ao.evals.benchmarks.bench_memory``."""

import argparse
import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from headq_ao import Calibration, HeadQCache, calibrate, headq_config, quantize_
from headq_ao.evals.harness.inputs import calibrate_on, load
from headq_ao.evals.harness.texts import find_text
from headq_ao.integrations.transformers.models import with_cache

TINY = "tiny"
TINY_VOCABULARY = 512
CACHES = ("dense", "packed")
CALIBRATION_TOKENS = 2048
STEPS = 8


def load_model(name: str, max_length: int) -> tuple[Any, Any]:
    """A model in fp32 and its tokenizer: ``"tiny"``, a random Llama without one, or what an evaluation loads.

    Raises:
        ValueError, OSError, ModuleNotFoundError: when it is missing.
    """
    if name != TINY:
        return load(name, None, torch.float32)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=max_length,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), None


def text_ids(tokenizer: Any, tokens: int) -> Tensor:
    """``[1, tokens]`` of the bundled text, over and over; random ones without a tokenizer."""
    if tokenizer is None:
        return torch.randint(TINY_VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
    text = find_text("bundled", "report").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return ids.repeat(-(-tokens // len(ids)))[None, :tokens]


def calibration_of(model: Any, tokenizer: Any, progress: bool = False) -> Calibration:
    """On the bundled calibration text, or on random ids."""
    if tokenizer is None:
        return calibrate(model, [text_ids(None, 1024)[0]], source="random ids", progress=progress)
    return calibrate_on(model, tokenizer, find_text("bundled", "calibrate"), CALIBRATION_TOKENS, progress)


def new_cache(kind: str, model: Any) -> Any:
    """An empty cache of that kind; the model of a packed one has HeadQ."""
    return HeadQCache(model) if kind == "packed" else DynamicCache(config=model.config)


def held_bytes(cache: Any) -> int:
    """Bytes of the tensors that a cache holds."""
    if isinstance(cache, HeadQCache):
        return cache.get_memory_footprint()
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


class Resident:
    """Resident memory of this process as Linux counts it, in bytes.

    Raises:
        OSError: where the peak cannot be set back.
    """

    STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def now(self) -> int:
        """At present, after what was freed has gone back to the system."""
        gc.collect()
        with contextlib.suppress(AttributeError):  # glibc alone has it
            ctypes.CDLL(None).malloc_trim(0)
        return self._field("VmRSS")

    def restart(self) -> None:
        """Set the peak back to the present."""
        self.CLEAR.write_text("5")

    def peak(self) -> int:
        """The most since :meth:`restart`."""
        return self._field("VmHWM")

    def _field(self, name: str) -> int:
        for line in self.STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        raise OSError(f"this system does not tell {name}")


@torch.no_grad()
def measure(model: Any, kind: str, ids: Tensor) -> dict[str, int]:
    """Resident bytes before, at the peak of and after one prefill of ``ids [1, T]`` and a few decode steps.

    Args:
        model: with HeadQ where the cache is packed.
        kind: ``"dense"`` or ``"packed"``.
        ids: the context.

    Returns:
        ``before``, ``prefill_peak``, ``decode_peak``, ``after``, with the model in each, and ``cache``, the bytes of
        the cache's tensors.
    """
    resident = Resident()
    warm = new_cache(kind, model)
    for _ in range(2):
        model(ids[:, :32], **with_cache(warm), logits_to_keep=1)
    del warm
    found = {"before": resident.now()}
    resident.restart()
    cache = new_cache(kind, model)
    model(ids, **with_cache(cache), logits_to_keep=1)
    found["prefill_peak"] = resident.peak()
    resident.now()
    resident.restart()
    for _ in range(STEPS):
        model(ids[:, -1:], **with_cache(cache), logits_to_keep=1)
    return found | {"decode_peak": resident.peak(), "after": resident.now(), "cache": held_bytes(cache)}


def peaks(name: str, context: int, preset: str | None, calibration: Path | None, threads: int) -> dict[str, Any]:
    """:func:`measure` of both caches, each in a fresh process.

    Raises:
        RuntimeError: when a process fails, with what it said.
    """
    result: dict[str, Any] = {"model": name, "context": context}
    for kind in CACHES:
        command = [sys.executable, "-m", "headq_ao.evals.benchmarks.bench_memory", "--model", name, "--cache", kind]
        command += ["--context", str(context), "--threads", str(threads)]
        command += [] if preset is None else ["--preset", preset]
        command += [] if calibration is None else ["--calibration", str(calibration)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"the memory of {name} could not be measured: {run.stderr.strip().splitlines()[-1]}")
        result[kind] = json.loads(run.stdout.strip().splitlines()[-1])
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command: one cache, one JSON line."""
    parser = argparse.ArgumentParser(
        prog="python -m headq_ao.evals.benchmarks.bench_memory",
        description="Resident memory before, during and after one long context; bytes, as one line of JSON.",
        epilog="example: python -m headq_ao.evals.benchmarks.bench_memory --model tiny --cache packed --context 32768",
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--model", default="smollm2", help=f"'smollm2', 'tiny' (random) or what transformers loads {default}")
    add("--cache", choices=CACHES, default="packed", help=f"DynamicCache or HeadQCache {default}")
    add("--context", type=int, default=8192, help=f"tokens {default}")
    add("--preset", help="of headq_config (default: balanced)")
    add("--calibration", type=Path, help="a saved calibration (default: the prompt's statistics)")
    add("--threads", type=int, default=1, help=f"torch threads {default}")
    args = parser.parse_args(argv)
    try:
        if args.context < 32:
            raise ValueError(f"context must be at least 32, got {args.context}")
        torch.set_num_threads(args.threads)
        model, tokenizer = load_model(args.model, args.context + STEPS + 1)
        if args.cache == "packed":
            path = None if args.calibration is None else str(args.calibration)
            quantize_(model, headq_config(args.preset, calibration=path))
        print(json.dumps(measure(model, args.cache, text_ids(tokenizer, args.context))))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
