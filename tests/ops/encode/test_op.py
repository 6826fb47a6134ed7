"""The operator quantize: views, tracing, and that a token is coded by itself."""

import pytest
import torch

from headq_ao.codecs.base import GAUSSIAN_STEP
from headq_ao.ops import Encoder, quantize
from tests.ops import codes_96f785c
from tests.ops.encode.encoders import encoder_of, run


@pytest.mark.parametrize("options", [{}, {"batch": 2, "heads": 3, "tokens": 47, "own": True, "rank": 4}], ids=str)
@pytest.mark.parametrize("base", ["affine", "symmetric", "feedback"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(case, base, options, dtype):
    args = case(base != "affine", **options, feedback=base == "feedback")
    args = {n: x.to(dtype if n == "k" else torch.float32) if torch.is_tensor(x) else x for n, x in args.items()}
    torch.library.opcheck(torch.ops.headq.quantize.default, (args["k"], *encoder_of(args).flat))


def test_a_view(case):
    args = case(True, heads=3, tokens=32, rank=2)
    dense = run(args)
    args["k"] = args["k"].transpose(1, 2).contiguous().transpose(1, 2)  # what a projection hands over
    view = run(args)
    assert torch.equal(view[0], dense[0]) and torch.equal(view[1], dense[1])


@pytest.mark.parametrize("head_dim", [16, 80, 128, 256, 512])
@pytest.mark.parametrize("base", ["affine", "symmetric", "feedback"])
def test_tokens_are_coded_each_for_itself(case, base, head_dim):
    """Any cut of the tokens, single ones included: the same bits."""
    args = case(base != "affine", head_dim=head_dim, tokens=37, rank=4, feedback=base == "feedback")
    args = {n: x.float() if torch.is_tensor(x) else x for n, x in args.items()}
    whole = run(args)
    for cut in (1, 2, 3, 16):
        parts = [run(args | {"k": k}) for k in args["k"].split(cut, 2)]
        for x, *y in zip(whole, *parts, strict=True):
            assert x is None or torch.equal(x, torch.cat(y, 2))


@pytest.mark.parametrize("dim", [32, 48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("number", [True, False], ids=["values", "keys"])
def test_codes_leave_less_error_than_those_of_96f785c(dim, bits, number):
    """Which descended from all of five scales: under a metric with the ridge that calibrations have."""
    torch.manual_seed(dim + bits)
    seen = torch.randn(1, 2, dim, dim // 4)
    step, metric = GAUSSIAN_STEP[bits], seen @ seen.mT
    metric = metric + 0.5 * metric.diagonal(dim1=-2, dim2=-1).mean() * torch.eye(dim)
    encoder = Encoder(
        torch.linalg.qr(torch.randn(1, 2, dim, dim))[0], (bits,), step if number else torch.full((1, 2, dim), step),
        mean=torch.randn(1, 2, dim), hessian=metric,
    )  # fmt: skip
    x = 2 * torch.randn(2, 2, 128, dim)
    y = (x - encoder.mean.unsqueeze(-2)) @ encoder.encode

    def error(codes, scale):
        e = y - scale.float()[..., None] * (1.0 if number else step) * (codes.float() - (2**bits - 1) / 2)
        return float(((e @ metric) * e).sum())

    codes, scale, _ = quantize(x, encoder)
    assert error(codes, scale[..., 0]) < (1.06 if bits == 1 else 1.02) * error(*codes_96f785c.quantize(x, encoder))
