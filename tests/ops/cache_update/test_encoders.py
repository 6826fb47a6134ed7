"""Encoders of head groups through a schema, and as functions of tokens."""

import pytest
import torch

from headq_ao.ops.cache_update.encoders import coders, flatten, frame_of, unflatten
from headq_ao.ops.encode.op import quantize
from tests.ops.cache_update.streams import LAYOUTS, Stream
from tests.ops.frames import some_frame


@pytest.mark.parametrize("name", LAYOUTS)
def test_flat_and_back(name):
    """As many encoders as there were, each with its own tensors, those that are not coded none."""
    keys, values = Stream(LAYOUTS[name]).encoders
    tensors, spec = flatten(keys, values)
    again = unflatten(tensors, spec)
    for before, after in zip((keys, values), again, strict=True):
        assert len(before) == len(after)
        for a, b in zip(before, after, strict=True):
            if a is None:
                assert b is None
                continue
            assert b.flat[1] == a.flat[1]
            assert all(x is y for x, y in zip(a.flat[0], b.flat[0], strict=True)), "no copies"
    assert len(tensors) == sum(len(e.flat[0]) for side in (keys, values) for e in side if e is not None)


def test_the_frame_is_that_of_keys():
    frame = some_frame(32, 32)
    assert frame_of(Stream(LAYOUTS["mixed bits"], frame=frame).encoders[0]) is frame
    assert frame_of(Stream(LAYOUTS["mixed bits"]).encoders[0]) is None
    assert frame_of([None, None]) is None
    passed, _ = unflatten(*flatten(*Stream(LAYOUTS["mixed bits"], frame=frame).encoders))
    assert frame_of(passed).tokens == 32 and torch.equal(frame_of(passed).table, frame.table)


def test_each_head_group_has_its_own():
    s = Stream(LAYOUTS["all sorts"])
    of_keys, of_values = coders(s.layout, *s.encoders)
    k, v = s.tokens(5, 0)
    for group, keys, values in zip(s.layout.groups, *s.encoders, strict=True):
        part = group.part
        if keys is not None:
            codes, scale, zero = of_keys(k[:, part], part)
            want = quantize(k[:, part], keys)
            assert torch.equal(codes, want[0]) and torch.equal(scale, want[1][..., 0]), "a key has one scale"
            assert (zero is None) == (want[2] is None)
        if values is not None:
            found, want = of_values(v[:, part], part), quantize(v[:, part], values)
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_another_quantizer_may_be_given():
    s, seen = Stream(LAYOUTS["one group"]), []

    def noted(x, encoder):
        seen.append(encoder)
        return quantize(x, encoder)

    of_keys, of_values = coders(s.layout, *s.encoders, noted)
    k, v = s.tokens(2, 0)
    of_keys(k, slice(0, 3))
    of_values(v, slice(0, 3))
    assert seen == [s.encoders[0][0], s.encoders[1][0]]
