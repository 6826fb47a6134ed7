"""The one table of kernels: what serves on which device, and what does where there are none."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from headq_ao.ops import cpu_build, dispatch, feedback_codes, paged_attention
from headq_ao.ops.dispatch import DEVICES, KERNELS, direct, kernels
from tests.ops.paged_cases import Case, make

OPS = Path(cpu_build.__file__).parent


def test_every_operator_has_kernels_on_every_device():
    assert all(served.keys() == DEVICES == {"cpu", "cuda"} for served in KERNELS.values())
    named = {name for served in KERNELS.values() for name in served.values()}
    on_disk = {path.relative_to(OPS).with_suffix("") for path in OPS.glob("*/*_kernel.py")}
    assert named == {".".join(path.parts) for path in on_disk}


@pytest.mark.parametrize("operator", KERNELS)
@pytest.mark.parametrize("device", sorted(DEVICES))
def test_a_module_launches(operator, device):
    if device == "cuda":
        pytest.importorskip("triton")
    assert callable(kernels(operator, device).launch)


def test_where_there_is_none():
    assert kernels("paged_attention", "meta") is None
    assert kernels("softmax", "cpu") is None


def test_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    dispatch._module.cache_clear()
    try:
        assert all(kernels(operator, "cuda") is None for operator in KERNELS)
        assert kernels("paged_attention", "cpu") is not None
    finally:
        dispatch._module.cache_clear()


def test_without_kernels_the_reference_serves(monkeypatch):
    kv, readers = make(Case(packed=(600,)))
    q = torch.randn(1, 2 * kv.window_k.shape[1], 1, 64)
    found, _ = paged_attention(q, 0.1, kv, readers)
    monkeypatch.setattr(dispatch, "KERNELS", {})
    expected, _ = paged_attention(q, 0.1, kv, readers)
    assert not torch.equal(found, expected) or cpu_build.load(OPS / "paged_attention" / "cpu_kernel.cpp") is None
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_no_operator_asks_for_the_device_itself():
    """But for the sizes of a launch: choices by device are the table's."""
    asks = re.compile(r"\bis_cuda\b|register_kernel|device\.type [!=]=|device_types")
    found = [
        f"{path.relative_to(OPS).as_posix()}:{number}"
        for path in OPS.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if asks.search(line)
    ]
    known = ("paged_attention/triton_arguments.py", "paged_attention/new_tokens.py", "paged_attention/tiles.py")
    assert [where for where in found if not where.startswith(known)] == []


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (lambda: torch.ones(2), True),
        (lambda: torch.ones(2, requires_grad=True), False),
        (lambda: torch.ones(2, device="meta"), False),
        (lambda: torch.nn.Parameter(torch.ones(2), requires_grad=False), False),
    ],
)
def test_the_dispatcher_is_left_out_for_plain_tensors(tensor, expected):
    assert direct(tensor()) is expected


def test_feedback_codes_is_traced_for_a_gpu():
    """One opaque operator with known shapes, on the tokens' device."""
    with FakeTensorMode():
        y, hessian, step = (torch.empty(size, device="cuda") for size in ((1, 2, 5, 16), (1, 2, 16, 16), (1, 2, 16)))
        codes, scale = feedback_codes(y, hessian, step, 2, ldl=hessian)
    assert codes.shape == (1, 2, 5, 16) and scale.shape == (1, 2, 5)
    assert codes.device.type == scale.device.type == "cuda"
