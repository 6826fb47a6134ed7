"""What an Encoder holds, what of it does not fit, and how it passes through a schema."""

import dataclasses

import pytest
import torch

from headq_ao.ops import Encoder, ldl_factor, quantize
from tests.ops.encode.encoders import encoder_of, run
from tests.ops.frames import some_frame


@pytest.mark.parametrize("base", ["affine", "symmetric", "feedback"])
def test_flat_and_back(case, base):
    encoder = encoder_of(case(base != "affine", rank=4, feedback=base == "feedback"))
    again = Encoder.of_flat(*encoder.flat)
    x = torch.randn(1, 2, 3, 16)
    assert all(
        a is b is None or torch.equal(a, b) for a, b in zip(quantize(x, encoder), quantize(x, again), strict=True)
    )
    assert again.flat[1] == encoder.flat[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": (2, 16, 16)}, r"x must be \[B, h, n, 16\] for this encoder, got \(2, 16, 16\)"),
        ({"k": (1, 2, 16, 8)}, r"x must be \[B, h, n, 16\] for this encoder, got \(1, 2, 16, 8\)"),
        ({"bits": [2] * 15}, r"bits must list 16 base and 0 side coordinates, got 15"),
        ({"bits": [2] * 15 + [7]}, r"bits must be of \[1, 2, 3, 4, 5, 6, 8\], got \[7\]"),
        ({"bits": [2] * 8 + [4] * 8}, r"need one bit width for all coordinates, got \[2, 4\]"),
        ({"side_step": (1, 2, 4)}, r"side_encode, side_step and read must be given together"),
        ({"mean": (1, 2, 8)}, r"mean must end in \(16,\) for tokens of 16, got \(1, 2, 8\)"),
        ({"step": (1, 1, 4), "symmetric": True}, r"step must end in \(16,\) for tokens of 16, got \(1, 1, 4\)"),
        ({"metric": (1, 2, 16, 16)}, r"error feedback \(hessian\) needs a symmetric code \(step\)"),
        ({"metric": (1, 2, 16, 16), "symmetric": True, "group_size": 8}, r"and one scale per token"),
        (
            {"metric": (1, 2, 16, 16), "symmetric": True, "bits": [2] * 8 + [4] * 8},
            r"error feedback need one bit width for all coordinates",
        ),
        ({"metric": (1, 2, 16, 8), "symmetric": True}, r"hessian must end in \(16, 16\) for tokens of 16, got"),
        (
            {"scale_bits": 8},
            r"scale_bits must be 16, or 8 with error feedback \(hessian\) and a tensor of steps, got 8",
        ),
        ({"metric": (1, 2, 16, 16), "symmetric": True, "scale_bits": 4}, r"scale_bits must be 16, or 8 .*, got 4"),
        ({"group_size": 5}, r"group_size must divide the 16 coordinates, got 5"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors(case, changes, message):
    args = case(False)
    args |= {name: torch.ones(x) if isinstance(x, tuple) else x for name, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        run(args)


def test_what_an_encoder_says_of_itself(case):
    """Coordinates with those of a side code, scales of a token, and its tensors as kernels read them."""
    args = case(True, head_dim=32, rank=5)
    args["encode"] = args["encode"].mT.contiguous().mT
    assert not args["encode"].is_contiguous()
    encoder = encoder_of(args)
    assert encoder.coordinates == 37 and encoder.encode.is_contiguous()
    assert torch.equal(encoder.encode, args["encode"])
    assert [encoder.groups(32), Encoder(torch.eye(32)[None, None], (2,), 1.0, 8).groups(32)] == [1, 4]
    assert len(encoder.tensors) == 6 and encoder.factor is None


def test_the_factor_is_made_once_or_taken_as_it_is_given(case):
    encoder = encoder_of(case(True, feedback=True))
    assert encoder.factor is encoder.factor
    torch.testing.assert_close(encoder.factor, ldl_factor(encoder.hessian))
    given = torch.eye(16, dtype=torch.float64).expand(1, 2, 16, 16)
    other = dataclasses.replace(encoder, ldl=given)
    assert torch.equal(other.factor, given)
    assert torch.equal(Encoder.of_flat(*other.flat).factor, given)


def test_a_frame_passes_through_too():
    frame = some_frame(16, 64, 3)
    encoder = Encoder(torch.eye(16)[None, None], (2,), 0.5, unbiased=False, frame=frame)
    again = Encoder.of_flat(*encoder.flat)
    assert again.frame.tokens == 64 and torch.equal(again.frame.table, frame.table)
    assert torch.equal(again.frame.partner, frame.partner)
    assert (again.step, again.unbiased, again.bits, again.group_size) == (0.5, False, (2,), 0)
    assert all(x is not frame.table for x in encoder.tensors)
