"""The Triton kernel of ``feedback_codes`` against the reference: in Triton's interpreter by test_triton_interpreter.py,
and on a GPU.

The interpreter is chosen when Triton is imported, so these run in a process of their own, with TRITON_INTERPRET=1;
``python -m pytest tests/ops/feedback_interpreted.py`` without it runs them on the GPU.
"""

import os

import pytest
import torch

from headq_ao.ops.error_feedback import reference, triton_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no GPU, no interpreter")


@pytest.mark.parametrize(
    ("batch", "heads", "rows", "width", "bits", "own", "unbiased"),
    [
        (1, 2, 40, 16, 2, (1, 2), True),
        (2, 1, 8, 24, 3, (2, 1), False),
        (1, 1, 32, 64, 2, (1, 1), True),
        (2, 2, 33, 96, 1, (1, 2), True),
        (1, 1, 20, 80, 8, (1, 1), True),
        (1, 1, 16, 8, 4, (1, 1), False),
    ],
)
def test_feedback_codes(batch, heads, rows, width, bits, own, unbiased):
    """Codes equal to the reference's (measured: all of them; a tie may fall either way), and as good an error."""
    g = torch.Generator().manual_seed(0)
    seen = torch.randn(*own, width, width // 2, generator=g)
    metric = seen @ seen.mT + 0.2 * torch.eye(width)
    y, step = 3 * torch.randn(batch, heads, rows, width, generator=g), 0.8 + 0.4 * torch.rand(*own, width, generator=g)
    y[:, :, ::5] *= 1e-3  # smaller than the least scale in a byte
    for scale_bits in (16, 8):
        feedback_as_the_reference(y, metric, step, bits, unbiased, scale_bits)


def test_feedback_codes_of_an_ill_conditioned_metric():
    """Eigenvalues over five decades, as queries have them, where errors pull each other the most."""
    g = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(1, 2, 128, 128, dtype=torch.float64, generator=g))
    metric = (basis * torch.logspace(0, -5, 128, dtype=torch.float64)) @ basis.mT
    y, step = torch.randn(1, 2, 50, 128, generator=g), torch.full((1, 1, 128), 0.9)
    feedback_as_the_reference(y, metric.float(), step, 2, unbiased=True)


def test_no_feedback_codes_of_no_rows():
    y, metric, step = (
        x.to(DEVICE) for x in (torch.empty(1, 2, 0, 24), torch.eye(24).expand(1, 2, 24, 24), torch.ones(1, 2, 24))
    )
    codes, scale = triton_kernel.launch(y, metric, metric, step, 2, True)
    assert codes.shape == (1, 2, 0, 24) and scale.shape == (1, 2, 0)


def feedback_as_the_reference(y, metric, step, bits, unbiased, scale_bits=16):
    y, metric, step = (x.to(DEVICE) for x in (y, metric, step))
    given = (y, metric, reference.ldl_factor(metric), step, bits)
    codes, scale = triton_kernel.launch(*given, unbiased, scale_bits)
    expected, expected_scale = reference.feedback_codes(
        *given, reference.SPREADS, reference.KEPT, reference.PASSES, unbiased, scale_bits
    )

    def error(codes, scale):
        e = y - scale.float()[..., None] * step.unsqueeze(-2) * (codes.float() - (2**bits - 1) / 2)
        return ((e @ metric) * e).sum(-1)

    assert codes.dtype == torch.uint8 and scale.dtype == torch.float16
    same = (codes == expected).all(-1) & (scale == expected_scale)
    assert same.float().mean() >= 0.98
    assert error(codes, scale).sum() <= 1.001 * error(expected, expected_scale).sum()


def test_fp64_is_not_served():
    y, eye, step = (
        x.double().to(DEVICE) for x in (torch.ones(1, 1, 4, 16), torch.eye(16)[None, None], torch.ones(1, 1, 16))
    )
    assert triton_kernel.launch(y, eye, eye, step, 2, True) is None
