"""Which kernel of ``paged_attention`` serves what: each cell gives what the reference gives, or is refused, by the
launch and by the plan, and then the operator's own way gives it.

Triton's cells run where Triton interprets, or on a GPU; elsewhere this file runs itself in a process that interprets.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from headq_ao.ops import dispatch, paged_attention, plan_attention
from headq_ao.ops.paged_attention import cpu_kernel, reference
from headq_ao.ops.types import Visible
from tests.ops.frames import some_frame
from tests.ops.paged_cases import Case, make
from tests.ops.paged_triton_cases import moved

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_HERE = INTERPRETED or torch.cuda.is_available()
BOTH = ("decode", "chunk")
NEW = {"decode": 1, "chunk": 40}  # more than either kernel takes as codes at once
SCALING, GROUP = 0.25, 2
ERROR = 1e-3  # relative, of the output in fp32: factors in fp16 or of 15 bits


@dataclass(frozen=True)
class Row:
    """A feature: its cache, what queries see, and which phases each kernel serves; the others it refuses."""

    case: Case
    sliding: int = 0
    every: int = 0  # tokens of a chunk of chunked attention: a query sees from the start of its own on
    cpp: tuple[str, ...] = BOTH
    triton: tuple[str, ...] = BOTH
    quick: bool = False  # its Triton cells run in every run of the tests


def heads_of(dim, values=None, **options):
    """Heads of ``dim`` coordinates, values of as many or of others."""
    return Case(
        packed=(70, 40), window=(20, 8), new=(0, 0), heads=(1,), keys=((2,) * dim,), key_dim=dim,
        value_dim=dim if values is None else values, **options,
    )  # fmt: skip


def one_row(dim):
    """Latent attention: one row is key and value."""
    return replace(heads_of(dim), shared=True, keys=((3,) * dim,))


SMALL = heads_of(32)
MIXED = replace(SMALL, heads=(1, 2), keys=((2,) * 32, (3,) * 32), values=(4, 2))
# fmt: off
MATRIX = {
    "plain":                         Row(SMALL, quick=True),
    "heads of several bits":         Row(MIXED),
    "fp16 scales":                   Row(replace(MIXED, scale_bits=16)),
    "zeros, groups of values":       Row(replace(SMALL, key_zero=True, value_zero=True, value_groups=2)),
    "no sinks":                      Row(replace(SMALL, sinks=0)),
    "many sinks":                    Row(replace(SMALL, sinks=40)),
    "softcap":                       Row(replace(MIXED, softcap=1.0)),
    "sliding":                       Row(SMALL, sliding=50),
    "sliding, pages used again":     Row(replace(SMALL, packed=(150, 99), columns=3), sliding=60),
    "sliding, softcap":              Row(replace(SMALL, softcap=1.0), sliding=50),
    "start of a chunk":              Row(SMALL, every=64, quick=True),
    "several segments":              Row(replace(SMALL, segments=2)),
    "several segments, softcap":     Row(replace(SMALL, segments=3, softcap=1.0)),
    "keys in a frame":               Row(replace(SMALL, packed=(150, 40), frame=some_frame(32, 128))),
    "keys in a frame of few tokens": Row(replace(SMALL, frame=some_frame(32, 32)), triton=()),
    "keys in a frame, sliding":      Row(replace(SMALL, packed=(150, 40), frame=some_frame(32, 128)), sliding=90),
    "heads of 16":                   Row(heads_of(16)),
    "heads of 80":                   Row(heads_of(80)),
    "heads of 128":                  Row(heads_of(128)),
    "heads of 256":                  Row(heads_of(256)),
    "heads of 288":                  Row(heads_of(288), triton=()),
    "heads of 512":                  Row(heads_of(512), triton=()),
    "heads of 576":                  Row(heads_of(576), triton=()),
    "values narrower than keys":     Row(heads_of(48, 32)),
    "values wider than keys":        Row(heads_of(32, 64)),
    "192 and 128":                   Row(heads_of(192, 128)),
    "one row, 48":                   Row(one_row(48), triton=()),
    "one row, 576":                  Row(one_row(576), triton=()),
    "keys that are not coded":       Row(replace(SMALL, keys=((),)), cpp=(), triton=()),
    "values that are not coded":     Row(replace(SMALL, values=(0,)), cpp=(), triton=()),
    "fp64":                          Row(replace(SMALL, dtype=torch.float64), cpp=(), triton=()),
}
# fmt: on
CELLS = [pytest.param(name, phase, id=f"{name}-{phase}") for name in MATRIX for phase in BOTH]
QUICK = [name for name, row in MATRIX.items() if row.quick]


def arguments(row, phase, device):
    """Queries, scaling, cache, readers, what is visible, and the sliding window."""
    new = NEW[phase]
    case = row.case if phase == "decode" else replace(row.case, new=(new, new - 3))
    kv, readers = make(case)
    g = torch.Generator().manual_seed(2)
    q = torch.randn(len(case.packed), GROUP * sum(case.heads), new, case.key_dim, generator=g).to(case.dtype)
    visible = None
    if row.every:
        position = kv.total[:, None] - new + torch.arange(new)
        visible = Visible((position // row.every * row.every).clamp(min=0), position + 1)
    return moved((q, SCALING, kv, readers, visible, row.sliding), device)


def check(row, phase, module, served, device, monkeypatch):
    """One cell."""
    q, _, kv, readers, _, sliding = given = arguments(row, phase, device)
    found = module.launch(*given, None)
    planned = replace(kv, new_k=None, new_v=None, new_start=None)
    plan = None if readers.query_map is None else plan_attention
    monkeypatch.setitem(dispatch.KERNELS["paged_attention"], device.type, module.__name__.removeprefix("headq_ao.ops."))
    expected, expected_lse = reference.paged_attention(*given)
    if plan is not None:
        assert (plan(planned, readers, q.shape[1], sliding) is not None) == bool(served)
    if phase not in served:
        assert found is None
        found = paged_attention(*given)
    assert found is not None
    out, lse = found
    real = torch.isfinite(expected_lse)
    assert torch.equal(torch.isfinite(lse), real) and real.any()
    assert (out - expected).norm() <= ERROR * expected.norm()
    torch.testing.assert_close(lse[real], expected_lse[real], rtol=1e-3, atol=2e-3)


@pytest.mark.skipif(cpu_kernel.library() is None, reason="no C++ compiler: the reference serves")
@pytest.mark.parametrize(("name", "phase"), CELLS)
def test_cpp(name, phase, monkeypatch):
    row = MATRIX[name]
    check(row, phase, cpu_kernel, row.cpp, torch.device("cpu"), monkeypatch)


@pytest.mark.skipif(not TRITON_HERE, reason="no GPU, no interpreter")
@pytest.mark.parametrize(("name", "phase"), CELLS)
def test_triton(name, phase, monkeypatch):
    module = pytest.importorskip("headq_ao.ops.paged_attention.triton_kernel")
    row = MATRIX[name]
    check(row, phase, module, row.triton, torch.device("cpu" if INTERPRETED else "cuda"), monkeypatch)


@pytest.mark.skipif(TRITON_HERE, reason="they run in this process")
@pytest.mark.parametrize("names", [QUICK, pytest.param(list(MATRIX), marks=pytest.mark.slow)], ids=["quick", "all"])
def test_triton_in_the_interpreter(names):
    pytest.importorskip("triton")
    cells = [f"{__file__}::test_triton[{name}-{phase}]" for name in names for phase in BOTH]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *cells]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and f"{2 * len(names)} passed" in run.stdout, run.stdout + run.stderr
