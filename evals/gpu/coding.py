"""Coding on a GPU: tokens that leave the window, of a step and of a prompt, and the prefill of a model."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headq_ao import calibrate, headq_config
from headq_ao.evals.benchmarks.bench_generate import both
from headq_ao.evals.gpu import steps
from headq_ao.evals.gpu.timing import Result, kernel_times, microseconds
from headq_ao.ops import feedback_codes
from headq_ao.ops.error_feedback import reference
from headq_ao.ops.error_feedback.reference import KEPT, PASSES, SPREADS

SAME_ROWS = 0.98  # of feedback_codes: a tie may fall either way


def drawn(width: int, device: torch.device, rows: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens ``[1, 4, rows, width]``, a hessian and steps, for ``feedback_codes``."""
    g = torch.Generator(device).manual_seed(0)
    seen = torch.randn(1, 4, width, width // 2, generator=g, device=device)
    hessian = seen @ seen.mT + 0.2 * torch.eye(width, device=device)
    return torch.randn(1, 4, rows, width, generator=g, device=device), hessian, hessian.new_ones(1, 4, width)


def same_rows(width: int, device: torch.device, rows: int = 256) -> float:
    """Share of rows whose codes and scale ``feedback_codes`` gives as the reference does."""
    y, hessian, step = drawn(width, device, rows)
    codes, scale = feedback_codes(y, hessian, step, 2)
    factor = reference.ldl_factor(hessian)
    expected, expected_scale = reference.feedback_codes(y, hessian, factor, step, 2, SPREADS, KEPT, PASSES, True)
    return float(((codes == expected).all(-1) & (scale == expected_scale)).float().mean())


def measure(
    widths: Sequence[int], rows: int, layers: int, context: int, device: torch.device, repeats: int, result: Result,
    head_dim: int = 128,
) -> None:  # fmt: skip
    """Rows: coding ``4 · rows`` tokens of each width; prefill of a model's ``context`` tokens, dense and packed.

    Raises:
        RuntimeError: where fewer codes than :data:`SAME_ROWS` are the reference's; nothing is timed then.
    """
    for each in widths:
        same = same_rows(each, device, min(rows, 256))
        if same < SAME_ROWS:
            raise RuntimeError(f"only {same:.1%} of the rows of {each} are coded as by the reference")
        y, hessian, step = drawn(each, device, rows)
        factor = reference.ldl_factor(hessian)  # which a codec keeps
        code = partial(feedback_codes, y, hessian, step, 2, ldl=factor)
        result.add(coding=each, tokens=4 * rows, same_rows=same, microseconds=microseconds([code], repeats, device))
    result.add(**prefill(layers, context, device, head_dim))


@torch.no_grad()
def prefill(layers: int, context: int, device: torch.device, head_dim: int) -> dict[str, Any]:
    """Seconds of a prompt into a cache of each kind, the second of two, and the kernels of the packed one."""
    model = steps.random_model(layers, context + steps.SPARE, device, head_dim)
    g = torch.Generator().manual_seed(1)
    rows = torch.randint(steps.VOCABULARY, (2, 512), generator=g)
    models = both(model, headq_config(calibration=calibrate(model, list(rows), progress=False)))
    ids = torch.randint(steps.VOCABULARY, (1, context), generator=g).to(device)
    row: dict[str, Any] = {"layers": layers, "context": context}
    for kind, each in models.items():
        steps.filled(kind, each, ids, 1)
        row[kind] = {"prefill_s": steps.filled(kind, each, ids, 1)[1]}
        if device.type == "cuda":
            row[kind]["kernels"] = kernel_times(partial(steps.filled, kind, each, ids, 1))
    row["over_dense"] = row["packed"]["prefill_s"] / row["dense"]["prefill_s"]
    return row
