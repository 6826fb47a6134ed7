"""The operator feedback_codes: dtypes, tracing, and what it refuses."""

import pytest
import torch

from headq_ao.ops import feedback_codes
from headq_ao.ops.error_feedback import reference


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_rows_are_coded_in_fp32(case, dtype):
    y, metric, step = case(1, 2, 20, 32)
    narrow, wide = (feedback_codes(x, metric, step, 2) for x in (y.to(dtype), y.to(dtype).float()))
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_float64_rows_are_coded_in_float64(case, without_kernel):
    """By the reference, with or without a compiler."""
    y, metric, step = case(1, 2, 20, 32, dtype=torch.float64)
    got, want = feedback_codes(y, metric, step, 2), without_kernel(feedback_codes, y, metric, step, 2)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 17, 16, "head"), (1, 2, 16, 32, "none")], ids=str)
def test_opcheck(case, shape, dtype):
    *size, own = shape
    y, metric, step = case(*size, own=own)
    args = (metric, reference.ldl_factor(metric), step, 2, True, 16)
    torch.library.opcheck(torch.ops.headq.feedback_codes.default, (y.to(dtype), *args))
    view = y.transpose(1, 2).contiguous().transpose(1, 2)
    dense, strided = feedback_codes(y, metric, step, 2), feedback_codes(view, metric.mT, step, 2)
    assert all(torch.equal(a, b) for a, b in zip(dense, strided, strict=True))


def test_meta(case):
    codes, scale = feedback_codes(*(x.to("meta") for x in case(2, 3, 17, 16)), 2)
    assert (codes.shape, codes.dtype, codes.device.type) == ((2, 3, 17, 16), torch.uint8, "meta")
    assert (scale.shape, scale.dtype, scale.device.type) == ((2, 3, 17), torch.float16, "meta")


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_rows(case, tokens):
    codes, scale = feedback_codes(*case(2, 3, tokens, 16), 2)
    assert codes.shape == (2, 3, tokens, 16) and scale.shape == (2, 3, tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 7}, r"bits must be one of \[1, 2, 3, 4, 5, 6, 8\], got 7"),
        ({"bits": 0}, "got 0"),
        ({"scale_bits": 4}, r"scale_bits must be one of \(8, 16\), got 4"),
        (
            {"hessian": (1, 2, 16, 8)},
            r"hessian must be \[B or 1, H or 1, 16, 16\] for tokens of 16, got \(1, 2, 16, 8\)",
        ),
        ({"hessian": (2, 16, 16)}, r"hessian must be .*, got \(2, 16, 16\)"),
        ({"step": (1, 2, 8)}, r"step must be \[B or 1, H or 1, 16\] for tokens of 16, got \(1, 2, 8\)"),
        ({"step": (16,)}, r"step must be .*, got \(16,\)"),
    ],
    ids=str,
)
def test_errors(case, changes, message):
    y, metric, step = case(1, 2, 16, 16)
    args = {"hessian": metric, "step": step, "bits": 2}
    args |= {name: torch.ones(x) if isinstance(x, tuple) else x for name, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        feedback_codes(y, **args)
