"""Command line: ``python -m headq_ao.evals.vllm``."""

import argparse
import sys
from collections.abc import Sequence

from headq_ao.evals.vllm import adapter, convert, measure, recall, server, soak_command

COMMANDS = {
    "convert": (convert.add_arguments, convert.run, "a model of the evaluations as a folder that vLLM serves"),
    "adapter": (adapter.add_arguments, adapter.run, "a random adapter that changes a model's keys and values"),
    "capacity": (measure.add_capacity, measure.capacity, "tokens that fit, as vLLM says"),
    "quality": (measure.add_quality, measure.quality, "perplexity and KL to vLLM's bf16 cache"),
    "decode": (measure.add_decode, measure.decode, "time of a decode step over full pages"),
    "requests": (measure.add_requests, measure.requests, "many requests at once"),
    "conversations": (measure.add_conversations, measure.conversations, "conversations that return to long prefixes"),
    "recall": (recall.add_arguments, recall.run, "lm_eval --model vllm on the recall tasks"),
    "soak": (
        soak_command.add_arguments,
        soak_command.run,
        "random requests on a small cache, each checked (slow)",
    ),
    "serve": (server.add_arguments, server.run, "SmolLM2 behind an OpenAI server on loopback"),
}
EPILOG = """\
example, in the environment of `make test-vllm` (convert runs in any that has the model):
  python -m headq_ao.evals.vllm convert build/smollm2 --calibration build/smollm2.headq.safetensors
  python -m headq_ao.evals.vllm decode build/smollm2 --calibration build/smollm2.headq.safetensors --quick

Each cache runs in a process of its own with a fresh engine, the caches in turns, --rounds times. Each result is kept in
--out as soon as it is there: wall and CPU time, the engine's settings, versions, commit, machine, load.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m headq_ao.evals.vllm",
        description="vLLM with a HeadQ cache, measured beside its bf16 and fp8 caches.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (add, _, text) in COMMANDS.items():
        add(commands.add_parser(name, help=text, description=text))
    args = parser.parse_args(argv)
    try:
        return COMMANDS[args.command][1](args)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
