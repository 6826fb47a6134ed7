"""All that a GPU is wanted for, in stages of falling worth: ``python -m headq_ao.evals.gpu --help``."""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from headq_ao.evals.benchmarks.triton_table import Case
from headq_ao.evals.gpu.timing import Result

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "recipes" / "results" / "gpu"
TESTS = [
    "tests/ops/paged_interpreted.py",
    "tests/ops/step_interpreted.py",
    "tests/ops/feedback_interpreted.py",
    "tests/test_gpu.py",
]
# seconds that a stage may take, and what it does
STAGES = {
    "tests": (120, "tests of kernels and of quantized models"),
    "steps": (150, "steps of a 32-layer model of 8B shape under CUDA graphs, over StaticCache"),
    "layers": (180, "attention of one layer: decoding over SDPA and a bf16 kernel, a chunk over flash attention"),
    "coding": (90, "coding of tokens and prefill"),
    "profile": (120, "kernels of a whole model's prompt, chunk and step, by name"),
}
CASES = (Case(32, 8, 128, 2, 2), Case(9, 3, 64, 2, 2), Case(8, 1, 256, 2, 2))
CELLS = ((1, 4096), (1, 32768), (16, 32768), (1, 131072))
CHUNKS = ((256, 28672), (4096, 28672))  # new tokens, and packed ones before them
PROFILED_LAYERS = 8  # all are alike
BYTES_PER_TOKEN = 131072  # of the 8B shape's dense cache
EPILOG = """\
Each stage runs in a process of its own under its time limit and writes OUT/STAGE.json after every row, so that a cut
loses no more than the row under way. Kernels are compiled at first use, and only those that a stage needs.

examples:
  make gpu                                                   all stages, results into recipes/results/gpu
  python -m headq_ao.evals.gpu --stages steps --limit 300    one stage
  python -m headq_ao.evals.gpu --dry-run --out /tmp/dry      tiny shapes on the CPU, kernels in Triton's interpreter
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m headq_ao.evals.gpu", description="Test and time HeadQ on a GPU, stage by stage.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    default = "(default: %(default)s)"
    p.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help=f"which, in order {default}")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: recipes/results/gpu)")
    p.add_argument("--limit", type=int, help="seconds for each stage (default: by stage, see the plan it prints)")
    p.add_argument("--layers", type=int, default=32, help=f"of the model {default}")
    p.add_argument("--repeats", type=int, default=20, help=f"replays of which the median counts {default}")
    p.add_argument(
        "--dry-run", action="store_true", help="try everything on the CPU with tiny shapes; times say nothing"
    )
    p.add_argument("--only", choices=STAGES, help=argparse.SUPPRESS)  # within a stage's own process
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when every stage ended well, 1 when one failed or was cut, 2 without a GPU."""
    args = parser().parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print("error: PyTorch finds no CUDA or HIP device here; --dry-run tries everything on the CPU", file=sys.stderr)
        return 2
    if args.only:
        return run(args.only, args)
    limits = {stage: args.limit or STAGES[stage][0] for stage in args.stages}
    print(f"at most {sum(limits.values())} s:")
    for stage in args.stages:
        print(f"  {stage:<7} {limits[stage]:>4} s  {STAGES[stage][1]}")
    failed = [stage for stage in args.stages if not staged(stage, limits[stage], args)]
    print(f"results in {args.out}" + (f"; failed or cut: {', '.join(failed)}" if failed else ""))
    return bool(failed)


def staged(stage: str, limit: int, args: argparse.Namespace) -> bool:
    """Run a stage in a process of its own; whether it ended well within its limit."""
    command = [sys.executable, "-m", "headq_ao.evals.gpu", "--only", stage, "--out", str(args.out)]
    command += ["--layers", str(args.layers), "--repeats", str(args.repeats), *["--dry-run"] * args.dry_run]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if args.dry_run else {})
    print(f"--- {stage}", flush=True)
    start = time.perf_counter()
    try:
        code = subprocess.run(command, env=environment, timeout=limit, cwd=ROOT, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"--- {stage} was cut after {limit} s", flush=True)
        return False
    print(f"--- {stage}: {'done' if code == 0 else f'exit status {code}'} in {time.perf_counter() - start:.0f} s")
    return code == 0


def run(stage: str, args: argparse.Namespace) -> int:
    """One stage, in this process."""
    dry = args.dry_run
    device = torch.device("cpu" if dry else "cuda")
    if dry:
        from headq_ao.ops.dispatch import KERNELS

        for operator in ("paged_attention", "feedback_codes" if stage == "coding" else "cache_update"):
            KERNELS[operator]["cpu"] = KERNELS[operator]["cuda"]
    result = Result(args.out / f"{stage}.json", device)
    if stage == "tests":
        return tests(result, dry)
    if stage == "steps":
        from headq_ao.evals.gpu import steps

        cells = ((1, 84),) if dry else fitting(device)  # each step of it packs a token
        steps.measure(cells, 1 if dry else args.layers, args.repeats, device, result, 32 if dry else 128)
    elif stage == "layers":
        from headq_ao.evals.gpu import chunks, layers

        cases = (Case(4, 2, 32, 2, 2),) if dry else CASES
        layers.measure(cases, ((1, 64),) if dry else CELLS, args.repeats, device, result)
        chunks.measure(cases, ((40, 160),) if dry else CHUNKS, args.repeats, device, result)
    elif stage == "profile":
        from headq_ao.evals.gpu import profiles

        if dry:
            profiles.measure(84, 40, 1, device, result, 32)
        else:
            profiles.measure(8192, 2048, PROFILED_LAYERS, device, result)
    else:
        from headq_ao.evals.gpu import coding

        if dry:
            coding.measure((16,), 8, 1, 100, device, 1, result, 32)
        else:
            coding.measure((64, 128), 4096, 8, 8192, device, args.repeats, result)
    result.finish()
    return 0


def fitting(device: torch.device) -> list[tuple[int, int]]:
    """The cells, with as many sequences as have a dense cache that fits beside 16 GB of weights."""
    room = torch.cuda.get_device_properties(device).total_memory - 24e9
    most = {context: int(room / (context * BYTES_PER_TOKEN * 1.1)) for _, context in CELLS}
    return [(min(batch, most[context]), context) for batch, context in CELLS if most[context]]


def tests(result: Result, dry: bool) -> int:
    """The tests that want a GPU; how many passed."""
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") and not dry else []
    chosen = [TESTS[0], "-k", "2 bits"] if dry else TESTS
    command = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "--tb=short",
        "--maxfail=20",
        "-W",
        "ignore::SyntaxWarning",
        *parallel,
        *chosen,
    ]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *command], cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    print(found.stdout[-6000:], flush=True)
    closing = next((line for line in reversed(found.stdout.splitlines()) if " in " in line), "")
    failed = [line for line in found.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    result.add(files=chosen, closing=closing.strip("= "), failed=failed)
    result.finish()
    return found.returncode


if __name__ == "__main__":
    sys.exit(main())
