"""Rows of numbers that the kernels of a step read: what is in them, and for how long they are kept."""

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("triton")
from headq_ao.ops.cache_update import triton_matrices as module
from headq_ao.ops.cache_update.encoders import flatten
from headq_ao.ops.cache_update.triton_matrices import (
    BLOCK,
    FACTOR,
    FIRST_SPREAD,
    SWEEPS,
    TOP,
    UNBIASED,
    UNIT,
    WIDTH,
    matrices,
    served,
    shape_of,
)
from headq_ao.ops.error_feedback.reference import SPREADS
from headq_ao.ops.error_feedback.triton_kernel import in_levels
from tests.ops.cache_update.streams import LAYOUTS, Stream


@pytest.mark.parametrize(
    ("name", "serves"),
    [("one group", True), ("mixed bits", True), ("nearest", True), ("affine", False), ("side code", False),
     ("all sorts", False), ("exact keys", False)],
)  # fmt: skip
def test_codecs_that_rows_say_all_about(name, serves):
    """Symmetric codes of one bit width with one scale a token, on both sides."""
    s = Stream(LAYOUTS[name])
    coded = all(g.keys.bits and g.values.bits for g in s.layout.groups)
    assert (coded and served(s.layout, flatten(*s.encoders)[1])) is serves


def parts_of(row, shape):
    first = [0, *shape.parts]
    return [row[a:b] for a, b in itertools.pairwise(first)]


@pytest.mark.parametrize("name", ["mixed bits", "nearest"])
@pytest.mark.parametrize("unit", [False, True])
def test_what_a_row_holds(name, unit):
    """Of keys and values of each head: numbers, mean, steps, the basis, and all pulls, each in one of two places."""
    s = Stream(LAYOUTS[name], dim=48, unit=unit)
    shape, rows = shape_of(s.layout), matrices(s.layout, *flatten(*s.encoders))
    assert (shape.dim, shape.width) == (64, 64) and rows.shape == (2 * s.heads, shape.parts[-1])
    line = iter(rows.double())
    for encoder, heads in [(e, g.heads) for side in s.encoders for e, g in zip(side, s.layout.groups, strict=True)]:
        for h in range(heads):
            numbers, mean, step, diagonal, pivot, encode, inner, outer = parts_of(next(line), shape)
            number = encoder.step if isinstance(encoder.step, float) else None
            feedback = encoder.hessian is not None
            assert float(numbers[UNIT]) == (float(encoder.unit[0, h, 0]) if unit else 1.0)
            assert (int(numbers[TOP]), int(numbers[WIDTH])) == (2 ** encoder.bits[0] - 1, 48)
            assert (int(numbers[SWEEPS]), int(numbers[UNBIASED])) == (3 if feedback else 1, 1)
            spreads = SPREADS if feedback else (1.0 if number is None else number,)
            assert numbers[FIRST_SPREAD:][: len(spreads)].tolist() == pytest.approx(spreads)
            assert float(numbers[FACTOR]) == pytest.approx(number if feedback and number else 1.0)
            torch.testing.assert_close(mean[:48].float(), encoder.mean[0, h])
            torch.testing.assert_close(encode.view(64, 64)[:48, :48].float(), encoder.encode[0, h])
            assert not bool(encode.view(64, 64)[48:].any()) and bool((step[48:] == 1).all())
            if not feedback:
                continue
            widths = encoder.step[0, 0].double() if number is None else torch.full((48,), number).double()
            torch.testing.assert_close(step[:48], widths, rtol=1e-6, atol=1e-6)
            _, want, pulls = in_levels(encoder.hessian[0, h].double(), encoder.factor[0, h].double(), widths)
            torch.testing.assert_close(diagonal[:48], want, rtol=1e-5, atol=1e-5)
            of_factor = encoder.factor[0, h].double().diagonal() * widths.square()
            torch.testing.assert_close(pivot[:48], of_factor, rtol=1e-5, atol=1e-5)
            inner, outer = inner.view(2, 64, BLOCK), outer.view(2, 64, 64)
            found = outer.transpose(1, 2).clone()  # [k, i, j]: what an error of j adds to i
            for i in range(48):
                block = i // BLOCK * BLOCK
                inside = slice(block, i)
                assert not bool(found[:, i, inside].any()), "the other place is empty"
                found[:, i, inside] = inner[:, i, : i - block]
            torch.testing.assert_close(found[:, :48, :48], pulls, rtol=1e-4, atol=1e-4)


def test_rows_are_kept_for_as_long_as_the_tensors_are_there():
    s = Stream(LAYOUTS["one group"])
    flat = flatten(*s.encoders)
    rows = matrices(s.layout, *flat)
    assert matrices(s.layout, *flatten(*s.encoders)) is rows
    flat[0][0].mul_(1.0)
    assert matrices(s.layout, *flat) is not rows, "written to"
    before = len(module._made)
    del s, flat, rows
    assert len(module._made) < before


def test_tensors_of_sequences_and_of_fp64_have_none():
    of_sequences = Stream(LAYOUTS["one group"], own=2)
    assert matrices(of_sequences.layout, *flatten(*of_sequences.encoders)) is None
    s = Stream(LAYOUTS["one group"])
    keys, values = s.encoders
    wide = [dataclasses.replace(keys[0], encode=keys[0].encode.double())]
    assert matrices(s.layout, *flatten(wide, values)) is None
