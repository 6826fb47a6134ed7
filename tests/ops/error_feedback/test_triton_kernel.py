"""What the Triton kernel of feedback_codes is given; its results are in ../feedback_interpreted.py."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import triton

from headq_ao.ops.error_feedback import reference
from headq_ao.ops.error_feedback.triton_kernel import in_levels, launch, tiling


def test_errors_in_levels_cost_what_errors_do(case):
    """``eᵀ H e`` of ``e = step · l``; a factor scaled alike, and pulls as the reference sums them."""
    y, metric, step = case(2, 2, 9, 16, own="both", dtype=torch.float64)
    factor = reference.ldl_factor(metric)
    in_steps, diagonal, (elimination, descent) = in_levels(metric, factor, step)
    level = y / step.unsqueeze(-2)
    torch.testing.assert_close(reference.quadratic_form(level, in_steps, level), reference.quadratic_form(y, metric, y))
    torch.testing.assert_close(diagonal, in_steps.diagonal(dim1=-2, dim2=-1))
    i = 9
    pull = (y[..., :i] * factor[..., :i, i].unsqueeze(-2)).sum(-1) / step[..., i, None]  # of sequential_round
    torch.testing.assert_close((level[..., :i] * elimination[..., i, None, :i]).sum(-1), pull)
    pull = (y @ metric[..., :, i, None])[..., 0] / metric[..., i, i, None] / step[..., i, None] - level[..., i]
    torch.testing.assert_close((level * descent[..., i, None, :]).sum(-1), pull)
    assert torch.equal(elimination.triu(1), descent.triu(1)), "what follows is yet to be rounded: it pulls as it is"


def test_what_is_not_seen_does_not_pull():
    zero = torch.zeros(1, 1, 4, 4)
    *_, pulls = in_levels(zero, torch.eye(4)[None, None], torch.ones(1, 1, 4))
    assert not bool(pulls.any()) and bool(torch.isfinite(pulls).all())


def test_what_needs_no_launch(case):
    """fp64 goes to the reference; no rows are no work."""
    y, metric, step = case(1, 2, 4, 16, dtype=torch.float64)
    factor = reference.ldl_factor(metric)
    assert launch(y, metric, factor, step, 2, True) is None
    codes, scale = launch(y[:, :, :0].float(), metric, factor, step, 2, True)
    assert codes.shape == (1, 2, 0, 16) and codes.dtype == torch.uint8
    assert scale.shape == (1, 2, 0) and scale.dtype == torch.float16


@pytest.mark.parametrize(
    ("backend", "arch", "rows", "warps", "tf32"),
    [
        ("cuda", 80, {16: 32, 64: 32, 128: 32, 256: 16}, {64: 1, 128: 2}, True),
        ("cuda", 90, {16: 128, 128: 128, 256: 64}, {64: 4, 128: 4}, True),
        ("cuda", 100, {64: 32, 256: 16}, {64: 1, 128: 2}, True),
        ("hip", "gfx942", {16: 256, 128: 64, 256: 32}, {64: 4}, False),
    ],
)
def test_rows_of_a_program_by_device(backend, arch, rows, warps, tf32, monkeypatch):
    target = SimpleNamespace(backend=backend, arch=arch)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: target))
    monkeypatch.setattr(triton.runtime, "driver", driver)
    assert {padded: tiling(padded)["ROWS"] for padded in rows} == rows
    assert {padded: tiling(padded)["num_warps"] for padded in warps} == warps
    assert tiling(64)["TF32"] is tf32
