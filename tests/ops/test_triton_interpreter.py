"""The Triton kernels' results without a GPU: the cases of triton_interpreted.py, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import headq_ao.ops  # noqa: F401 registers the operators

CASES = Path(__file__).with_name("triton_interpreted.py")


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", str(CASES)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@pytest.mark.parametrize("name", ["decode_attention", "feedback_codes"])
def test_operators_have_a_kernel_for_gpus(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"headq::{name}", "CUDA")
