"""The Triton kernels' results without a GPU: the cases of triton_interpreted.py, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from headq_ao.ops import MappedQuery, Rows, decode_attention

CASES = Path(__file__).with_name("triton_interpreted.py")


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", str(CASES)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def test_the_operator_is_traced_for_a_gpu():
    """What torch.compile sees on a GPU: one opaque operator with known shapes, on the queries' device."""
    with FakeTensorMode():
        q, line = torch.empty(1, 4, 1, 32, device="cuda"), torch.empty(1, 4, 1, device="cuda")
        plane = torch.empty(1, 2, 4, 2, 16, 4, dtype=torch.uint8, device="cuda")
        scale, grouped = (torch.empty(1, 2, 64, *g, dtype=torch.float16, device="cuda") for g in ((), (1,)))
        seen = torch.empty(1, 1, dtype=torch.int64, device="cuda")
        keys, values = Rows(None, [plane], [2] * 32, scale), Rows(None, [plane], (2,), grouped)
        out, lse = decode_attention(MappedQuery(q, line, line, line), keys, values, seen, seen)
    assert out.shape == (1, 4, 1, 32) and lse.shape == (1, 4, 1)
    assert out.device.type == lse.device.type == "cuda"


@pytest.mark.parametrize("name", ["decode_attention", "feedback_codes"])
def test_operators_have_a_kernel_for_gpus(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"headq::{name}", "CUDA")
