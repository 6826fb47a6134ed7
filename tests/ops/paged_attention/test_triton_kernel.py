"""What the Triton kernels serve, and how a launch is cut; what they compute is in ../paged_interpreted.py."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from headq_ao.ops.page_layout import GroupLayout, PageLayout, Side
from headq_ao.ops.paged_attention import triton_kernel
from headq_ao.ops.paged_attention.triton_kernel import (
    LONGEST_TILE,
    QUERIES,
    OwnedPlan,
    launch,
    plan,
    specialization,
)
from tests.ops.frames import some_frame
from tests.ops.paged_cases import Case, make


def test_what_goes_to_matrix_products():
    """fp64, an exact side, segments that are no whole tiles; nothing is launched then."""
    kv, readers = make(Case())
    few = torch.zeros(1, 6, 1, 64)
    for q, cache in (
        (few.double(), kv), (few, make(Case(keys=((),)))[0]), (few, make(Case(values=(0,)))[0]),
        (few, make(Case(dtype=torch.float64))[0]),
    ):  # fmt: skip
        assert launch(q, 0.1, cache, readers) is None
    askew = dataclasses.replace(readers, frame=some_frame(64, LONGEST_TILE // 2))
    assert launch(few, 0.1, kv, askew) is None and plan(kv, askew, 6, 0, None) is None
    assert plan(make(Case(keys=((),)))[0], dataclasses.replace(readers, query_map=None), 6, 0, None) is None
    recent = dataclasses.replace(make(Case(new=(1,)))[0], recent=5)
    assert launch(few, 0.1, recent, readers) is None


def test_no_queries_are_no_launch():
    kv, readers = make(Case())
    out, lse = launch(torch.zeros(1, 6, 0, 64), 0.1, kv, readers)
    assert out.shape == (1, 6, 0, 64) and lse.shape == (1, 6, 0) and out.dtype == torch.float32


def test_a_plan_says_for_which_queries_it_is():
    kv, readers = make(Case())
    with pytest.raises(ValueError, match=r"a plan is for queries in .* got .*float64"):
        plan(kv, readers, 6, 0, None)(torch.zeros(1, 6, 1, 64, dtype=torch.float64), 0.1)
    owned = plan(dataclasses.replace(kv, window_table=torch.zeros(1, 1).int()), readers, 6, 0, None)
    assert isinstance(owned, OwnedPlan)
    q = torch.zeros(3, 6, 64)
    of = SimpleNamespace(most=1)
    for given in (
        (q.transpose(1, 2).contiguous().transpose(1, 2), 0.1, q, of), (q, 0.1, q[:, ::2], of),
        (q.double(), 0.1, q, of), (q, 0.1, q, SimpleNamespace(most=QUERIES + 1)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="with coordinates side by side and a contiguous out"):
            owned.requests(*given)


def layout(dim, bits):
    return PageLayout(32, dim, dim, (GroupLayout(0, 1, Side((bits,) * dim), Side((bits,))),))


@pytest.mark.parametrize("backend", ["cuda", "hip", "interpreter"])
@pytest.mark.parametrize(("dim", "bits"), [(64, 2), (128, 2), (128, 3), (256, 4), (80, 8)])
def test_what_a_kernel_is_compiled_for(dim, bits, backend):
    """Whole powers of two of coordinates and of rows; registers of all programs that a processor holds suffice."""
    forms = ((Side((bits,) * dim), Side((bits,))),)
    constants, options, held = specialization(layout(dim, bits), forms, 32, 2, backend)
    assert constants["D"] == dim and constants["D_PADDED"] == 1 << (dim - 1).bit_length()
    assert constants["ROWS"] in (8, 16) and (backend != "hip" or constants["ROWS"] == 16)
    assert constants["TILE"] == 32 and specialization(layout(dim, bits), forms, 32, 4, backend)[0]["TILE"] == 16
    assert specialization(layout(dim, bits), forms, 4, 2, "cuda")[0]["ROWS"] == 8
    assert held >= 1 and options["num_warps"] in (1, 2, 4, 8)
    if backend == "cuda":
        assert held * options["num_warps"] * 32 * options["maxnreg"] <= 65536 and options["maxnreg"] <= 255
    assert constants["PTX"] is (backend == "cuda") and triton_kernel.STAGES[backend] == options["num_stages"]
